"""Builds a classifier from the settings of a model, with initial weights or on the meta device."""

import torch
from torch import nn

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop, reason
from reconverge.config import settings
from reconverge.models import drop_path, head
from reconverge.models.table import Spec, find

TRIED = (16, 32, 64, 96, 128, 224, 256, 384, 512)  # pixels; the first that fits is suggested


def model(given: settings.Model, classes: int, seed: int) -> nn.Module:
    """A classifier of `classes` classes on the CPU, with the initial weights of `seed`. Its stochastic depth
    takes masks as data (drop_path.py).

    Errors: Stop(USAGE).
    """
    spec = _fitting(given)
    with chance.scope(seed, "init"):
        net = spec.build(given, classes)
    drop_path.replace(net)
    if spec.initialise:
        spec.initialise(net, seed)
    with torch.no_grad():
        for classifier in head.classifiers(net):
            for parameter in classifier.parameters():
                parameter.mul_(given.head_init_scale)
    return net


def on_meta(given: settings.Model, classes: int) -> nn.Module:
    """The same model on the meta device, where weights have no values. Errors: Stop(USAGE)."""
    net = _fitting(given).on_meta(given, classes)
    drop_path.replace(net)
    return net


def refuse_sizes(net: nn.Module, sizes: dict[str, int]) -> None:
    """Refuse image sizes for which the model's forward pass fails, tried on the meta device.

    `sizes`: setting -> side in pixels. Errors: Stop(USAGE). A model that fails on the meta device at every
    size is accepted, because then the size is not the reason.
    """
    weights = {name: tensor.to("meta") for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    trained = net.training

    def fault(size: int) -> str:
        try:
            torch.func.functional_call(net, weights, (torch.empty(1, 3, size, size, device="meta"),))
        except (RuntimeError, AssertionError) as error:
            return reason(error).partition("\n")[0]
        return ""

    net.eval()
    with torch.no_grad():
        for setting, size in sizes.items():
            said = fault(size)
            fitting = next((other for other in TRIED if not fault(other)), None) if said else None
            if fitting:
                raise Stop(
                    Exit.USAGE,
                    f"{setting}={size} with this model: {said}",
                    f"an image size that the model can process, such as {fitting}",
                    f"{setting}={fitting}",
                )
    net.train(trained)


def _fitting(model: settings.Model) -> Spec:
    """The table's entry of a model. Models that are built for one image size need model.image_size; others
    refuse it.

    Errors: Stop(USAGE).
    """
    spec = find(model)
    if spec.fixed_size and model.image_size is None:
        size = " ".join(
            f"{key}={spec.fixed_size}" for key in ("model.image_size", "augment.size", "evaluate.size")
        )
        raise Stop(
            Exit.USAGE,
            f"model={model.name} without model.image_size",
            "an image size in pixels, because this model is built for one image size",
            f"{size}, the size of its pre-trained weights; or another size, the same in all three",
        )
    if model.image_size is not None and not spec.fixed_size:
        raise Stop(
            Exit.USAGE,
            f"model.image_size={model.image_size} with {model.name}",
            "null, because this model takes images of any size",
            "model.image_size=null",
        )
    return spec
