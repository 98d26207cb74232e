"""Exact top-1, top-5, loss and calibration, each image counted once, on any number of ranks."""

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
from reconverge.data.loader import Feed, Images
from reconverge.data.mix import Normalise
from reconverge.data.order import in_sequence
from reconverge.data.sources import Source
from reconverge.distributed.world import World


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


class Evaluator(NamedTuple):
    """Looks at every image of a source, read once for all models, on every rank a share of them."""

    settings: Evaluate
    normalise: Normalise
    world: World
    workers: int
    stop: Callable[[], bool] = told_to_stop  # whether this rank is to leave off before the end

    def __call__(self, models: dict[str, nn.Module], source: Source) -> dict[str, Result] | None:
        """The result of each model (in evaluation mode), by name; None if any rank left off before the end.

        Errors: Stop(NOT_FINITE).
        """
        tables = self.table(_outcome, 5, models, source)
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

    @torch.no_grad()
    def table(
        self,
        columns: Callable[[Tensor, Tensor], list[Tensor]],
        width: int,
        models: dict[str, nn.Module],
        source: Source,
    ) -> dict[str, Tensor] | None:
        """Of each model a table, float64 (images, width): what `columns(logits (N, classes), labels (N,))`
        gives, `width` tensors (N,), for each image in order. None if any rank left off before the end.

        A rank fills in the rows of its own images, so that no number hangs on who looked at them.
        """
        world, images = self.world, len(source)
        batches = in_sequence(images, self.settings.batch)
        mine = batches[world.rank :: world.size]
        shown = Images(source, transforms.evaluation(self.settings), 0)
        feed = iter(Feed(shown, mine, self.workers, world.device, ahead=True))
        # The first column says whether an image was seen.
        tables = {name: torch.zeros(images, 1 + width, dtype=torch.float64) for name in models}
        # BatchNorm's statistics are those of rank 0.
        world.broadcast(buffer for model in models.values() for buffer in model.buffers())
        for number in range(-(-len(batches) // world.size)):  # of the last round, some ranks may have none
            if world.any(self.stop()):
                return None
            if number >= len(mine):
                continue
            batch = next(feed)
            pixels = self.normalise(batch.images)
            for name, model in models.items():
                with world.autocast():
                    logits = model(pixels)
                found = [column.double().cpu() for column in columns(logits.float(), batch.labels)]
                ids = torch.from_numpy(mine[number].ids)
                tables[name][ids] = torch.stack([torch.ones(len(logits)), *found], dim=1)
        # Of each row all ranks but one have zeros.
        gathered = {name: world.gather(table).sum(0) for name, table in tables.items()}
        for table in gathered.values():
            assert (table[:, 0] == 1).all(), f"{int(table[:, 0].sum())} of {len(table)} images were looked at"
        return {name: table[:, 1:] for name, table in gathered.items()}


def _outcome(logits: Tensor, labels: Tensor) -> list[Tensor]:
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == labels[:, None]
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return [best[:, 0], hits[:, 0], hits.any(1), losses, logits.softmax(1).amax(1)]


def _result(table: Tensor) -> Result:
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
    )


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Percent: how far the probability of the most probable class is from how often it is right, in 15 bins.

    `confidence`, `right`: (images,), the latter 1 or 0.
    """
    from torchmetrics.functional.classification import binary_calibration_error  # takes seconds

    # Whether the most probable class is right is a question of two classes, asked with its probability.
    return 100 * float(binary_calibration_error(confidence, right.int(), n_bins=15, validate_args=False))


def top5(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """For Evaluator.table: the five most probable classes of each image, then their probabilities; of fewer
    classes, all.
    """
    probabilities, classes = logits.softmax(1).topk(min(5, logits.shape[1]))
    return [*classes.T, *probabilities.T]
