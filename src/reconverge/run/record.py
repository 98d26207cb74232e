"""record.jsonl: one line for each step, with all digits of its numbers.

Two runs that are equal bit for bit have the same lines; `reconverge verify` compares them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from reconverge.distributed.later import Later
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


def sent(pending: list[Pending]) -> Later:
    """Losses and norm of each step, float32 (steps, passes + 1), on their way to the host."""
    scalars = [value for step in pending for value in (*step.losses, step.grad_norm)]
    return Later(torch.stack(scalars).view(len(pending), -1))


def gathered(
    world: World, pending: list[Pending], numbers: Tensor, waited: float, news: bool
) -> tuple[list[Step], float, bool]:
    """Combine the values of all ranks: the steps, the longest `waited`, and whether any rank has `news`.

    `numbers`: what `sent` has brought to the host. Losses are added in the order of microbatches, for any
    number of ranks.
    """
    count = len(pending)
    floats = world.gather(torch.cat([numbers.double().flatten(), torch.tensor([waited]).double()]))
    whole = world.gather(torch.tensor([*(one for step in pending for one in step.images), news]))
    # (ranks, steps, passes or microbatches) -> (steps, those of all ranks)
    losses = floats[:, :-1].unflatten(1, (count, -1))[..., :-1].permute(1, 0, 2).flatten(1)
    images = whole[:, :-1].unflatten(1, (count, -1)).permute(1, 0, 2).flatten(1).numpy()
    steps = [
        Step(
            step.step,
            float(np.sum(losses[number].numpy())),
            float(numbers[number, -1]),
            step.lr,
            xxh3_64_hexdigest(images[number].tobytes()),
        )
        for number, step in enumerate(pending)
    ]
    return steps, float(floats[:, -1].max()), bool(whole[:, -1].any())
