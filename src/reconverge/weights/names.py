"""Converts the names of ConvNeXt weights in other code to ours, which are timm's; and those of UPerNet."""

import re
from typing import NamedTuple

from torch import Tensor

# Convolutions with BatchNorm in mmsegmentation's heads -> in ours, which has the names of
# segmentation-models-pytorch. smp counts the levels from coarse to fine.
CONVOLUTIONS = {
    r"decode_head\.psp_modules\.(\d)\.1": r"decoder.psp.blocks.\1.1",
    r"decode_head\.bottleneck": r"decoder.psp.out_conv",
    r"decode_head\.lateral_convs\.(\d)": r"decoder.fpn_lateral_blocks.{mirrored}.conv_norm_relu",
    r"decode_head\.fpn_convs\.(\d)": r"decoder.fpn_conv_blocks.{mirrored}",
    r"decode_head\.fpn_bottleneck": r"decoder.fusion_block",
    r"auxiliary_head\.convs\.0": r"auxiliary",
}

# Layout -> a name that only this layout has, and pairs (their name, our name), as regular expressions. A name
# that matches no pair is kept, and is then reported as unexpected.
LAYOUTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "official ConvNeXt": (
        r"downsample_layers\.0\.0\.weight",
        [
            (r"downsample_layers\.0\.([01])\.(\w+)", r"stem.\1.\2"),
            (r"downsample_layers\.([1-3])\.([01])\.(\w+)", r"stages.\1.downsample.\2.\3"),
            (r"stages\.(\d+)\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
            (r"stages\.(\d+)\.(\d+)\.norm\.(\w+)", r"stages.\1.blocks.\2.norm.\3"),
            (r"stages\.(\d+)\.(\d+)\.pwconv([12])\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
            (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.blocks.\2.gamma"),
            (r"norm\.(\w+)", r"head.norm.\1"),
            (r"head\.(\w+)", r"head.fc.\1"),
        ],
    ),
    "official isotropic ConvNeXt": (
        r"blocks\.0\.dwconv\.weight",
        [
            (r"blocks\.(\d+)\.dwconv\.(\w+)", r"blocks.\1.conv_dw.\2"),
            (r"blocks\.(\d+)\.pwconv([12])\.(\w+)", r"blocks.\1.mlp.fc\2.\3"),
        ],
    ),
    "torchvision's ConvNeXt": (
        r"features\.1\.0\.layer_scale",
        [
            (r"features\.0\.([01])\.(\w+)", r"stem.\1.\2"),
            (r"features\.([246])\.([01])\.(\w+)", r"stages.{half}.downsample.\2.\3"),
            (r"features\.([1357])\.(\d+)\.block\.0\.(\w+)", r"stages.{half}.blocks.\2.conv_dw.\3"),
            (r"features\.([1357])\.(\d+)\.block\.2\.(\w+)", r"stages.{half}.blocks.\2.norm.\3"),
            (r"features\.([1357])\.(\d+)\.block\.3\.(\w+)", r"stages.{half}.blocks.\2.mlp.fc1.\3"),
            (r"features\.([1357])\.(\d+)\.block\.5\.(\w+)", r"stages.{half}.blocks.\2.mlp.fc2.\3"),
            (r"features\.([1357])\.(\d+)\.layer_scale", r"stages.{half}.blocks.\2.gamma"),
            (r"classifier\.0\.(\w+)", r"head.norm.\1"),
            (r"classifier\.2\.(\w+)", r"head.fc.\1"),
        ],
    ),
    # The authors' segmentation files, and those of mmsegmentation 1, which calls the layers of a block
    # otherwise.
    "mmsegmentation's UPerNet": (
        r"decode_head\.conv_seg\.weight",
        [
            (r"backbone\.downsample_layers\.0\.([01])\.(\w+)", r"body.stem.\1.\2"),
            (r"backbone\.downsample_layers\.([1-3])\.([01])\.(\w+)", r"body.stages.\1.downsample.\2.\3"),
            (
                r"backbone\.stages\.(\d+)\.(\d+)\.(?:dwconv|depthwise_conv)\.(\w+)",
                r"body.stages.\1.blocks.\2.conv_dw.\3",
            ),
            (r"backbone\.stages\.(\d+)\.(\d+)\.norm\.(\w+)", r"body.stages.\1.blocks.\2.norm.\3"),
            (
                r"backbone\.stages\.(\d+)\.(\d+)\.(?:pwconv|pointwise_conv)([12])\.(\w+)",
                r"body.stages.\1.blocks.\2.mlp.fc\3.\4",
            ),
            (r"backbone\.stages\.(\d+)\.(\d+)\.gamma", r"body.stages.\1.blocks.\2.gamma"),
            (r"backbone\.norm([0-3])\.(\w+)", r"norm\1.\2"),
            (r"decode_head\.conv_seg\.(\w+)", r"classifier.\1"),
            (r"auxiliary_head\.conv_seg\.(\w+)", r"auxiliary_classifier.\1"),
            *(
                (rf"{theirs}\.{kind}\.(?P<part>\w+)", rf"{ours}.{index}.\g<part>")
                for theirs, ours in CONVOLUTIONS.items()
                for index, kind in enumerate(("conv", "bn"))
            ),
        ],
    ),
}


def stripped(name: str) -> str:
    """The name without the prefixes of DistributedDataParallel (module.) and torch.compile (_orig_mod.)."""
    return re.sub(r"^(module\.)+", "", re.sub(r"(^|\.)_orig_mod\.", r"\1", name))


class Entry(NamedTuple):
    name: str  # our name
    given: str  # name in the file
    tensor: Tensor  # with the shape of our weight


def converted(tensors: dict[str, Tensor]) -> tuple[str | None, list[Entry]]:
    """The layout of the file, recognised by its names (None: ours, or unknown), and all its tensors with our
    name and the file's name.
    """
    for layout, (sign, rules) in LAYOUTS.items():
        if any(re.fullmatch(sign, name) for name in tensors):
            return layout, [
                Entry(_renamed(name, rules), name, _gamma(name, tensor)) for name, tensor in tensors.items()
            ]
    return None, [Entry(name, name, tensor) for name, tensor in tensors.items()]


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for theirs, ours in rules:
        if found := re.fullmatch(theirs, name):
            if "{half}" in ours:  # torchvision numbers stages (1, 3, 5, 7) and downsampling layers (2, 4, 6)
                ours = ours.replace("{half}", str(int(found[1]) // 2))  # in one sequence
            if "{mirrored}" in ours:  # three levels, in the other order
                ours = ours.replace("{mirrored}", str(2 - int(found[1])))
            return found.expand(ours)
    return name


def _gamma(name: str, tensor: Tensor) -> Tensor:
    """torchvision stores layer scale with the shape (d, 1, 1)."""
    return tensor.flatten() if name.endswith("layer_scale") else tensor
