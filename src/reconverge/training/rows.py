"""Looks at every image of a source exactly once, on any number of ranks: a row of numbers for each image."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reconverge.data.loader import Bad, Batch, Feed, Images
from reconverge.data.order import in_sequence
from reconverge.distributed.later import Later
from reconverge.distributed.world import World


class Tables(NamedTuple):
    of: dict[str, Tensor]  # by model, float64 (images, width), one row for each image that was evaluated
    ids: np.ndarray  # int64 (images,), their sample ids
    left_out: list[Bad]  # damaged images


@torch.no_grad()
def tables(
    images: Images,
    batch: int,
    look: Callable[[Batch, np.ndarray], Tensor],
    width: int,
    models: dict[str, nn.Module],
    world: World,
    workers: int,
    stop: Callable[[], bool],
) -> Tables | None:
    """A table for each model, with one row for each image in order, without damaged images if the blank of
    `images` allows that. None if `stop` says on any rank that it should stop before the end.

    `look` gets a batch of up to `batch` images and their sample ids, and returns their rows, float64 (N,
    models * width), first the columns of the first model. Each image is read once for all models. Each rank
    fills the rows of its own images, so the result does not depend on the ranks.
    """
    count = len(images.source)
    batches = in_sequence(count, batch)
    mine = batches[world.rank :: world.size]
    feed = Feed(images, mine, workers, world.device, ahead=True)
    arriving = iter(feed)
    # The first column is 1 for an image that was evaluated; then the columns of each model.
    table = torch.zeros(count, 1 + len(models) * width, dtype=torch.float64)
    coming: list[tuple[np.ndarray, Later]] = []  # ids and rows of a batch, read when the next one runs
    # Every rank uses the BatchNorm statistics of rank 0.
    world.broadcast(buffer for model in models.values() for buffer in model.buffers())
    for number in range(-(-len(batches) // world.size)):  # in the last round, some ranks have no batch
        if world.any(stop()):
            return None
        if number >= len(mine):
            continue
        ids = mine[number].ids
        coming.append((ids, Later(look(next(arriving), ids))))
        if len(coming) > 1:
            _fill(table, *coming.pop(0))
    for arrived in coming:
        _fill(table, *arrived)
    table = world.total(table)  # each row is filled on one rank and zero on all others
    assert (table[:, 0] == 1).all(), f"{int(table[:, 0].sum())} of {len(table)} images were evaluated"
    bad = sorted(feed.damaged(world))
    evaluated = np.setdiff1d(np.arange(count), [entry.sample for entry in bad])
    parts = table[torch.from_numpy(evaluated), 1:].split(width, 1)
    return Tables(dict(zip(models, parts, strict=True)), evaluated, bad)


def _fill(table: Tensor, ids: np.ndarray, rows: Later) -> None:
    found = rows.read()
    table[torch.from_numpy(ids)] = torch.cat([torch.ones(len(found), 1), found], 1)
