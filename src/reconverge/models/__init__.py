"""The models: one table, name -> how to build it, and the parameters and multiply-adds that it must have."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reconverge import chance, settings
from reconverge.errors import Exit, Stop
from reconverge.models import drop_path
from reconverge.models.isotropic import Isotropic


@dataclass(frozen=True)
class Spec:
    build: Callable[[settings.Model, int], nn.Module]  # (settings, classes); draws from the global generators, in a keyed scope
    initialise: Callable[[nn.Module, int], None]  # (model, seed): the initial weights
    parameters: float  # millions, with 1000 classes, as published
    macs: float  # billions, of one image of 224 x 224 and 1000 classes, as published
    top1: float | None  # percent on ImageNet-1K, trained on it alone at 224, as published
    source: str

    def count(self, model: settings.Model) -> tuple[float, float]:
        """Parameters in millions and multiply-adds in billions of `model`, counted on the meta device: nothing is allocated."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = self.build(model, 1000)
            net(torch.empty(1, 3, 224, 224))
        return sum(parameter.numel() for parameter in net.parameters()) / 1e6, counter.get_total_flops() / 2e9


def build(model: settings.Model, classes: int, seed: int) -> nn.Module:
    """A classifier of `classes` with the initial weights of `seed`, on the CPU, stochastic depth taking its masks as data.

    Errors: Stop(USAGE).
    """
    spec = _spec(model)
    with chance.scope(seed, "init"):
        net = spec.build(model, classes)
    drop_path.replace(net)
    spec.initialise(net, seed)
    with torch.no_grad():
        head = net.get_classifier()  # type: ignore[operator]
        head.weight.mul_(model.head_init_scale)
        head.bias.mul_(model.head_init_scale)
    return net


def on_meta(model: settings.Model, classes: int) -> nn.Module:
    """The same without weights, on the meta device: nothing is allocated. Errors: Stop(USAGE)."""
    with torch.device("meta"):
        net = _spec(model).build(model, classes)
    drop_path.replace(net)
    return net


def _spec(model: settings.Model) -> Spec:
    if model.name not in MODELS:
        raise Stop(Exit.USAGE, f"model.name={model.name}", f"the table MODELS: {', '.join(MODELS)}", "model=NAME")
    return MODELS[model.name]


def _convnext(timm_name: str) -> Callable[[settings.Model, int], nn.Module]:
    def build(model: settings.Model, classes: int) -> nn.Module:
        # Not timm.create_model, which drops arguments that are None: layer_scale=null would be timm's 1e-6.
        create = timm.model_entrypoint(timm_name)
        return create(num_classes=classes, drop_path_rate=model.drop_path, ls_init_value=model.layer_scale)

    return build


def _isotropic(width: int, depth: int) -> Callable[[settings.Model, int], nn.Module]:
    def build(model: settings.Model, classes: int) -> nn.Module:
        return Isotropic(width, depth, classes, model.drop_path, model.layer_scale)

    return build


@torch.no_grad()
def truncated_normal(net: nn.Module, seed: int) -> None:
    """Convolutions and linear layers truncated normal of deviation 0.02, biases 0 (official code; Table 5's 0.2 is a misprint).

    Each weight has a key of its own, its name: nothing hangs on the order of the modules. torch's initialiser and not timm's,
    which leaves a few weights at 100 deviations.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=chance.generator(seed, "init", name))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


MODELS = {
    "convnext_atto": Spec(_convnext("convnext_atto"), truncated_normal, 3.70, 0.55, None, "timm; not in the paper"),
    "convnext_t": Spec(_convnext("convnext_tiny"), truncated_normal, 28.6, 4.5, 82.1, "Tables 1, 9"),
    "convnext_s": Spec(_convnext("convnext_small"), truncated_normal, 50, 8.7, 83.1, "Table 1"),
    "convnext_b": Spec(_convnext("convnext_base"), truncated_normal, 89, 15.4, 83.8, "Table 1"),
    "convnext_l": Spec(_convnext("convnext_large"), truncated_normal, 198, 34.4, 84.3, "Table 1"),
    "convnext_xl": Spec(_convnext("convnext_xlarge"), truncated_normal, 350, 60.9, None, "Table 1"),
    "convnext_iso_s": Spec(_isotropic(384, 18), truncated_normal, 22, 4.3, 79.7, "Table 2; the official repository says 78.7"),
    "convnext_iso_b": Spec(_isotropic(768, 18), truncated_normal, 87, 16.9, 82.0, "Table 2"),
    "convnext_iso_l": Spec(_isotropic(1024, 36), truncated_normal, 306, 59.7, 82.6, "Table 2"),
}
