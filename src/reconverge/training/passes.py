"""Splits or joins the microbatches of a rank into forward passes.

Random numbers are drawn for whole microbatches, so they do not depend on the ranks and the forward passes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reconverge.base.errors import Exit, Stop


class Passes:
    """The forward passes of one rank in a step. `forward_images`: images of one pass; None means one
    microbatch. `tree`: whether reduce=tree adds the leaves.

    A leaf is a part of the step with one gradient: a microbatch, in one or several passes, or several
    microbatches that are joined in one pass.
    """

    def __init__(self, microbatches: int, microbatch: int, forward_images: int | None, tree: bool = False):
        """`microbatches`: number of microbatches of this rank. Errors: Stop(USAGE)."""
        images = forward_images or microbatch
        self.tree = tree
        self._joined = min(max(1, images // microbatch), microbatches)
        self.images = min(images, self._joined * microbatch)  # images of the largest pass
        self._microbatches = microbatches
        self.slices = max(1, microbatch // images)  # passes of one leaf
        self.leaves = -(-microbatches // self._joined)
        self.count = self.leaves * self.slices
        if tree and microbatches % self._joined:
            raise Stop(
                Exit.USAGE,
                f"forward_images={forward_images} joins {self._joined} microbatches of {microbatch} images,"
                f" but each rank has {microbatches} microbatches",
                "with reduce=tree, forward passes that divide the microbatches of a rank evenly",
                f"forward_images={microbatch}",
            )
        self._held: list[tuple[Tensor, ...]] = []
        self._seen = 0

    def __call__(self, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Takes the inputs of a microbatch, tensors of which each row belongs to an image, and yields the
        forward passes that are ready. It yields none while it collects microbatches that are to be joined.
        """
        self._seen += 1
        if self.slices > 1:
            yield from zip(*(tensor.chunk(self.slices) for tensor in inputs), strict=True)
        elif self._joined == 1:
            yield inputs
        else:
            self._held.append(inputs)
            if len(self._held) == self._joined or self._seen == self._microbatches:
                yield tuple(map(torch.cat, zip(*self._held, strict=True)))
                self._held.clear()
        self._seen %= self._microbatches


def refuse_other_passes(net: nn.Module, microbatch: int, forward_images: int | None) -> None:
    """A model with BatchNorm needs forward passes of exactly one microbatch, because it averages over a
    forward pass. Errors: Stop(USAGE).
    """
    if forward_images in (None, microbatch) or not any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()
    ):
        return
    raise Stop(
        Exit.USAGE,
        f"forward_images={forward_images} with a model that has BatchNorm",
        f"forward passes of one microbatch, {microbatch} images, because BatchNorm averages over a pass",
        f"forward_images={microbatch}; to save memory use checkpointing=true; a smaller microbatch= also"
        " saves memory, but it changes the training",
    )
