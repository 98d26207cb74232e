"""Exact top-1, top-5, loss and calibration, each image counted once, on any number of ranks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from reconverge.data import transforms
from reconverge.data.loader import Feed, Images
from reconverge.data.mix import Normalise
from reconverge.data.order import in_sequence
from reconverge.data.sources import Source
from reconverge.errors import Exit, Stop
from reconverge.settings import Evaluate
from reconverge.world import World


class Result(NamedTuple):
    top1: float  # percent
    top5: float  # percent; of all classes where there are fewer than five
    loss: float  # cross-entropy without smoothing, mean over the images
    ece: float  # percent: expected calibration error of the most probable class, in 15 bins of probability
    images: int
    predicted: np.ndarray  # int64 (images,), class of each sample in order


class Outcomes:
    """What a model says of each image: one row a sample, whose ranks fill in their own, so that sums do not hang on who counted."""

    COLUMNS = ("evaluated", "predicted", "top1", "top5", "loss", "confidence")

    def __init__(self, images: int):
        self._rows = torch.zeros(images, len(self.COLUMNS), dtype=torch.float64)

    def note(self, ids: np.ndarray, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """`logits` float (N, classes) and `labels` (N,) of samples `ids`."""
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        columns = (torch.ones_like(labels), best[:, 0], hits[:, 0], hits.any(1), loss, logits.softmax(1).amax(1))
        self._rows[torch.from_numpy(ids)] = torch.stack([column.double() for column in columns], dim=1).cpu()

    def result(self, world: World) -> Result:
        from torchmetrics.functional.classification import binary_calibration_error  # seconds to import: not at start

        rows = world.gather(self._rows).sum(0)  # of each row all ranks but one have zeros
        evaluated, predicted, top1, top5, loss, confidence = rows.T.contiguous()
        assert (evaluated == 1).all(), f"{int(evaluated.sum())} of {len(rows)} images were evaluated"
        # Whether the most probable class is right is a question of two classes, asked with its probability.
        ece = binary_calibration_error(confidence, top1.int(), n_bins=15, validate_args=False)
        right, among_five = (100 * int(hits.sum()) / len(rows) for hits in (top1, top5))
        mean = float(np.sum(loss.numpy())) / len(rows)
        return Result(right, among_five, mean, 100 * float(ece), len(rows), predicted.numpy().astype(np.int64))


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    source: Source,
    settings: Evaluate,
    normalise: Normalise,
    world: World,
    workers: int,
    stop: Callable[[], bool],
) -> dict[str, Result] | None:
    """The result of each model (in evaluation mode), by name, on every image of `source`, read once.

    None if `stop` says so on any rank before the end. Errors: Stop(NOT_FINITE).
    """
    batches = in_sequence(len(source), settings.batch)
    mine = batches[world.rank :: world.size]
    feed = iter(Feed(Images(source, transforms.evaluation(settings), 0), mine, workers, world.device, ahead=True))
    outcomes = {name: Outcomes(len(source)) for name in models}
    world.broadcast(buffer for model in models.values() for buffer in model.buffers())  # BatchNorm's statistics are those of rank 0
    for number in range(-(-len(batches) // world.size)):  # of the last round, some ranks may have none
        if world.any(stop()):
            return None
        if number >= len(mine):
            continue
        batch = next(feed)
        pixels = normalise(batch.images)
        for name, model in models.items():
            with world.autocast():
                logits = model(pixels)
            outcomes[name].note(mine[number].ids, logits.float(), batch.labels)
    results = {name: outcome.result(world) for name, outcome in outcomes.items()}
    for name, result in results.items():
        if not math.isfinite(result.loss):
            raise Stop(
                Exit.NOT_FINITE,
                f"evaluating the {name} weights gives a loss of {result.loss}",
                "finite numbers: an accuracy from others would mean nothing",
                "precision=fp32 or bf16, or look at the weights",
            )
    return results
