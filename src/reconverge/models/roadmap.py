"""The roadmap of section 2 (Tables 10 and 11): from ResNet-50 to ConvNeXt-T and from ResNet-200 to
ConvNeXt-B, with one change in each step.

The definitions follow the authors' code from the time of submission, whose multiply-adds equal those of the
tables at every step. Where the code and the paper differ, or say nothing, we chose this:

- The last step is the published ConvNeXt, with its layer norms after the stem, before each downsampling and
  before the head, its layer scale, and its initial weights. The authors' code has a last step without them;
  it adds a layer norm before the head that is not a row of the tables. The paper says that separate
  downsampling diverges without the added norms.
- Layer scale: none before the last step, as in the authors' commands. The appendix may also be read as 1e-6
  for all steps; model.layer_scale=1e-6 gives that.
- Initial weights before the last step: PyTorch's default for convolutions; the head is truncated normal with
  std 0.02 and biases 0, as in the authors' code.
- Stochastic depth: the rate grows linearly over all blocks up to the recipe's rate for the sizes t and b. For
  the steps from ResNet-200 no rate is published.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Design:
    """The switches, in the order in which the steps change them. The defaults give ResNet-50."""

    depths: tuple[int, int, int, int] = (3, 4, 6, 3)  # blocks of each stage
    width: int = 64  # of the first stage; doubles from stage to stage
    # Stem: one 4x4 convolution of stride 4, instead of 7x7 of stride 2, norm, activation and max pooling.
    patchify: bool = False
    depthwise: bool = False  # the spatial convolution has as many groups as channels
    inverted: bool = False  # channels C -> 4C -> C, instead of 4C -> C -> 4C
    depthwise_first: bool = False  # the spatial convolution comes before both 1x1s, instead of between them
    kernel: int = 3  # side of the spatial convolution
    activation: type[nn.Module] = nn.ReLU
    # Only between the two 1x1s, instead of after each convolution but the last, and after the sum.
    fewer_activations: bool = False
    fewer_norms: bool = False  # only before the first 1x1, instead of after each convolution
    # LayerNorm over the channels, instead of BatchNorm; the convolutions of blocks get biases.
    layer_norm: bool = False
    # LayerNorm and a 2x2 convolution of stride 2 between stages, instead of a stride and a projection in the
    # first block of a stage.
    downsampling: bool = False

    def norm(self, channels: int) -> nn.Module:
        return LayerNorm2d(channels, eps=1e-6) if self.layer_norm else nn.BatchNorm2d(channels)

    def outputs(self, width: int) -> int:
        """Output channels of a block of this width."""
        return width if self.inverted else 4 * width


class Step(NamedTuple):
    changes: dict[str, Any]  # relative to the design of the step before
    macs: float  # billions at 224 px (Tables 10, 11)
    top1: float  # percent (Tables 10, 11)
    parameters: float | None = None  # millions, in the authors' code; for the last steps those of ConvNeXt
    counted: tuple[float, float] | None = None  # right parameters and macs, where a table contradicts itself
    note: str = ""


RESNET_50 = {
    "00_resnet50": Step({}, 4.09, 78.82, 25.56),
    "01_stage_ratio": Step({"depths": (3, 3, 9, 3)}, 4.53, 79.36, 28.63),
    "02_patchify_stem": Step({"patchify": True}, 4.42, 79.51, 28.62),
    "03_depthwise": Step({"depthwise": True}, 2.35, 78.28, 15.72),
    "04_width_96": Step({"width": 96}, 5.27, 80.50, 33.76),
    "05_inverted_bottleneck": Step({"inverted": True}, 4.64, 80.64, 25.85),
    "06_depthwise_first": Step({"depthwise_first": True}, 4.07, 79.92, 25.63),
    "07_kernel_5": Step({"kernel": 5}, 4.10, 80.35, 25.72),
    "08_kernel_7": Step({"kernel": 7}, 4.15, 80.57, 25.86),
    "09_kernel_9": Step({"kernel": 9}, 4.21, 80.57, 26.05),
    "10_kernel_11": Step({"kernel": 11}, 4.29, 80.47, 26.29),
    "11_gelu": Step({"kernel": 7, "activation": nn.GELU}, 4.15, 80.62, 25.86),  # the paper went back to 7
    "12_fewer_activations": Step({"fewer_activations": True}, 4.15, 81.27, 25.86),
    "13_fewer_norms": Step({"fewer_norms": True}, 4.15, 81.41, 25.80),
    "14_layer_norm": Step(
        {"layer_norm": True},
        4.46,
        81.47,
        25.84,
        (25.84, 4.15),
        note="the published GMACs are a misprint: Figure 2 says 4.2, and Table 11 shows no change",
    ),
    "15_downsampling": Step(
        {"downsampling": True},
        4.49,
        81.97,
        28.59,
        (28.59, 4.46),
        note="the published GMACs are a misprint: ConvNeXt-T has 4.46",
    ),
}
RESNET_200 = {
    "00_resnet200": Step({"depths": (3, 24, 36, 3)}, 15.01, 81.14, 64.67),
    "01_stage_ratio_width_84": Step({"depths": (3, 3, 27, 3), "width": 84}, 14.52, 81.33, 83.07),
    "02_patchify_stem": Step({"patchify": True}, 14.38, 81.59, 83.06),
    "03_depthwise": Step({"depthwise": True}, 7.23, 80.54, 42.59),
    "04_width_128": Step({"width": 128}, 16.76, 81.85, 96.53),
    "05_inverted_bottleneck": Step({"inverted": True}, 15.68, 82.64, 83.70),
    "06_depthwise_first": Step({"depthwise_first": True}, 14.63, 82.04, 83.09),
    "07_kernel_5": Step({"kernel": 5}, 14.70, 82.32),
    "08_kernel_7": Step({"kernel": 7}, 14.81, 82.30, 83.78),
    "09_kernel_9": Step({"kernel": 9}, 14.95, 82.27),
    "10_kernel_11": Step({"kernel": 11}, 15.13, 82.18),
    "11_gelu": Step({"kernel": 7, "activation": nn.GELU}, 14.81, 82.19),
    "12_fewer_activations": Step({"fewer_activations": True}, 14.81, 82.71),
    "13_fewer_norms": Step({"fewer_norms": True}, 14.81, 83.17),
    "14_layer_norm": Step({"layer_norm": True}, 14.81, 83.35, 83.71),
    "15_downsampling": Step({"downsampling": True}, 15.35, 83.60, 88.59),
}


def designs(regime: dict[str, Step]) -> list[Design]:
    """The switches after each step."""
    design, found = Design(), []
    for step in regime.values():
        design = replace(design, **step.changes)
        found.append(design)
    return found


class Block(nn.Module):
    """(N, before, H, W) -> (N, after, H / stride, W / stride): the sum of shortcut and branch."""

    def __init__(
        self,
        design: Design,
        before: int,
        width: int,
        stride: int,
        drop_path: float,
        layer_scale: float | None,
    ):
        super().__init__()
        after = design.outputs(width)
        # Channels before and after each convolution, and the index of the spatial convolution.
        if not design.inverted:
            channels, spatial = (before, width, width, after), 1
        elif not design.depthwise_first:
            channels, spatial = (before, 4 * width, 4 * width, after), 1
        else:
            channels, spatial = (before, before, 4 * width, after), 0
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise(channels)):
            if index == spatial:
                groups = inputs if design.depthwise else 1
                layers.append(
                    nn.Conv2d(
                        inputs,
                        outputs,
                        design.kernel,
                        stride,
                        design.kernel // 2,
                        groups=groups,
                        bias=design.layer_norm,
                    )
                )
            else:
                layers.append(nn.Conv2d(inputs, outputs, 1, bias=design.layer_norm))
            if index == 0 or not design.fewer_norms:
                layers.append(design.norm(outputs))
            if index == 1 or (index == 0 and not design.fewer_activations):
                layers.append(design.activation())
        self.branch = nn.Sequential(*layers)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((after,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), design.norm(after))
        self.activation = nn.Identity() if design.fewer_activations else design.activation()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        if self.gamma is not None:
            branch = branch * self.gamma.view(-1, 1, 1)
        return self.activation(self.shortcut(x) + self.drop_path(branch))


class Roadmap(nn.Module):
    """(N, 3, H, W) -> logits (N, classes). `layer_scale` None means no layer scale."""

    def __init__(self, design: Design, classes: int, drop_path: float, layer_scale: float | None):
        super().__init__()
        total = sum(design.depths)
        rates = iter([drop_path * block / (total - 1) for block in range(total)])
        channels = design.width
        if design.patchify:
            stem: list[nn.Module] = [nn.Conv2d(3, channels, kernel_size=4, stride=4)]
            if design.downsampling:
                stem.append(design.norm(channels))
        else:
            stem = [
                nn.Conv2d(3, channels, 7, 2, 3, bias=False),
                design.norm(channels),
                design.activation(),
                nn.MaxPool2d(3, 2, 1),
            ]
        self.stem = nn.Sequential(*stem)
        self.stages = nn.ModuleList()
        for index, depth in enumerate(design.depths):
            width, stride = design.width * 2**index, 1 if index == 0 else 2
            stage = nn.ModuleDict({"downsample": nn.Identity()})
            if design.downsampling and stride == 2:
                stage["downsample"] = nn.Sequential(
                    design.norm(channels), nn.Conv2d(channels, width, kernel_size=2, stride=2)
                )
                channels, stride = width, 1
            blocks = []
            for block in range(depth):
                blocks.append(
                    Block(design, channels, width, stride if block == 0 else 1, next(rates), layer_scale)
                )
                channels = design.outputs(width)
            stage["blocks"] = nn.Sequential(*blocks)
            self.stages.append(stage)
        self.norm = nn.LayerNorm(channels, eps=1e-6) if design.downsampling else nn.Identity()
        self.head = nn.Linear(channels, classes)
        self.recompute = False

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage["downsample"](x)  # type: ignore[index]
            for block in stage["blocks"]:  # type: ignore[index]
                x = (
                    checkpoint(block, x, use_reentrant=False)
                    if self.recompute and torch.is_grad_enabled()
                    else block(x)
                )
        return self.head(self.norm(x.mean((2, 3))))

    # The methods below have the names of timm's models, so that other code can treat this model like timm's.

    def get_classifier(self) -> nn.Linear:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.recompute = enable
