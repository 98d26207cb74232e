"""The classifier head in float32, for evaluation in mixed precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(net: nn.Module) -> Iterator[None]:
    """Inside, the classifier of `net` takes float32 features and gives float32 logits, also under autocast.

    A bfloat16 logit has 8 significant bits: of a thousand classes several then have the same largest logit,
    and the answer would be the first of them. Without autocast nothing changes.
    """
    heads = classifiers(net)
    for head in heads:
        head.forward = _without_autocast(head.forward)
    try:
        yield
    finally:
        for head in heads:
            del head.forward  # the method of its class is there again


def classifiers(net: nn.Module) -> list[nn.Module]:
    """The modules that give the logits: what timm's get_classifier() returns, of `net` or of the model in
    it. Distilled models have two.
    """
    model = next((module for module in net.modules() if hasattr(module, "get_classifier")), None)
    if model is None:
        return []
    found = model.get_classifier()  # type: ignore[operator]
    return list(found) if isinstance(found, tuple) else [found]


def _without_autocast(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def exact(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return forward(features.float())

    return exact
