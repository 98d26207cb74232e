"""Pictures of label maps: image, truth and prediction beside each other, in colours with a legend."""

import colorsys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from reconverge.base.files import anew
from reconverge.config.settings import Data
from reconverge.data import image as images
from reconverge.data.maps import IGNORED
from reconverge.report.pictures import file_name, short
from reconverge.training.evaluate_maps import Result

# Okabe's and Ito's colours, which colour-blind people tell apart, without black; other hues follow.
FIRST = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
UNLABELLED = (222, 222, 222)  # of ignored pixels
CELL, GAP, LINE = 160, 6, 15  # pixels: longer side of an image, space around it, height of its caption
ROW = 2  # samples in a row of the picture
BATCH = 8  # images of first_batch.png
LEGEND = 24  # classes with a name in the legend, at most


class Shown(NamedTuple):
    """One image of the picture."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    predicted: np.ndarray  # integers (H, W): classes
    labels: np.ndarray | None  # the same, and IGNORED; None for an image without a label map
    caption: str


def colours(classes: int) -> np.ndarray:
    """uint8 (256, 3): the colour of each class, and UNLABELLED for IGNORED. A class has the same colour in
    every picture.
    """
    table = np.full((256, 3), UNLABELLED, np.uint8)
    for label in range(classes):
        if label < len(FIRST):
            red, green, blue = (int(FIRST[label][place : place + 2], 16) / 255 for place in (1, 3, 5))
        else:  # by the golden ratio, neighbours have hues that are far from each other
            later = label - len(FIRST)
            red, green, blue = colorsys.hsv_to_rgb(
                later * 0.618034 % 1, (0.85, 0.5)[later % 2], (0.9, 0.6)[later // 2 % 2]
            )
        table[label] = [round(255 * level) for level in (red, green, blue)]
    return table


def painted(labels: np.ndarray, classes: int) -> np.ndarray:
    """uint8 (H, W, 3) of labels (H, W)."""
    return colours(classes)[labels.astype(np.uint8)]


def first_batch(folder: Path, batch: Tensor, maps: Tensor, classes: Sequence[str], data: Data) -> None:
    """first_batch.png: up to 8 images of the first microbatch as the model sees them, with their label maps.
    `batch`: normalised (N, 3, H, W). `maps` (N, H, W): classes, and IGNORED.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    pixels = ((batch[:BATCH].float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    several = [
        Shown(one.permute(1, 2, 0).numpy(), labels, None, f"image {number}")
        for number, (one, labels) in enumerate(zip(pixels, maps[:BATCH].cpu().numpy(), strict=True), 1)
    ]
    title = f"{short(folder.name, 60)}: first microbatch after augmentation, as the model sees it"
    beside(folder / "first_batch.png", several, classes, title, "image, label map")


def predictions(folder: Path, validation: Any, results: dict[str, Result]) -> None:
    """predictions.png: validation images that are spread over the set, truth, and predictions of the better
    weights.
    """
    weights, result = max(results.items(), key=lambda item: item[1].miou)
    several = []
    for sample, predicted in result.shown.items():
        both, _, of_label = result.areas[np.searchsorted(result.ids, sample)]
        right = 100 * both.sum() / max(1, of_label.sum())
        caption = f"{file_name(validation.where(sample))}: {right:.1f} % of the pixels are right"
        pixels = np.asarray(images.rgb(images.opened(validation.read(sample))))
        several.append(Shown(pixels, predicted, validation.target(sample), caption))
    kind = "EMA" if weights == "ema" else weights
    title = (
        f"{short(folder.name, 60)}: predictions of the {kind} weights, mIoU {result.miou:.2f} % of"
        f" {result.images} validation images"
    )
    beside(folder / "predictions.png", several, validation.classes, title)


def beside(path: Path, several: Sequence[Shown], classes: Sequence[str], title: str, kinds: str = "") -> None:
    """Image, truth and prediction of each sample beside each other. The prediction has black stripes
    where the label map has another class. The legend names the classes that occur, the largest first, and
    says how many it leaves out. `kinds`: what stands beside each other, in words.
    """
    columns = 3 if any(one.labels is not None for one in several) else 2
    wide = columns * (CELL + GAP) + 3 * GAP  # of a sample
    heights = [round(CELL * one.pixels.shape[0] / max(one.pixels.shape[:2])) for one in several]
    tops = [0]  # of the rows, and the end of the last one
    for first in range(0, len(several), ROW):
        tops.append(tops[-1] + max(heights[first : first + ROW]) + LINE + 2 * GAP)
    width, height = max(min(ROW, len(several)) * wide, 640), tops[-1]
    canvas = np.full((height, width, 3), 255, np.uint8)
    occurring, across = _most(several, len(classes)), width // 160
    named = occurring[:LEGEND]
    head, legend = 20 + 17 * (2 + title.count("\n")), 20 + 18 * -(-(len(named) + 2) // across)
    whole = height + head + legend
    figure = Figure(figsize=(width / 100, whole / 100), dpi=100)
    axes = figure.add_axes((0, legend / whole, 1, height / whole))
    axes.axis("off")
    for number, one in enumerate(several):
        top, left = tops[number // ROW] + LINE + GAP, number % ROW * wide + GAP
        axes.text(left, top - 4, short(one.caption, 60), fontsize=8, va="bottom", parse_math=False)
        for place, part in enumerate(_parts(one, len(classes), columns)):
            cell = _fitted(part, Image.Resampling.BILINEAR if place == 0 else Image.Resampling.NEAREST)
            x = left + place * (CELL + GAP)
            canvas[top : top + cell.shape[0], x : x + cell.shape[1]] = cell
    axes.imshow(canvas, interpolation="nearest")
    table = colours(len(classes))
    patches = [Patch(color=table[label] / 255.0, label=short(classes[label], 18)) for label in named]
    if columns == 3:
        patches.append(Patch(color=table[IGNORED] / 255.0, label="ignored"))
    if more := len(occurring) - len(named):
        patches.append(Patch(alpha=0, label=f"and {more} more"))
    figure.legend(handles=patches, loc="lower center", ncols=across, frameon=False, fontsize=8)
    if not kinds:
        kinds = (
            "image, truth, prediction (striped where it is wrong)" if columns == 3 else "image, prediction"
        )
    figure.text(
        0.5, 1 - 8 / whole, f"{title}\nfrom left to right: {kinds}", ha="center", va="top", parse_math=False
    )
    with warnings.catch_warnings():
        # Class names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        with anew(path) as draft:
            figure.savefig(draft)


def _most(several: Sequence[Shown], classes: int) -> list[int]:
    """The classes that occur, those with most pixels first."""
    counts = np.zeros(256, np.int64)
    for one in several:
        for labels in (one.predicted, one.labels):
            if labels is not None:
                counts += np.bincount(labels.astype(np.uint8).ravel(), minlength=256)
    return sorted(np.flatnonzero(counts[:classes]).tolist(), key=lambda label: -counts[label])


def _parts(one: Shown, classes: int, columns: int) -> list[np.ndarray]:
    """Image, truth and prediction in colours, or image and prediction."""
    if columns == 2 or one.labels is None:
        return [one.pixels, painted(one.predicted, classes)]
    predicted = _fitted(painted(one.predicted, classes), Image.Resampling.NEAREST)
    wrong = ((one.predicted != one.labels) & (one.labels != IGNORED)).astype(np.uint8) * 255
    y, x = np.mgrid[: predicted.shape[0], : predicted.shape[1]]
    predicted[(_fitted(wrong, Image.Resampling.NEAREST) > 0) & ((x + y) % 5 == 0)] = 0
    return [one.pixels, painted(one.labels, classes), predicted]


def _fitted(pixels: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    """Enlarged or reduced until the longer side has CELL pixels."""
    height, width = pixels.shape[:2]
    factor = CELL / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.array(Image.fromarray(pixels).resize(size, resampling))
