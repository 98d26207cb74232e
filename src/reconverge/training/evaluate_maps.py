"""mIoU of segmenters: of whole images, windows, several sizes and mirror images. Each image counts exactly
once, for any number of ranks, and one is looked at after the other, so images of any size fit into memory.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reconverge.base.errors import Exit, Stop
from reconverge.base.signals import told_to_stop
from reconverge.config import settings
from reconverge.data import map_transforms
from reconverge.data.loader import Batch, Images
from reconverge.data.maps import IGNORED
from reconverge.data.mix import Normalise
from reconverge.data.sources import Source
from reconverge.distributed.world import World
from reconverge.models import head
from reconverge.models.resample import Resize
from reconverge.training import rows, views
from reconverge.training.areas import areas, confusion, scores

BLANK = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), IGNORED, np.uint8)  # instead of a damaged image
SHOWN = 12  # images whose predictions are kept, spread over the set


class Result(NamedTuple):
    miou: float  # percent, as in areas.Scores
    pixel_accuracy: float  # percent
    mean_accuracy: float  # percent
    loss: float  # cross-entropy, mean over the labelled pixels of all images
    images: int
    areas: np.ndarray  # int64 (images, 3, classes): areas.areas of each image
    confusion: np.ndarray  # int64 (classes, classes): pixels by label (row) and prediction (column)
    losses: np.ndarray  # float64 (images,): cross-entropy, mean over the labelled pixels; 0 without any
    shown: dict[int, np.ndarray]  # sample id -> uint8 (H, W): predicted classes, of some images
    ids: np.ndarray  # int64 (images,), the sample ids, without those of damaged images
    left_out: list[str]  # damaged images, which do not count


class Evaluator(NamedTuple):
    """Evaluates segmenters on every image of a source with label maps."""

    settings: settings.Segment
    normalise: Normalise
    world: World
    workers: int
    on_bad_image: str = "stop"  # substitute: leave damaged images out
    stop: Callable[[], bool] = told_to_stop  # whether this rank should stop before the end

    def __call__(self, models: dict[str, nn.Module], source: Source) -> dict[str, Result] | None:
        """The result of each model (in evaluation mode), by name; None if a rank was stopped before the end.

        Errors: Stop(NOT_FINITE, DAMAGED).
        """
        classes, world = len(source.classes), self.world
        confusions = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in models}
        wanted = set(np.linspace(0, len(source) - 1, min(SHOWN, len(source))).astype(int).tolist())
        shown: dict[str, dict[int, np.ndarray]] = {name: {} for name in models}

        def look(batch: Batch, ids: np.ndarray) -> Tensor:
            (sample,), (labels,), found = ids.tolist(), batch.targets, list[Tensor]()
            for name, model in models.items():
                chances = self.probabilities(model, batch.images)
                predicted = chances.argmax(1)
                confusions[name] += confusion(predicted, labels, classes)
                if sample in wanted:
                    shown[name][sample] = predicted[0].byte().cpu().numpy()
                counted = areas(predicted, labels, classes).flatten(1)
                found += [counted.double(), _loss(chances, labels).cpu().view(1, 1)]
            return torch.cat(found, 1)

        images = Images(source, map_transforms.mapped(map_transforms.whole), 0, self.on_bad_image, BLANK)
        tables = rows.tables(images, 1, look, 3 * classes + 1, models, world, self.workers, self.stop)
        if tables is None:
            return None
        left_out = [bad.reason for bad in tables.left_out]
        results = {}
        for name, table in tables.of.items():
            everywhere = {key: one for some in world.gather_objects(shown[name]) for key, one in some.items()}
            kept = {key: everywhere[key] for key in sorted(everywhere.keys() & set(tables.ids.tolist()))}
            total = world.total(confusions[name]).numpy()
            results[name] = _result(table.numpy(), total, kept, tables.ids, left_out)
            _refuse(name, results[name], source)
        return results

    @torch.no_grad()
    def probabilities(self, model: nn.Module, images: Tensor) -> Tensor:
        """The probability of each class, (1, classes, H, W), of one image uint8 (1, 3, H, W) on a device."""
        longest, shortest = self.settings.resize
        size = (images.shape[2], images.shape[3])
        sizes = views.sides(size, longest, shortest, self.settings.scales)
        whole = partial(self._logits, model)

        def logits(pixels: Tensor) -> Tensor:
            window, stride = self.settings.window, self.settings.stride
            return views.sliding(whole, pixels, window, stride) if window else whole(pixels)

        seen = (self.normalise(map_transforms.resized_planes(images, side)) for side in sizes)
        return views.averaged(logits, seen, size, self.settings.flip)

    def _logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        with self.world.autocast(), head.in_float32(model):
            coarse = model(pixels)
        return Resize()(coarse.float(), (pixels.shape[2], pixels.shape[3]))


def _loss(chances: Tensor, labels: Tensor) -> Tensor:
    """The sum over labelled pixels of -log of the probability of the label: float64 ()."""
    right = chances.gather(1, labels.long().clamp(max=chances.shape[1] - 1)[:, None])[:, 0]
    return (-right.double().log() * (labels != IGNORED)).sum()


def _result(
    table: np.ndarray,
    confusions: np.ndarray,
    shown: dict[int, np.ndarray],
    ids: np.ndarray,
    left_out: list[str],
) -> Result:
    of_images = table[:, :-1].astype(np.int64).reshape(len(table), 3, -1)
    found, labelled = scores(of_images.sum(0)), of_images[:, 2].sum(1)
    return Result(
        found.miou,
        found.pixels,
        found.mean_accuracy,
        float(table[:, -1].sum() / max(1, labelled.sum())),
        len(table),
        of_images,
        confusions,
        table[:, -1] / labelled.clip(1),
        shown,
        ids,
        left_out,
    )


def _refuse(name: str, result: Result, source: Source) -> None:
    """Errors: Stop(NOT_FINITE), Stop(DAMAGED) if nothing could be evaluated."""
    if not len(result.ids):
        raise Stop(
            Exit.DAMAGED,
            f"all {len(source)} images are damaged; the first is {result.left_out[0]}",
            "images that Pillow can decode completely",
            "correct data.root=, or repair the images",
        )
    if not result.areas[:, 2].any():
        raise Stop(
            Exit.DAMAGED,
            f"no pixel of the label maps of {len(result.ids)} validation images has a class",
            "label maps with pixels of the classes of the training images",
            "correct the maps, or data.ignore=",
        )
    if not math.isfinite(result.loss):
        raise Stop(
            Exit.NOT_FINITE,
            f"the evaluation of the {name} weights has the loss {result.loss}",
            "a finite loss, because otherwise the mIoU has no meaning",
            "precision=fp32 or precision=bf16; if that does not help, the weights are broken",
        )
