"""record.jsonl: one line for each step, with all digits of its numbers.

Two runs that are equal bit for bit have the same lines; `reconverge verify` compares them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from reconverge.distributed.world import World


class Pending(NamedTuple):
    """The values of a step on one rank."""

    step: int
    # Scalars, one for each forward pass of this rank in order. The sum over all ranks is the step's loss.
    losses: list[Tensor]
    grad_norm: Tensor  # scalar, norm of the whole gradient
    lr: float
    # For each microbatch of this rank, a hash of its augmented images, labels and sample ids.
    images: list[int]


class Step(NamedTuple):
    step: int
    loss: float
    grad_norm: float
    lr: float
    images: str  # hash over the hashes of all microbatches, in order


def gathered(world: World, pending: list[Pending]) -> list[Step]:
    """Combine the values of all ranks. Here the host waits for the device.

    Losses are added in the order of microbatches, for any number of ranks.
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
