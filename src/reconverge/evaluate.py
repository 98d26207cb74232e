"""Exact top-1, top-5, loss and calibration, each image counted once, on any number of ranks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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
    confidence: np.ndarray  # float64 (images,), the probability that the model gives it
    losses: np.ndarray  # float64 (images,), cross-entropy


class Among(nn.Module):
    """A classifier that answers among some of its classes: its logits (N, len(classes))."""

    def __init__(self, net: nn.Module, classes: list[int]):
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)[:, self.classes]


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
    tables = look(_outcome, 5, models, source, settings, normalise, world, workers, stop)
    if tables is None:
        return None
    results = {name: _result(table) for name, table in tables.items()}
    for name, result in results.items():
        if not math.isfinite(result.loss):
            raise Stop(
                Exit.NOT_FINITE,
                f"evaluating the {name} weights gives a loss of {result.loss}",
                "finite numbers: an accuracy from others would mean nothing",
                "precision=fp32 or bf16, or look at the weights",
            )
    return results


def _outcome(logits: Tensor, labels: Tensor) -> list[Tensor]:
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == labels[:, None]
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return [best[:, 0], hits[:, 0], hits.any(1), losses, logits.softmax(1).amax(1)]


def _result(table: Tensor) -> Result:
    from torchmetrics.functional.classification import (
        binary_calibration_error,
    )  # seconds to import: not at start

    predicted, top1, top5, losses, confidence = table.T.contiguous()
    # Whether the most probable class is right is a question of two classes, asked with its probability.
    ece = binary_calibration_error(confidence, top1.int(), n_bins=15, validate_args=False)
    right, among_five = (100 * int(hits.sum()) / len(table) for hits in (top1, top5))
    mean = float(np.sum(losses.numpy())) / len(table)
    predictions = predicted.numpy().astype(np.int64)
    return Result(
        right, among_five, mean, 100 * float(ece), len(table), predictions, confidence.numpy(), losses.numpy()
    )


def top5(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """For look(): the five most probable classes of each image, then their probabilities; of fewer classes,
    all.
    """
    probabilities, classes = logits.softmax(1).topk(min(5, logits.shape[1]))
    return [*classes.T, *probabilities.T]


@torch.no_grad()
def look(
    say: Callable[[Tensor, Tensor], list[Tensor]],
    width: int,
    models: dict[str, nn.Module],
    source: Source,
    settings: Evaluate,
    normalise: Normalise,
    world: World,
    workers: int,
    stop: Callable[[], bool],
) -> dict[str, Tensor] | None:
    """Of each model a table, float64 (images, width): what `say(logits (N, classes), labels (N,))` gives,
    `width` columns of N, for each image of `source` in order. A rank fills in the rows of its own images, so
    that no number hangs on who looked.

    None if `stop` says so on any rank before the end.
    """
    batches = in_sequence(len(source), settings.batch)
    mine = batches[world.rank :: world.size]
    feed = iter(
        Feed(Images(source, transforms.evaluation(settings), 0), mine, workers, world.device, ahead=True)
    )
    tables = {
        name: torch.zeros(len(source), 1 + width, dtype=torch.float64) for name in models
    }  # the first column: was it seen
    world.broadcast(
        buffer for model in models.values() for buffer in model.buffers()
    )  # BatchNorm's statistics are those of rank 0
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
            columns = say(logits.float(), batch.labels)
            rows = torch.stack(
                [torch.ones(len(logits)), *(column.double().cpu() for column in columns)], dim=1
            )
            tables[name][torch.from_numpy(mine[number].ids)] = rows
    gathered = {
        name: world.gather(table).sum(0) for name, table in tables.items()
    }  # of each row all ranks but one have zeros
    for table in gathered.values():
        assert (table[:, 0] == 1).all(), f"{int(table[:, 0].sum())} of {len(table)} images were looked at"
    return {name: table[:, 1:] for name, table in gathered.items()}
