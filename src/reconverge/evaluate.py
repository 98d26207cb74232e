"""Exact top-1, top-5 and loss, each image counted once."""

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
    images: int
    predicted: np.ndarray  # int64 (images,), class of each sample in order


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

    None if `stop` says so before the end. Errors: Stop(NOT_FINITE).
    """
    from torchmetrics import MetricCollection  # a second or two to import: not at start
    from torchmetrics.classification import MulticlassAccuracy

    images, classes = len(source), len(source.classes)
    batches = Feed(
        Images(source, transforms.evaluation(settings), 0), in_sequence(images, settings.batch), workers, world.device, ahead=True
    )

    def metrics() -> MetricCollection:
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(classes, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro", validate_args=False),
            }
        ).to(world.device)

    accuracy = {name: metrics() for name in models}
    losses = {name: torch.zeros((), dtype=torch.float64, device=world.device) for name in models}
    predicted: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    for batch in batches:
        if stop():
            return None
        pixels = normalise(batch.images)
        for name, model in models.items():
            with world.autocast():
                logits = model(pixels)
            logits = logits.float()
            accuracy[name].update(logits, batch.labels)
            losses[name] += nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            predicted[name].append(logits.argmax(1))
    results = {}
    for name in models:
        classes_of = torch.cat(predicted[name]).cpu().numpy()
        assert len(classes_of) == images, f"{len(classes_of)} of {images} images were evaluated"
        # From the counts: a float32 share of 50,000 would print its own rounding.
        top1, top5 = (100 * round(float(accuracy[name].compute()[key]) * images) / images for key in ("top1", "top5"))
        loss = float(losses[name]) / images
        if not math.isfinite(loss):
            raise Stop(
                Exit.NOT_FINITE,
                f"evaluating the {name} weights gives a loss of {loss}",
                "finite numbers: an accuracy from others would mean nothing",
                "precision=fp32 or bf16, or look at the weights",
            )
        results[name] = Result(top1, top5, loss, images, classes_of)
    return results
