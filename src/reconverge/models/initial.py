"""Initial weights as in the paper. Other models of timm keep the initial weights of their constructors."""

from collections.abc import Iterable

import torch
from torch import nn

from reconverge.base import chance


def truncated_normal(net: nn.Module, seed: int) -> None:
    """Convolutions and linear layers: truncated normal with std 0.02, biases 0 (official code; the 0.2 in
    Table 5 is a misprint).

    The random key of each weight contains its name, so the order of the modules has no influence. This uses
    torch's initialiser, because timm's leaves a few weights at 100 times the std.
    """
    _initialise(net.named_modules(), seed)


def truncated_normal_head(net: nn.Module, seed: int) -> None:
    """Only the head. The convolutions keep PyTorch's default initial weights (roadmap.py explains why)."""
    _initialise([("head", net.get_submodule("head"))], seed)


@torch.no_grad()
def segmentation_heads(net: nn.Module, seed: int) -> None:
    """All convolutions outside `net.body`, as mmsegmentation draws them: Kaiming's normal distribution for
    the channels that go out and ReLU; the two classifiers normal with std 0.01, biases 0.
    """
    classifiers = net.get_classifier()  # type: ignore[operator]
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("body."):
            generator = chance.generator(seed, "init", name)
            if module in classifiers:
                nn.init.normal_(module.weight, std=0.01, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            else:
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu", generator=generator
                )


@torch.no_grad()
def _initialise(layers: Iterable[tuple[str, nn.Module]], seed: int) -> None:
    for name, module in layers:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=chance.generator(seed, "init", name))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
