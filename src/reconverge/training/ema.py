"""The exponential moving average of the weights: the second of a run's two models."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """`model`: a copy of the raw model, after each update decay * average + (1 - decay) * raw; buffers are
    copied (timm's ModelEma).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """One step of the average.

        `skip`: float scalar on the device, 1 where the step was suppressed and the average must stay.
        """
        average = [parameter.data for parameter in self.model.parameters()]
        change = torch._foreach_sub([parameter.data for parameter in model.parameters()], average)
        torch._foreach_mul_(change, (1 - self.decay) * (1 - skip))
        torch._foreach_add_(average, change)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
