"""From the settings of a model to a classifier, with weights or without."""

import torch
from torch import nn

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop, reason
from reconverge.config import settings
from reconverge.models import drop_path
from reconverge.models.table import Spec, find

TRIED = (16, 32, 64, 96, 128, 224, 256, 384, 512)  # pixels, where another size is to be suggested


def model(given: settings.Model, classes: int, seed: int) -> nn.Module:
    """A classifier of `classes` with the initial weights of `seed`, on the CPU, stochastic depth taking its
    masks as data.

    Errors: Stop(USAGE).
    """
    spec = _fitting(given)
    with chance.scope(seed, "init"):
        net = spec.build(given, classes)
    drop_path.replace(net)
    if spec.initialise:
        spec.initialise(net, seed)
    heads = net.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        for head in heads if isinstance(heads, tuple) else (heads,):
            for parameter in head.parameters():
                parameter.mul_(given.head_init_scale)
    return net


def on_meta(given: settings.Model, classes: int) -> nn.Module:
    """The same without weights, on the meta device: nothing is allocated. Errors: Stop(USAGE)."""
    with torch.device("meta"):
        net = _fitting(given).build(given, classes)
    drop_path.replace(net)
    return net


def refuse_sizes(net: nn.Module, sizes: dict[str, int]) -> None:
    """Where the model leaves nothing of an image of these sides, setting -> pixels: its forward pass is tried
    on the meta device.

    Errors: Stop(USAGE). A model that the meta device cannot run at any size is let pass: its size is not what
    is wrong.
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
                    f"{setting}={size}: {said}",
                    f"a size that the model takes, such as {fitting}",
                    f"{setting}={fitting}",
                )
    net.train(trained)


def _fitting(model: settings.Model) -> Spec:
    """The same, given the size of the images if it is built for one, and only then. Errors: Stop(USAGE)."""
    spec = find(model)
    if spec.fixed_size and model.image_size is None:
        size = " ".join(
            f"{key}={spec.fixed_size}" for key in ("model.image_size", "augment.size", "evaluate.size")
        )
        raise Stop(
            Exit.USAGE,
            f"model={model.name} without model.image_size",
            "the size of the images: it is built for one",
            f"{size}, the size of its pre-trained weights; or another size, the same in all three",
        )
    if model.image_size is not None and not spec.fixed_size:
        raise Stop(
            Exit.USAGE,
            f"model.image_size={model.image_size} with {model.name}",
            "null: it takes any size",
            "model.image_size=null",
        )
    return spec
