"""Builds segmenters; and the published ones: UPerNet on ADE20K (Tables 4 and 7), and their cost."""

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from reconverge.base import chance
from reconverge.config import settings
from reconverge.models import create, initial
from reconverge.models.resample import Pool, Resize
from reconverge.models.upernet import UPerNet

CLASSES = 150  # of ADE20K


def build(given: settings.Model, classes: int, seed: int, channels: int = 512) -> UPerNet:
    """UPerNet with the model of these settings as its backbone, like create.model. Errors: Stop(USAGE).

    `channels`: width of its decoder. The backbone has the initial weights that it has as a classifier.
    """
    body = create.model(given, 1, seed)
    with chance.scope(seed, "init", "heads"):  # constructors draw weights, which are then replaced
        net = UPerNet(body, given.name, classes, channels)
    initial.segmentation_heads(net, seed)
    return net


def on_meta(given: settings.Model, classes: int, channels: int = 512) -> UPerNet:
    """The same model on the meta device. Errors: Stop(USAGE)."""
    body = create.on_meta(given, 1)
    with torch.device("meta"):
        return UPerNet(body, given.name, classes, channels)


class Paper(NamedTuple):
    """A row of Table 4. mIoU in percent on ADE20K's validation images; None where nothing is published."""

    backbone: str  # name in the table of models
    pretrained: str  # in1k or in22k
    crop: int  # pixels, side of the training images
    parameters: float  # millions, with the auxiliary head
    macs: float  # billions, without the auxiliary head, for one image of crop x (4 crop) pixels
    multi_scale: float
    single_scale: float | None  # Table 7
    mmseg_multi_scale: float | None  # OpenMMLab's own training with these settings
    mmseg_single_scale: float | None


def published() -> list[Paper]:
    """The rows of Table 4, in its order."""
    with open(Path(__file__).with_name("published_segmentation.csv")) as file:
        rows = list(csv.reader(file))[1:]
    return [
        Paper._make([*row[:2], int(row[2]), *(float(text) if text else None for text in row[3:])])
        for row in rows
    ]


def count(backbone: settings.Model, crop: int) -> tuple[float, float]:
    """Millions of parameters, and billions of multiply-adds for one image of `crop` x (4 `crop`) pixels, of
    UPerNet with this backbone and 150 classes.

    Multiply-adds are those of convolutions, linear layers and attention, without the auxiliary head, which
    only training uses. Pooling and resizing are not counted, although they are matrix products here.
    """
    net = on_meta(backbone, CLASSES).eval()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, crop, 4 * crop))
    flops = {module: sum(kinds.values()) for module, kinds in counter.get_flop_counts().items()}
    resampling = sum(
        flops.get(f"UPerNet.{name}", 0)
        for name, module in net.named_modules()
        if isinstance(module, Pool | Resize)
    )
    total = flops["Global"] - resampling
    return sum(parameter.numel() for parameter in net.parameters()) / 1e6, total / 2e9
