"""The exponential moving average (EMA) of the weights, kept as a second model beside the raw one."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """`model` has the EMA weights. Each update sets them to decay * ema + (1 - decay) * raw; buffers are
    copied from the raw model (as in timm's ModelEma).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """Update the EMA weights after a step.

        `skip`: float scalar on the device, 1 if the step is skipped; then the EMA weights stay unchanged.
        """
        average = [parameter.data for parameter in self.model.parameters()]
        change = torch._foreach_sub([parameter.data for parameter in model.parameters()], average)
        torch._foreach_mul_(change, (1 - self.decay) * (1 - skip))
        torch._foreach_add_(average, change)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
