"""The table of models: name -> how to build it, and its published numbers.

A new model needs a file with its code, a line in this table, and a yaml file in conf/model.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop
from reconverge.config import settings
from reconverge.models import roadmap
from reconverge.models.initial import truncated_normal, truncated_normal_head
from reconverge.models.isotropic import Isotropic


class Paper(NamedTuple):
    """Published numbers of a model with 1000 classes, for one image size."""

    size: int  # pixels, side of the image
    parameters: float | None  # millions
    macs: float | None  # billions, of one image
    top1: float | None = None  # percent on ImageNet-1K, trained on it alone
    top1_22k: float | None = None  # percent on ImageNet-1K, pre-trained on ImageNet-22K
    # Parameters and macs that counting gives, where they differ from the printed ones.
    counted: tuple[float, float] | None = None
    note: str = ""  # why they differ, or what else is published


@dataclass(frozen=True)
class Spec:
    # (settings, classes) -> the model; draws from the global generators, inside chance.scope
    build: Callable[[settings.Model, int], nn.Module]
    # (model, seed): sets the initial weights; None: keep those that `build` drew
    initialise: Callable[[nn.Module, int], None] | None
    published: tuple[Paper, ...]
    source: str
    # Side in pixels of the images that it takes, unless model.image_size is given; None: it takes any size.
    fixed_size: int | None = None

    def on_meta(self, model: settings.Model, classes: int) -> nn.Module:
        """The model on the meta device. No memory is allocated for weights, except with timm before 1.0.30,
        which reads numbers from tensors while it builds some models.
        """
        try:
            with torch.device("meta"):
                return self.build(model, classes)
        except RuntimeError:
            with chance.scope(0, "init"):
                return self.build(model, classes).to("meta")

    def count(self, model: settings.Model, size: int) -> tuple[float, float]:
        """Millions of parameters, and billions of multiply-adds for an image of `size` px, with 1000 classes.

        They are counted on the meta device, so no weights are allocated. Multiply-adds are those of
        convolutions, linear layers and attention.
        """
        model = replace(model, image_size=size if self.fixed_size else None)
        net = self.on_meta(model, 1000).eval()
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, size, size))
        return sum(parameter.numel() for parameter in net.parameters()) / 1e6, counter.get_total_flops() / 2e9


def find(model: settings.Model) -> Spec:
    """The entry of MODELS, or a new entry if model.timm names another model. Errors: Stop(USAGE)."""
    if model.timm is not None:
        if not timm.is_model(model.timm):
            near = difflib.get_close_matches(model.timm, timm.list_models(), n=3, cutoff=0.7)
            raise Stop(
                Exit.USAGE,
                f"model.timm={model.timm}",
                "a name of the table (reconverge models) or of timm.list_models()",
                " or ".join(f"model.timm={name}" for name in near) or "another name",
            )
        return _timm(model.timm, "not in the paper", Paper(_fixed_size(model.timm) or 224, None, None))
    if model.name not in MODELS:
        raise Stop(
            Exit.USAGE,
            f"model.name={model.name}",
            f"a name of the table MODELS: {', '.join(MODELS)}",
            "model=NAME with one of these, or model=timm model.timm=NAME for a model of timm",
        )
    return MODELS[model.name]


# ---- the kinds of models -----------------------------------------------------------------------------------


def _convnext(timm_name: str, source: str, *published: Paper) -> Spec:
    def build(model: settings.Model, classes: int) -> nn.Module:
        # timm.create_model drops arguments that are None: layer_scale=null would become timm's default 1e-6.
        create = timm.model_entrypoint(timm_name)
        return create(num_classes=classes, drop_path_rate=model.drop_path, ls_init_value=model.layer_scale)

    return Spec(build, truncated_normal, published, source)


def _isotropic(width: int, depth: int, source: str, *published: Paper) -> Spec:
    def build(model: settings.Model, classes: int) -> nn.Module:
        return Isotropic(width, depth, classes, model.drop_path, model.layer_scale)

    return Spec(build, truncated_normal, published, source)


def _steps(prefix: str, regime: dict[str, roadmap.Step], source: str) -> dict[str, Spec]:
    """One entry for each step of the roadmap."""

    def step(design: roadmap.Design, published: Paper) -> Spec:
        def build(model: settings.Model, classes: int) -> nn.Module:
            return roadmap.Roadmap(design, classes, model.drop_path, model.layer_scale)

        return Spec(
            build, truncated_normal if design.downsampling else truncated_normal_head, (published,), source
        )

    return {
        prefix + name: step(
            design, Paper(224, row.parameters, row.macs, row.top1, counted=row.counted, note=row.note)
        )
        for (name, row), design in zip(regime.items(), roadmap.designs(regime), strict=True)
    }


def _timm(name: str, source: str, *published: Paper) -> Spec:
    """A model of timm with the initial weights that its constructor draws."""

    def build(model: settings.Model, classes: int) -> nn.Module:
        if model.layer_scale is not None:
            raise Stop(
                Exit.USAGE,
                f"model.layer_scale={model.layer_scale} with {name}",
                "null, because timm's constructor of this model decides about layer scale",
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
                f"arguments that timm's constructor takes; it says: {error}",
                "model.drop_path=0, or another model.image_size",
            ) from error
        _refuse(net, name, model)
        return net

    return Spec(build, None, published, source, _fixed_size(name))


def _fixed_size(timm_name: str) -> int | None:
    """Side in pixels of the only images that a timm model takes; None if it takes any size."""
    known = get_pretrained_cfg(timm_name)
    return known.input_size[-1] if known is not None and known.fixed_input_size else None


def _refuse(net: nn.Module, name: str, model: settings.Model) -> None:
    """Errors: Stop(USAGE) for settings that timm's constructor accepts, but that would train wrongly."""
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if model.image_size is not None and patch and model.image_size % patch[0]:
        near = max(1, round(model.image_size / patch[0])) * patch[0]
        raise Stop(
            Exit.USAGE,
            f"images of {model.image_size} px with {name}",
            f"multiples of its patch size, {patch[0]} px",
            f"augment.size={near} evaluate.size={near}",
        )
    rates = [float(getattr(net, "drop_rate", None) or 0)]  # some timm models call dropout as a function
    rates += [module.p for module in net.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    if max(rates) > 0:
        raise Stop(
            Exit.USAGE,
            f"{name}, which has dropout with rate {max(rates):g}",
            "models without dropout, because a resumed run could not repeat its random masks",
            "choose another model",
        )


# ---- the table ---------------------------------------------------------------------------------------------

OTHERWISE = (
    "the paper does not say how its numbers were counted; the counts here are of convolutions and linear"
    " layers in timm's model"
)

MODELS = {
    "convnext_atto": _convnext("convnext_atto", "timm; not in the paper", Paper(224, 3.70, 0.55)),
    "convnext_t": _convnext("convnext_tiny", "Tables 1, 9", Paper(224, 28.6, 4.5, 82.1, 82.9),
        Paper(384, 28.6, 13.1, None, 84.1)),
    "convnext_s": _convnext("convnext_small", "Table 1", Paper(224, 50, 8.7, 83.1, 84.6),
        Paper(384, 50, 25.5, None, 85.8)),
    "convnext_b": _convnext("convnext_base", "Table 1", Paper(224, 89, 15.4, 83.8, 85.8),
        Paper(384, 89, 45.1, 85.1, 86.8, note="published GMACs are 45.0 in the row without ImageNet-22K")),
    "convnext_l": _convnext("convnext_large", "Table 1", Paper(224, 198, 34.4, 84.3, 86.6),
        Paper(384, 198, 101.0, 85.5, 87.5)),
    "convnext_xl": _convnext("convnext_xlarge", "Table 1", Paper(224, 350, 60.9, None, 87.0),
        Paper(384, 350, 179.0, None, 87.8)),
    "convnext_iso_s": _isotropic(384, 18, "Table 2",
        Paper(224, 22, 4.3, 79.7, note="the official repository says top-1 78.7")),
    "convnext_iso_b": _isotropic(768, 18, "Table 2", Paper(224, 87, 16.9, 82.0)),
    "convnext_iso_l": _isotropic(1024, 36, "Table 2", Paper(224, 306, 59.7, 82.6)),
    **_steps("roadmap_", roadmap.RESNET_50, "Table 10; parameters: the authors' code"),
    **_steps("roadmap_b_", roadmap.RESNET_200, "Table 11; parameters: the authors' code"),
    "resnet50": _timm("resnet50", "Tables 8, 10", Paper(224, 25.6, 4.09, 76.13)),
    "resnet200": _timm("resnet200", "Table 11", Paper(224, None, 15.01, 78.20)),
    "deit_s": _timm("deit_small_patch16_224", "Table 1", Paper(224, 22, 4.6, 79.8)),
    "deit_b": _timm("deit_base_patch16_224", "Table 1", Paper(224, 87, 17.6, 81.8)),
    "vit_s": _timm("vit_small_patch16_224", "Table 2", Paper(224, 22, 4.6, 79.8)),
    "vit_b": _timm("vit_base_patch16_224", "Tables 1, 2", Paper(224, 87, 17.6, 81.8),
        Paper(384, 87, 55.5, None, 85.4)),
    "vit_l": _timm("vit_large_patch16_224", "Tables 1, 2", Paper(224, 304, 61.6, 82.6),
        Paper(384, 305, 191.1, None, 86.8)),
    "swin_t": _timm("swin_tiny_patch4_window7_224", "Table 1", Paper(224, 28, 4.5, 81.3)),
    "swin_s": _timm("swin_small_patch4_window7_224", "Table 1", Paper(224, 50, 8.7, 83.0)),
    "swin_b": _timm("swin_base_patch4_window7_224", "Table 1", Paper(224, 88, 15.4, 83.5, 85.2)),
    "swin_b_384": _timm("swin_base_patch4_window12_384", "Table 1",
        Paper(384, 88, 47.1, 84.5, 86.4, note="published GMACs are 47.0 in the row with ImageNet-22K")),
    "swin_l": _timm("swin_large_patch4_window7_224", "Table 1", Paper(224, 197, 34.5, None, 86.3)),
    "swin_l_384": _timm("swin_large_patch4_window12_384", "Table 1", Paper(384, 197, 103.9, None, 87.3)),
    "regnety_16g": _timm("regnety_160", "Table 1",
        Paper(224, 84, 16.0, 82.9, counted=(83.59, 15.91), note="the published 16 is from the model's name")),
    "effnet_b7": _timm("tf_efficientnet_b7", "Table 1",
        Paper(600, 66, 37.0, 84.3, counted=(66.35, 37.75), note=OTHERWISE)),
    "effnetv2_l": _timm("tf_efficientnetv2_l", "Table 1",
        Paper(480, 120, 53.0, 85.7, 86.8, counted=(118.52, 56.08), note=OTHERWISE)),
    "effnetv2_xl": _timm("tf_efficientnetv2_xl", "Table 1",
        Paper(480, 208, 94.0, None, 87.3, counted=(208.12, 82.05),
            note="the published GMACs fit 512 px (93.35 counted) better than the 480 px of Table 1")),
    "r101x3": _timm("resnetv2_101x3_bit", "Table 1",
        Paper(384, 388, 204.6, None, 84.4, counted=(387.93, 204.21), note=OTHERWISE)),
    "r152x4": _timm("resnetv2_152x4_bit", "Table 1",
        Paper(480, 937, 840.5, None, 85.4, counted=(936.53, 839.25), note=OTHERWISE)),
}  # fmt: skip
