"""The exponential moving average (EMA) of the weights, kept as a second model beside the raw one."""

import copy

import torch
from torch import Tensor, nn

from reconverge.training.batch_norm import by_dtype


class Ema:
    """`model` has the EMA weights. Each update sets them to decay * ema + (1 - decay) * raw.

    BatchNorm's running mean and variance are averaged in the same way, as in the published runs (ModelEma of
    timm 0.3.2 averages all of the state dict). Counters are copied, as are buffers that checkpoints leave
    out; that ModelEma averages counters too, and rounds them down.

    It is computed as ema + (1 - decay) * (raw - ema). The published form shrinks the EMA by 1.7e-8 a step,
    because in float32 0.9999 and 0.0001 add up to less than 1: in the end it is 1.5e-4 smaller than this one.
    """

    def __init__(self, model: nn.Module, decay: float):
        """`model`: the raw weights, which the EMA follows from now on."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        saved = model.state_dict().keys()
        averaged = {
            name for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()
        }
        self._average, copied = _divided(self.model, averaged)
        self._raw, raw_copied = _divided(model, averaged)
        self._copies = list(zip(by_dtype(copied), by_dtype(raw_copied), strict=True))

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Update the EMA weights after a step, when its statistics are settled (batch_norm.py).

        `skip`: float scalar on the device, 1 if the step is skipped; then the EMA weights stay unchanged.
        """
        change = torch._foreach_sub(self._raw, self._average)
        torch._foreach_mul_(change, (1 - self.decay) * (1 - skip))
        torch._foreach_add_(self._average, change)
        for mine, theirs in self._copies:
            torch._foreach_copy_(mine, theirs)


def _divided(model: nn.Module, averaged: set[str]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and buffers that are averaged, and the buffers that are copied."""
    buffers = dict(model.named_buffers())
    average = [buffer for name, buffer in buffers.items() if name in averaged]
    copied = [buffer for name, buffer in buffers.items() if name not in averaged]
    return [*(parameter.data for parameter in model.parameters()), *average], copied
