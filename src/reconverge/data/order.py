"""The order of a data set: a pure function from (seed, epoch, position) to sample ids.

It is evaluated only where it is asked: opening, seeking and memory do not grow with the number of images.
"""

from collections.abc import Iterator

import numpy as np

from reconverge import chance

VERSION = "order-1"  # recorded in every run; a change of this file that moves a golden hash needs a new name
ROUNDS = 8


class Order:
    """Which images each microbatch of training takes. `overfit`: every step takes those of step 0."""

    def __init__(self, images: int, batch: int, microbatch: int, seed: int, overfit: bool = False):
        self.images, self.batch, self.microbatch, self.seed, self.overfit = images, batch, microbatch, seed, overfit

    def ids(self, step: int, microbatch: int) -> tuple[int, np.ndarray]:
        """Epoch, and sample ids (int64) of one microbatch of a step."""
        steps_per_epoch = self.images // self.batch
        epoch, step_of_epoch = divmod(0 if self.overfit else step, steps_per_epoch)
        first = step_of_epoch * self.batch + microbatch * self.microbatch
        return epoch, sample_ids(np.arange(first, first + self.microbatch), self.images, self.seed, epoch)

    def steps(self, start: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, sample ids) of every microbatch of steps start..end-1, in turn."""
        for step in range(start, end):
            for microbatch in range(self.batch // self.microbatch):
                yield self.ids(step, microbatch)

    def step_ids(self, step: int) -> list[int]:
        """All sample ids of one step."""
        return [int(sample) for _, ids in self.steps(step, step + 1) for sample in ids]


def sample_ids(positions: np.ndarray, images: int, seed: int, epoch: int) -> np.ndarray:
    """Sample ids, int64 of the shape of `positions`, at positions 0..images-1 of an epoch: each id once an epoch.

    A keyed bijection of the smallest 2^(2k) >= images (a Feistel network on two halves of k bits), walked along its
    cycle until it falls below `images` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, (max(images - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(chance.key(seed, VERSION, epoch, round)) for round in range(ROUNDS)]
    ids = _permute(np.asarray(positions).astype(np.uint64), half, keys)
    while (outside := ids >= images).any():
        ids[outside] = _permute(ids[outside], half, keys)
    return ids.astype(np.int64)


def _permute(values: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix64(right + key) & mask)
    return (left << shift) | right


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every bit of the output hangs on every bit of the input."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
