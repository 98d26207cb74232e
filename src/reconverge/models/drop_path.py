"""Stochastic depth with masks as data: they are drawn once per microbatch from its key, and passed to the
model with the images.

So the masks do not change with the size of forward passes, torch.compile, activation checkpointing or the
device.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from reconverge.base import chance


class StochasticDepth(nn.Module):
    """Replaces timm's DropPath: multiplies each image's branch by its mask value (0, or 1 / keep rate)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.mask: Tensor | None = None  # (N,), set before each training forward pass

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        assert self.mask is not None, "a training forward pass needs its masks: call Masked"
        return branch * self.mask.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Masked(nn.Module):
    """A model that takes masks with its images: forward((N, 3, H, W), (N, drops)) -> logits (N, classes).

    More inputs are passed on to it, such as the dropout masks of a segmenter (upernet.py).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]

    def forward(self, images: Tensor, masks: Tensor, *more: Tensor) -> Tensor:
        for drop, mask in zip(self._drops, masks.unbind(1), strict=True):
            drop.mask = mask
        return self.model(images, *more)


def replace(model: nn.Module) -> None:
    """Replace every DropPath of a timm model by a StochasticDepth with the same rate."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, StochasticDepth(child.drop_prob or 0.0))


def rates(model: nn.Module) -> list[float]:
    """The drop rates of the blocks with stochastic depth, in the order of the blocks."""
    return [module.rate for module in model.modules() if isinstance(module, StochasticDepth)]


def draw(rates: list[float], images: int, key: tuple[int, int, int], device: torch.device) -> Tensor:
    """Masks float32 (images, len(rates)) of 0 or 1 / (1 - rate). key = (seed, step, microbatch)."""
    keep = 1 - torch.tensor(rates, dtype=torch.float64).view(-1, 1)
    draws = torch.from_numpy(chance.uniform((len(rates), images), *key[:1], "drop_path", *key[1:]))
    masks = ((draws < keep) / keep).float().T
    return masks.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else masks
