"""Top-1, top-5, loss and calibration error. Each image counts exactly once, for any number of ranks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reconverge.base.errors import Exit, Stop
from reconverge.base.signals import told_to_stop
from reconverge.config.settings import Evaluate
from reconverge.data import transforms
from reconverge.data.loader import Batch, Images
from reconverge.data.mix import Normalise
from reconverge.data.sources import Source
from reconverge.distributed.world import World
from reconverge.models import head
from reconverge.training import rows
from reconverge.training.rows import Tables


class Result(NamedTuple):
    top1: float  # percent
    top5: float  # percent; with fewer than five classes, all of them count
    loss: float  # cross-entropy without smoothing, mean over the images
    ece: float  # percent: expected calibration error of the predicted class, in 15 bins of probability
    images: int
    predicted: np.ndarray  # int64 (images,), predicted class of each sample id
    confidence: np.ndarray  # float64 (images,), probability of the predicted class
    losses: np.ndarray  # float64 (images,), cross-entropy
    ids: np.ndarray  # int64 (images,), the sample ids, without those of damaged images
    left_out: list[str]  # damaged images, which do not count


class Among(nn.Module):
    """A classifier restricted to some of its classes: returns their logits (N, len(classes))."""

    def __init__(self, net: nn.Module, classes: list[int]):
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)[:, self.classes]


class Evaluator(NamedTuple):
    """Evaluates classifiers on every image of a source."""

    settings: Evaluate
    normalise: Normalise
    world: World
    workers: int
    on_bad_image: str = "stop"  # substitute: leave damaged images out
    stop: Callable[[], bool] = told_to_stop  # whether this rank should stop before the end

    def __call__(self, models: dict[str, nn.Module], source: Source) -> dict[str, Result] | None:
        """The result of each model (in evaluation mode), by name; None if a rank was stopped before the end.

        Errors: Stop(NOT_FINITE).
        """
        tables = self.table(_outcome, 5, models, source)
        if tables is None:
            return None
        if not len(tables.ids):
            raise Stop(
                Exit.DAMAGED,
                f"all {len(source)} images are damaged; the first is {tables.left_out[0].reason}",
                "images that Pillow can decode completely",
                "correct data.root=, or repair the images",
            )
        left_out = [bad.reason for bad in tables.left_out]
        results = {name: _result(table, tables.ids, left_out) for name, table in tables.of.items()}
        for name, result in results.items():
            if not math.isfinite(result.loss):
                raise Stop(
                    Exit.NOT_FINITE,
                    f"the evaluation of the {name} weights has the loss {result.loss}",
                    "a finite loss, because otherwise the accuracy has no meaning",
                    "precision=fp32 or precision=bf16; if that does not help, the weights are broken",
                )
        return results

    @torch.no_grad()
    def table(
        self,
        columns: Callable[[Tensor, Tensor], list[Tensor]],
        width: int,
        models: dict[str, nn.Module],
        source: Source,
    ) -> Tables | None:
        """A table for each model, with one row for each image in order, without damaged images if
        on_bad_image allows that. None if a rank was stopped before the end.

        A row has the values of `columns(logits (N, classes), labels (N,))`, which returns `width` tensors of
        shape (N,).
        """

        def look(batch: Batch, ids: np.ndarray) -> Tensor:
            pixels, found = self.normalise(batch.images), list[Tensor]()
            for model in models.values():
                with self.world.autocast(), head.in_float32(model):
                    logits = model(pixels)
                found += columns(logits.float(), *batch.targets)
            return torch.stack([column.double() for column in found], 1)

        blank = np.zeros((self.settings.size, self.settings.size, 3), np.uint8), np.array(0)
        load = transforms.labelled(transforms.evaluation(self.settings))
        images, batch = Images(source, load, 0, self.on_bad_image, blank), self.settings.batch
        return rows.tables(images, batch, look, width, models, self.world, self.workers, self.stop)


def _outcome(logits: Tensor, labels: Tensor) -> list[Tensor]:
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == labels[:, None]
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return [best[:, 0], hits[:, 0], hits.any(1), losses, logits.softmax(1).amax(1)]


def _result(table: Tensor, ids: np.ndarray, left_out: list[str]) -> Result:
    predicted, top1, top5, losses, confidence = table.T.contiguous()
    right, among_five = (100 * int(hits.sum()) / len(table) for hits in (top1, top5))
    return Result(
        right,
        among_five,
        float(np.sum(losses.numpy())) / len(table),
        calibration_error(confidence, top1),
        len(table),
        predicted.numpy().astype(np.int64),
        confidence.numpy(),
        losses.numpy(),
        ids,
        left_out,
    )


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error in percent, with 15 bins: the difference between confidence and accuracy.

    `confidence` (images,): probability of the predicted class. `right` (images,): 1 if it is right, else 0.
    """
    from torchmetrics.functional.classification import binary_calibration_error  # takes seconds

    # "Is the prediction right?" is a binary classification, and the confidence is its probability.
    return 100 * float(binary_calibration_error(confidence, right.int(), n_bins=15, validate_args=False))


def top5(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Columns for Evaluator.table: the five most probable classes of each image (all, if there are fewer),
    then their probabilities.
    """
    probabilities, classes = logits.softmax(1).topk(min(5, logits.shape[1]))
    return [*classes.T, *probabilities.T]
