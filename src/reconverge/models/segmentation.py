"""The published segmenters: UPerNet on ADE20K (Tables 4 and 7), and how their cost is counted."""

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from reconverge.config import settings
from reconverge.models import create
from reconverge.models.resample import Pool, Resize

CLASSES = 150  # of ADE20K


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
    net = create.segmenter_on_meta(backbone, CLASSES).eval()
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
