"""mIoU from areas: how many pixels of each image have each class in prediction, label map and both.

The areas are whole numbers, so their sum over the images is exact in any order and on any number of ranks.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reconverge.data.maps import IGNORED


class Scores(NamedTuple):
    """All in percent, from areas that are summed over all images of a set, as mmsegmentation does."""

    miou: float  # mean of `iou` over the classes that occur in a label map or in a prediction
    pixels: float  # share of the labelled pixels that are predicted right
    mean_accuracy: float  # mean of `accuracy` over the classes that occur in a label map
    iou: np.ndarray  # float64 (classes,): intersection over union; NaN for a class that does not occur
    accuracy: np.ndarray  # float64 (classes,): share of the label's pixels that are predicted right; or NaN


def areas(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """int64 (N, 3, classes): pixels of each class in both, in the prediction, and in the label map.

    `predicted` (N, H, W): classes. `labels` (N, H, W): classes, and IGNORED for pixels that do not count. A
    row is exact as float64 too.
    """
    counted, label = labels != IGNORED, labels.long()
    maps = torch.stack([counted & (predicted == label), counted, counted], 1)
    values = torch.stack([predicted, predicted, label], 1).long()
    # One histogram for all: each image and each kind has its own `classes` places; the rest goes to the last.
    places = torch.arange(3 * len(labels), device=labels.device).view(-1, 3, 1, 1) * classes + values
    end = 3 * len(labels) * classes
    counts = torch.bincount(torch.where(maps, places, end).flatten().cpu(), minlength=end + 1)
    return counts[:end].view(-1, 3, classes)


def scores(total: np.ndarray) -> Scores:
    """The scores of areas (3, classes) that are summed over images. NaN where nothing occurs."""
    both, predicted, label = (row.astype(np.float64) for row in total)
    union = predicted + label - both
    iou, accuracy = (
        100 * np.divide(both, of, out=np.full(len(both), np.nan), where=of > 0) for of in (union, label)
    )
    share = 100 * both.sum() / label.sum() if label.sum() else np.nan
    return Scores(_mean(iou), float(share), _mean(accuracy), iou, accuracy)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """int64 (classes, classes): pixels by label (row) and prediction (column), without IGNORED ones."""
    counted = labels != IGNORED
    pairs = labels[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes)


def table(classes: list[str], found: Scores) -> list[str]:
    """Lines of text: IoU and accuracy of each class, in the order of the classes, and their means."""
    width = max(len("class"), *map(len, classes))
    lines = [f"{'class':{width}}  IoU, %  accuracy, %"]
    rows = [*zip(classes, found.iou, found.accuracy, strict=True), ("mean", found.miou, found.mean_accuracy)]
    for name, iou, accuracy in rows:
        shown = ("" if np.isnan(value) else f"{value:.2f}" for value in (iou, accuracy))
        lines.append(f"{name:{width}}  {next(shown):>6}  {next(shown):>11}")
    return [line.rstrip() for line in lines]
