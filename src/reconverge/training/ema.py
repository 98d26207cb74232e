"""The exponential moving average (EMA) of the weights, kept as a second model beside the raw one."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """`model` has the EMA weights. Each update sets them to decay * ema + (1 - decay) * raw.

    BatchNorm's running mean and variance are averaged in the same way, as in the published runs (ModelEma of
    timm 0.3.2 averages all of the state dict). Counters are copied, as are buffers that checkpoints leave
    out; that ModelEma averages counters too, and rounds them down.

    It is computed as ema + (1 - decay) * (raw - ema). The published form shrinks the EMA by 1.7e-8 a step,
    because in float32 0.9999 and 0.0001 add up to less than 1: in the end it is 1.5e-4 smaller than this one.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        saved = model.state_dict().keys()
        self._averaged = {
            name for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """Update the EMA weights after a step, when its statistics are settled (batch_norm.py).

        `skip`: float scalar on the device, 1 if the step is skipped; then the EMA weights stay unchanged.
        """
        average, raw = self._tensors(self.model), self._tensors(model)
        change = torch._foreach_sub(raw, average)
        torch._foreach_mul_(change, (1 - self.decay) * (1 - skip))
        torch._foreach_add_(average, change)
        for (name, mine), theirs in zip(self.model.named_buffers(), model.buffers(), strict=True):
            if name not in self._averaged:
                mine.copy_(theirs)

    def _tensors(self, model: nn.Module) -> list[Tensor]:
        """What is averaged."""
        buffers = [buffer for name, buffer in model.named_buffers() if name in self._averaged]
        return [*(parameter.data for parameter in model.parameters()), *buffers]
