"""Updates BatchNorm's running statistics once per step, from microbatch 0 only.

The published runs did the same: each GPU had one microbatch, and rank 0 saved. In training, every forward
pass updates the buffers, and so does every recomputation of activation checkpointing. Therefore the buffers
are copied after the forward pass of microbatch 0, and restored from this copy at the end of the step.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


def has(model: nn.Module) -> bool:
    """Whether the model has a layer of BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Lists of tensors of one dtype, each of which torch._foreach_copy_ copies in one kernel or a few."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return list(lists.values())


class Flat(NamedTuple):
    """A copy of some tensors in one tensor: what is done with all of them is one kernel."""

    all: Tensor  # flat
    parts: list[Tensor]  # views of it, with the shapes of the tensors

    @staticmethod
    def of(tensors: list[Tensor]) -> "Flat":
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        parts = flat.split([tensor.numel() for tensor in tensors])
        return Flat(flat, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


class RunningStatistics:
    """Covers every buffer of the model that its checkpoints contain.

    So num_batches_tracked counts the steps, without the skipped ones.
    """

    def __init__(self, model: nn.Module):
        saved = model.state_dict().keys()
        self._buffers = by_dtype(buffer for name, buffer in model.named_buffers() if name in saved)
        self._settled = [Flat.of(buffers) for buffers in self._buffers]
        self._noted = [Flat.of(buffers) for buffers in self._buffers]

    @torch.no_grad()
    def note(self) -> None:
        """Call it after the forward pass of microbatch 0, before its backward pass."""
        for buffers, noted in zip(self._buffers, self._noted, strict=True):
            torch._foreach_copy_(noted.parts, buffers)

    @torch.no_grad()
    def settle(self, skip: Tensor) -> None:
        """Call it at the end of a step.

        `skip`: float scalar on the device, 1 if the step is skipped. The statistics of a skipped step may not
        be finite, so they are discarded.
        """
        for buffers, settled, noted in zip(self._buffers, self._settled, self._noted, strict=True):
            settled.all.copy_(torch.where(skip.bool(), settled.all, noted.all))
            torch._foreach_copy_(buffers, settled.parts)
