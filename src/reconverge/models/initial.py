"""Initial weights that the paper draws. A model of timm's draws its own."""

from collections.abc import Iterable

import torch
from torch import nn

from reconverge.base import chance


def truncated_normal(net: nn.Module, seed: int) -> None:
    """Convolutions and linear layers truncated normal of deviation 0.02, biases 0 (official code; Table 5's
    0.2 is a misprint).

    Each weight has a key of its own, its name: nothing hangs on the order of the modules. torch's initialiser
    and not timm's, which leaves a few weights at 100 deviations.
    """
    _initialise(net.named_modules(), seed)


def truncated_normal_head(net: nn.Module, seed: int) -> None:
    """Only the head; the convolutions stay as PyTorch's constructors drew them (roadmap.py says why)."""
    _initialise([("head", net.get_submodule("head"))], seed)


@torch.no_grad()
def _initialise(layers: Iterable[tuple[str, nn.Module]], seed: int) -> None:
    for name, module in layers:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=chance.generator(seed, "init", name))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
