"""The models: one table, name -> how to build it, and what is published of it."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reconverge import chance, settings
from reconverge.errors import Exit, Stop, reason
from reconverge.models import drop_path, roadmap
from reconverge.models.isotropic import Isotropic


class Published(NamedTuple):
    """What the paper prints of a model for images of one size, with 1000 classes."""

    size: int  # pixels, side of the image
    parameters: float | None  # millions
    macs: float | None  # billions, of one image
    top1: float | None = None  # percent on ImageNet-1K, trained on it alone
    top1_22k: float | None = None  # percent on ImageNet-1K, pre-trained on ImageNet-22K
    counted: tuple[float, float] | None = (
        None  # parameters and macs that a count must give where that is not what is printed
    )
    note: str = ""  # why; or what else is printed


@dataclass(frozen=True)
class Spec:
    build: Callable[
        [settings.Model, int], nn.Module
    ]  # (settings, classes); draws from the global generators, in a keyed scope
    initialise: (
        Callable[[nn.Module, int], None] | None
    )  # (model, seed): the initial weights; None: those that `build` drew
    published: tuple[Published, ...]
    source: str
    fixed_size: int | None = (
        # pixels, side of the images that it is built for unless model.image_size says; None: it takes any
        None
    )

    def count(self, model: settings.Model, size: int) -> tuple[float, float]:
        """Parameters in millions, and multiply-adds in billions of one image of `size` pixels, with 1000
        classes.

        Counted on the meta device: nothing is allocated. Multiply-adds are those of convolutions, linear
        layers and attention.
        """
        model = replace(model, image_size=size if self.fixed_size else None)
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            net = self.build(model, 1000).eval()
            net(torch.empty(1, 3, size, size))
        return sum(parameter.numel() for parameter in net.parameters()) / 1e6, counter.get_total_flops() / 2e9


def build(model: settings.Model, classes: int, seed: int) -> nn.Module:
    """A classifier of `classes` with the initial weights of `seed`, on the CPU, stochastic depth taking its
    masks as data.

    Errors: Stop(USAGE).
    """
    spec = _fitting(model)
    with chance.scope(seed, "init"):
        net = spec.build(model, classes)
    drop_path.replace(net)
    if spec.initialise:
        spec.initialise(net, seed)
    heads = net.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        for head in heads if isinstance(heads, tuple) else (heads,):
            for parameter in head.parameters():
                parameter.mul_(model.head_init_scale)
    return net


def on_meta(model: settings.Model, classes: int) -> nn.Module:
    """The same without weights, on the meta device: nothing is allocated. Errors: Stop(USAGE)."""
    with torch.device("meta"):
        net = _fitting(model).build(model, classes)
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
            if (said := fault(size)) and (
                fitting := next(
                    (other for other in (16, 32, 64, 96, 128, 224, 256, 384, 512) if not fault(other)), 0
                )
            ):
                raise Stop(
                    Exit.USAGE,
                    f"{setting}={size}: {said}",
                    f"a size that the model takes, such as {fitting}",
                    f"{setting}={fitting}",
                )
    net.train(trained)


def find(model: settings.Model) -> Spec:
    """The entry of MODELS, or one made for a model of timm's that is none. Errors: Stop(USAGE)."""
    if model.timm is not None:
        if not timm.is_model(model.timm):
            near = difflib.get_close_matches(model.timm, timm.list_models(), n=3, cutoff=0)
            raise Stop(
                Exit.USAGE,
                f"model.timm={model.timm}",
                "a name of timm.list_models()",
                f"model.timm={' or '.join(near)}",
            )
        return _timm(model.timm, "not in the paper", Published(_fixed_size(model.timm) or 224, None, None))
    if model.name not in MODELS:
        raise Stop(
            Exit.USAGE, f"model.name={model.name}", f"the table MODELS: {', '.join(MODELS)}", "model=NAME"
        )
    return MODELS[model.name]


def _fitting(model: settings.Model) -> Spec:
    """The same, given the size of the images if it is built for one, and only then. Errors: Stop(USAGE)."""
    spec = find(model)
    if spec.fixed_size and model.image_size is None:
        size = f"model.image_size={spec.fixed_size}"
        raise Stop(
            Exit.USAGE,
            f"model={model.name} without model.image_size",
            "the size of the images: it is built for one",
            size,
        )
    if model.image_size is not None and not spec.fixed_size:
        raise Stop(
            Exit.USAGE,
            f"model.image_size={model.image_size} with {model.name}",
            "null: it takes any size",
            "model.image_size=null",
        )
    return spec


