"""How the microbatches of a rank become forward passes.

What is drawn for a microbatch is drawn for all of it, whoever takes it and in however many passes it goes
through the model.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reconverge.base.errors import Exit, Stop


class Passes:
    """The forward passes of one rank in a step. `forward_images`: in one of them; None: a microbatch. `tree`:
    how leaves are added.

    A leaf is what has one gradient when microbatches are added up: a microbatch, in one pass or several, or
    the joined ones of a pass.
    """

    def __init__(self, microbatches: int, microbatch: int, forward_images: int | None, tree: bool = False):
        """`microbatches`: of this rank. Errors: Stop(USAGE)."""
        images = forward_images or microbatch
        self.tree = tree
        self._joined = min(max(1, images // microbatch), microbatches)
        self.images = min(images, self._joined * microbatch)  # of the largest pass
        self._microbatches = microbatches
        self.slices = max(1, microbatch // images)  # passes of a leaf
        self.leaves = -(-microbatches // self._joined)
        self.count = self.leaves * self.slices
        if tree and microbatches % self._joined:
            raise Stop(
                Exit.USAGE,
                f"forward_images={forward_images} joins {self._joined} microbatches of {microbatch}, and each"
                f" rank has {microbatches}",
                "with reduce=tree a number of them that divides a rank's: each pass is a leaf of the tree",
                f"forward_images={microbatch}",
            )
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self._seen = 0

    def __call__(
        self, images: Tensor, targets: Tensor, masks: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Takes a microbatch (N, 3, H, W), (N, classes), (drops, N); gives the passes that can be made now:
        none while it is held back to be joined.
        """
        self._seen += 1
        if self.slices > 1:
            yield from zip(
                images.chunk(self.slices),
                targets.chunk(self.slices),
                masks.chunk(self.slices, dim=1),
                strict=True,
            )
        elif self._joined == 1:
            yield images, targets, masks
        else:
            self._held.append((images, targets, masks))
            if len(self._held) == self._joined or self._seen == self._microbatches:
                joined_images, joined_targets, joined_masks = zip(*self._held, strict=True)
                yield torch.cat(joined_images), torch.cat(joined_targets), torch.cat(joined_masks, dim=1)
                self._held.clear()
        self._seen %= self._microbatches


def refuse_other_passes(net: nn.Module, microbatch: int, forward_images: int | None) -> None:
    """BatchNorm averages over a forward pass, which is to be a microbatch. Errors: Stop(USAGE)."""
    if forward_images in (None, microbatch) or not any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()
    ):
        return
    raise Stop(
        Exit.USAGE,
        f"forward_images={forward_images} with a model that has BatchNorm",
        f"forward passes of one microbatch, {microbatch} images: BatchNorm averages over them",
        f"forward_images={microbatch}; checkpointing=true saves memory, and a smaller microbatch= is another"
        " training",
    )
