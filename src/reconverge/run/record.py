"""record.jsonl: a line a step, as exact as the numbers are.

Two runs that trained alike have the same lines (`reconverge verify`).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from reconverge.distributed.world import World


class Pending(NamedTuple):
    """A step as one rank knows it."""

    step: int
    losses: list[
        Tensor
    ]  # scalars, of this rank's forward passes in their order; those of all ranks add up to the step's
    grad_norm: Tensor  # scalar, of the whole gradient
    lr: float
    images: list[
        int
    ]  # of each of this rank's microbatches, a hash of its augmented images, labels and sample ids


class Step(NamedTuple):
    step: int
    loss: float
    grad_norm: float
    lr: float
    images: str  # hash of those of all microbatches, in their order


def gathered(world: World, pending: list[Pending]) -> list[Step]:
    """The steps from what all ranks know. Here the host waits for the device.

    Losses are added in the order of microbatches, on any number of ranks.
    """
    losses = world.gather(
        torch.stack([torch.stack(step.losses) for step in pending])
    )  # (ranks, steps, passes)
    losses = losses.double().permute(1, 0, 2).flatten(1)  # (ranks, steps, passes) -> (steps, passes of all)
    images = world.gather(torch.tensor([step.images for step in pending])).permute(1, 0, 2).flatten(1).numpy()
    return [
        Step(
            step.step,
            float(np.sum(losses[number].numpy())),
            float(step.grad_norm),
            step.lr,
            xxh3_64_hexdigest(images[number].tobytes()),
        )
        for number, step in enumerate(pending)
    ]