# ---- initial weights ---------------------------------------------------------------------------------------


@torch.no_grad()
def _initialise(layers: Iterable[tuple[str, nn.Module]], seed: int) -> None:
    for name, module in layers:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=chance.generator(seed, "init", name))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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


# ---- the kinds of models -----------------------------------------------------------------------------------


def _convnext(timm_name: str, source: str, *published: Published) -> Spec:
    def build(model: settings.Model, classes: int) -> nn.Module:
        # Not timm.create_model, which drops arguments that are None: layer_scale=null would be timm's 1e-6.
        create = timm.model_entrypoint(timm_name)
        return create(num_classes=classes, drop_path_rate=model.drop_path, ls_init_value=model.layer_scale)

    return Spec(build, truncated_normal, published, source)


def _isotropic(width: int, depth: int, source: str, *published: Published) -> Spec:
    def build(model: settings.Model, classes: int) -> nn.Module:
        return Isotropic(width, depth, classes, model.drop_path, model.layer_scale)

    return Spec(build, truncated_normal, published, source)


def _steps(prefix: str, regime: dict[str, roadmap.Step], source: str) -> dict[str, Spec]:
    """An entry a step of the roadmap."""

    def step(design: roadmap.Design, published: Published) -> Spec:
        def build(model: settings.Model, classes: int) -> nn.Module:
            return roadmap.Roadmap(design, classes, model.drop_path, model.layer_scale)

        return Spec(
            build, truncated_normal if design.downsampling else truncated_normal_head, (published,), source
        )

    return {
        prefix + name: step(
            design, Published(224, row.parameters, row.macs, row.top1, counted=row.counted, note=row.note)
        )
        for (name, row), design in zip(regime.items(), roadmap.designs(regime), strict=True)
    }


def _timm(name: str, source: str, *published: Published) -> Spec:
    """A model of timm's with the settings that it has, and the initial weights that its constructor draws."""

    def build(model: settings.Model, classes: int) -> nn.Module:
        if model.layer_scale is not None:
            raise Stop(
                Exit.USAGE,
                f"model.layer_scale={model.layer_scale} with {name}",
                "null: its constructor decides",
                "model.layer_scale=null",
            )
        options: dict[str, Any] = {"img_size": model.image_size} if model.image_size else {}
        if model.drop_path:
            options["drop_path_rate"] = model.drop_path
        try:
            net = timm.create_model(name, num_classes=classes, **options)
        except (TypeError, ValueError, AssertionError) as error:
            given = ", ".join(f"{key}={value}" for key, value in options.items())
            raise Stop(
                Exit.USAGE,
                f"{name} with {given}",
                f"what timm's constructor takes: {error}",
                "model.drop_path=0, or the size",
            ) from error
        _refuse(net, name, model)
        return net

    return Spec(build, None, published, source, _fixed_size(name))


def _fixed_size(timm_name: str) -> int | None:
    """Pixels, side of the images that timm builds a model for; None where it takes any size."""
    known = get_pretrained_cfg(timm_name)
    return known.input_size[-1] if known is not None and known.fixed_input_size else None


