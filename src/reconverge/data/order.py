"""The order of images: a pure function from (seed, epoch, position) to sample ids.

Only the needed positions are computed, so start, resume and memory do not grow with the number of images.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from reconverge.base import chance
from reconverge.config.settings import Train
from reconverge.data.shards import Shards
from reconverge.data.sources import Source
from reconverge.distributed.ranks import block

VERSION = (
    "order-1"  # recorded in every run; a change of this file that changes a golden hash needs a new name
)
ROUNDS = 8


class Microbatch(NamedTuple):
    epoch: int
    ids: np.ndarray  # int64 (N,)
    repeats: np.ndarray  # int64 (N,): number of the augmentation of this sample in this epoch, from 0
    window: int = 0  # window of the first sample
    place: tuple[int, int] = (0, 0)  # step, number in the step; both from 0


def in_sequence(images: int, batch: int) -> list[Microbatch]:
    """Every sample id once, in increasing order, for evaluation."""
    ids = [np.arange(first, min(first + batch, images)) for first in range(0, images, batch)]
    return [Microbatch(0, part, np.zeros_like(part)) for part in ids]


class Windows:
    """Shuffles in windows of `width` shards: each epoch shuffles the order of the shards, and then the images
    inside each window.

    Sample ids are numbered shard after shard. `images`: number of images in each shard.
    """

    def __init__(self, images: np.ndarray, width: int, seed: int):
        self._images, self.width, self._seed = images, width, seed
        self._first_id = np.cumsum(images) - images
        self._epoch = lru_cache(maxsize=2)(self._laid_out)

    @property
    def count(self) -> int:
        """Number of windows in an epoch."""
        return -(-len(self._images) // self.width)

    def shards(self, epoch: int, window: int) -> np.ndarray:
        """The shards of one window."""
        return self._epoch(epoch)[0][window * self.width : (window + 1) * self.width]

    def window(self, epoch: int, position: int) -> int:
        return int(np.searchsorted(self._epoch(epoch)[2], position, side="right"))

    def ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64) at positions of an epoch. Each id occurs once in an epoch."""
        shards, first, ends = self._epoch(epoch)
        windows, ids = np.searchsorted(ends, positions, side="right"), np.empty(len(positions), np.int64)
        for window in np.unique(windows):
            began = ends[window - 1] if window else 0
            mine = windows == window
            shuffled = began + permuted(
                positions[mine] - began,
                int(ends[window] - began),
                self._seed,
                VERSION,
                epoch,
                "window",
                int(window),
            )
            place = np.searchsorted(first, shuffled, side="right") - 1
            ids[mine] = self._first_id[shards[place]] + shuffled - first[place]
        return ids

    def _laid_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shards in the order of the epoch, the first position of each shard, and the position after the
        end of each window.
        """
        shards = permuted(
            np.arange(len(self._images)), len(self._images), self._seed, VERSION, epoch, "shards"
        )
        after = np.cumsum(self._images[shards])
        last = np.minimum(np.arange(1, self.count + 1) * self.width, len(shards)) - 1  # shard of each window
        return shards, after - self._images[shards], after[last]


class Order:
    """The images of each training microbatch. An epoch has images // batch steps and uses each (sample,
    repeat) at most once.

    `repeats`: how often an epoch uses each chosen sample, but never twice in one microbatch. `windows`: None
    shuffles all images together. `overfit`: every step uses the images of step 0.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        microbatch: int,
        seed: int,
        overfit: bool = False,
        repeats: int = 1,
        windows: Windows | None = None,
    ):
        self.images, self.batch, self.seed, self.overfit, self.repeats, self.windows = (
            images,
            batch,
            seed,
            overfit,
            repeats,
            windows,
        )
        self.microbatches = batch // microbatch

    @classmethod
    def of(cls, cfg: Train, source: Source) -> "Order":
        """The order of the training images of a run."""
        windows = (
            Windows(source.images_of, int(cfg.data.window), cfg.seed)
            if isinstance(source, Shards) and cfg.data.window != "all"
            else None
        )
        return cls(
            len(source), cfg.batch, cfg.microbatch, cfg.seed, cfg.debug.overfit, cfg.augment.repeats, windows
        )

    def microbatch(self, step: int, number: int) -> Microbatch:
        """Microbatch `number` of `step`, both counted from 0. Neighbouring positions are in different
        microbatches, and so are the repeats of a sample.
        """
        epoch, first = divmod(0 if self.overfit else step, self.images // self.batch)
        positions = first * self.batch + np.arange(number, self.batch, self.microbatches)
        chosen, repeats = np.divmod(positions, self.repeats)
        place = (step, number)
        if self.windows:
            ids, window = self.windows.ids(epoch, chosen), self.windows.window(epoch, int(chosen[0]))
            return Microbatch(epoch, ids, repeats, window, place)
        ids = permuted(chosen, self.images, self.seed, VERSION, epoch)
        return Microbatch(epoch, ids, repeats, place=place)

    def steps(self, start: int, end: int, rank: int = 0, ranks: int = 1) -> Iterator[Microbatch]:
        """The microbatches of one rank in steps start..end-1: a contiguous block of each step, in order."""
        mine = block(self.microbatches, rank, ranks, tree=False)
        return (self.microbatch(step, number) for step in range(start, end) for number in mine)

    def step_ids(self, step: int) -> list[int]:
        """All sample ids of one step."""
        return [int(sample) for microbatch in self.steps(step, step + 1) for sample in microbatch.ids]


def permuted(positions: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """The permutation of 0..size-1 that belongs to `key`, at `positions`: int64 of the same shape.

    A Feistel network on two halves of k bits permutes 0..2^(2k)-1, with the smallest 2^(2k) >= size. A result
    of `size` or more is permuted again until it is below `size` (cycle walking; Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(chance.key(*key, round)) for round in range(ROUNDS)]
    numbers = _permute(np.asarray(positions).astype(np.uint64), half, keys)
    while (outside := numbers >= size).any():
        numbers[outside] = _permute(numbers[outside], half, keys)
    return numbers.astype(np.int64)


def _permute(values: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix64(right + key) & mask)
    return (left << shift) | right


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): all input bits change each output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