def _refuse(net: nn.Module, name: str, model: settings.Model) -> None:
    """Errors: Stop(USAGE) for what a constructor of timm's lets pass, and would be wrong."""
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if model.image_size is not None and patch and model.image_size % patch[0]:
        near = max(1, round(model.image_size / patch[0])) * patch[0]
        raise Stop(
            Exit.USAGE,
            f"images of {model.image_size} px with {name}",
            f"multiples of {patch[0]}, its patches",
            f"augment.size={near} evaluate.size={near}",
        )
    rates = [float(getattr(net, "drop_rate", None) or 0)]  # some of timm's models call dropout as a function
    rates += [module.p for module in net.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    if max(rates) > 0:
        raise Stop(
            Exit.USAGE,
            f"{name}, which has dropout of {max(rates):g}",
            "models without: its draws have no key, so a resumed run would see others",
            "another model",
        )


# ---- the table ---------------------------------------------------------------------------------------------

OTHERWISE = (
    "published: a count whose rules are not given; counted: convolutions and linear layers, as timm builds"
    " them"
)

MODELS = {
    "convnext_atto": _convnext("convnext_atto", "timm; not in the paper", Published(224, 3.70, 0.55)),
    "convnext_t": _convnext("convnext_tiny", "Tables 1, 9", Published(224, 28.6, 4.5, 82.1, 82.9),
        Published(384, 28.6, 13.1, None, 84.1)),
    "convnext_s": _convnext("convnext_small", "Table 1", Published(224, 50, 8.7, 83.1, 84.6),
        Published(384, 50, 25.5, None, 85.8)),
    "convnext_b": _convnext("convnext_base", "Table 1", Published(224, 89, 15.4, 83.8, 85.8),
        Published(384, 89, 45.1, 85.1, 86.8, note="45.0 in the row without ImageNet-22K")),
    "convnext_l": _convnext("convnext_large", "Table 1", Published(224, 198, 34.4, 84.3, 86.6),
        Published(384, 198, 101.0, 85.5, 87.5)),
    "convnext_xl": _convnext("convnext_xlarge", "Table 1", Published(224, 350, 60.9, None, 87.0),
        Published(384, 350, 179.0, None, 87.8)),
    "convnext_iso_s": _isotropic(384, 18, "Table 2",
        Published(224, 22, 4.3, 79.7, note="the official repository says 78.7")),
    "convnext_iso_b": _isotropic(768, 18, "Table 2", Published(224, 87, 16.9, 82.0)),
    "convnext_iso_l": _isotropic(1024, 36, "Table 2", Published(224, 306, 59.7, 82.6)),
    **_steps("roadmap_", roadmap.RESNET_50, "Table 10; parameters: the authors' code"),
    **_steps("roadmap_b_", roadmap.RESNET_200, "Table 11; parameters: the authors' code"),
    "resnet50": _timm("resnet50", "Tables 8, 10", Published(224, 25.6, 4.09, 76.13)),
    "resnet200": _timm("resnet200", "Table 11", Published(224, None, 15.01, 78.20)),
    "deit_s": _timm("deit_small_patch16_224", "Table 1", Published(224, 22, 4.6, 79.8)),
    "deit_b": _timm("deit_base_patch16_224", "Table 1", Published(224, 87, 17.6, 81.8)),
    "vit_s": _timm("vit_small_patch16_224", "Table 2", Published(224, 22, 4.6, 79.8)),
    "vit_b": _timm("vit_base_patch16_224", "Tables 1, 2", Published(224, 87, 17.6, 81.8),
        Published(384, 87, 55.5, None, 85.4)),
    "vit_l": _timm("vit_large_patch16_224", "Tables 1, 2", Published(224, 304, 61.6, 82.6),
        Published(384, 305, 191.1, None, 86.8)),
    "swin_t": _timm("swin_tiny_patch4_window7_224", "Table 1", Published(224, 28, 4.5, 81.3)),
    "swin_s": _timm("swin_small_patch4_window7_224", "Table 1", Published(224, 50, 8.7, 83.0)),
    "swin_b": _timm("swin_base_patch4_window7_224", "Table 1", Published(224, 88, 15.4, 83.5, 85.2)),
    "swin_b_384": _timm("swin_base_patch4_window12_384", "Table 1",
        Published(384, 88, 47.1, 84.5, 86.4, note="47.0 in the row with ImageNet-22K")),
    "swin_l": _timm("swin_large_patch4_window7_224", "Table 1", Published(224, 197, 34.5, None, 86.3)),
    "swin_l_384": _timm("swin_large_patch4_window12_384", "Table 1", Published(384, 197, 103.9, None, 87.3)),
    "regnety_16g": _timm("regnety_160", "Table 1",
        Published(224, 84, 16.0, 82.9, counted=(83.59, 15.91), note="published: the 16 of its name")),
    "effnet_b7": _timm("tf_efficientnet_b7", "Table 1",
        Published(600, 66, 37.0, 84.3, counted=(66.35, 37.75), note=OTHERWISE)),
    "effnetv2_l": _timm("tf_efficientnetv2_l", "Table 1",
        Published(480, 120, 53.0, 85.7, 86.8, counted=(118.52, 56.08), note=OTHERWISE)),
    "effnetv2_xl": _timm("tf_efficientnetv2_xl", "Table 1",
        Published(480, 208, 94.0, None, 87.3, counted=(208.12, 82.05),
            note="published: nearer to images of 512 px (93.35 counted) than to the 480 of Table 1")),
    "r101x3": _timm("resnetv2_101x3_bit", "Table 1",
        Published(384, 388, 204.6, None, 84.4, counted=(387.93, 204.21), note=OTHERWISE)),
    "r152x4": _timm("resnetv2_152x4_bit", "Table 1",
        Published(480, 937, 840.5, None, 85.4, counted=(936.53, 839.25), note=OTHERWISE)),
}  # fmt: skip
