"""The gradients of a model in one flat tensor, added up once a step: over the forward passes of a rank, and
over ranks.

They are summed, not averaged: the loss is divided by the images of the whole batch.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn, zeros, zeros_like

from reconverge.distributed.world import World
from reconverge.training.passes import Passes

BUCKET = 25 * 2**20 // 4  # float32s that are sent together


def merges(leaves: int) -> list[int]:
    """After each leaf, how many sums it completes, of tree(lo, hi) = tree(lo, mid) + tree(mid, hi) with mid =
    (lo + hi) // 2.
    """
    if leaves == 1:
        return [0]
    left, right = merges(leaves // 2), merges(leaves - leaves // 2)
    return [*left, *right[:-1], right[-1] + 1]


def copies(leaves: int) -> int:
    """Gradients that lie in memory at most while a tree of `leaves` is added up on one rank: log2(leaves) +
    1, rounded up.
    """
    return 1 + (leaves - 1).bit_length()


class Gradients:
    """`net`'s gradients are views of it. Two ways to add:

    ddp: passes accumulate in place, and while the last one's backward pass still runs, finished buckets are
    already sent. Unlike torch's DistributedDataParallel, whose buckets are laid anew after its first step (so
    that from 3 ranks on a resumed run adds in another order), the buckets are a function of the model alone:
    R2.

    tree: the gradient of each leaf stands alone and is added in one canonical order, first the leaves of a
    rank, which are a subtree, then ranks by recursive doubling. So the sum does not hang on the number of
    ranks: R4.
    """

    def __init__(self, net: nn.Module, world: World, passes: Passes):
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad][
            ::-1
        ]  # nearly as backward meets them
        self._world, self._passes = world, passes
        self._flat = zeros(sum(parameter.numel() for parameter in parameters), device=world.device)
        self._merges = merges(passes.leaves)
        self._buckets: list[Tensor] = []
        self._members: list[int] = []  # parameters of each bucket
        self._spare: list[Tensor] = []
        self._sums: list[Tensor] = []  # of subtrees that wait for their right sibling
        first = begin = members = 0
        for parameter in parameters:
            parameter.grad = self._flat.as_strided(parameter.shape, parameter.stride(), begin)
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, len(self._buckets)))
            begin, members = begin + parameter.numel(), members + 1
            if begin - first >= BUCKET or begin == len(self._flat):
                self._buckets.append(self._flat[first:begin])
                self._members.append(members)
                first, members = begin, 0
        self.clear()

    def clear(self) -> None:
        """For a new step."""
        self._flat.zero_()
        self._done = 0
        self._missing = list(self._members)  # of each bucket, those that have no gradient yet
        self._sent: list[Callable[[], object]] = []  # of each bucket on its way, what waits for it

    def add(self) -> None:
        """After the backward pass of each forward pass."""
        self._done += 1
        leaf, rest = divmod(self._done, self._passes.slices)
        if not self._passes.tree or rest:
            return
        for _ in range(self._merges[leaf - 1]):
            self._spare.append(self._sums.pop())
            self._flat.add_(self._spare[-1])  # left and right of a sum of two may change places
        if leaf < self._passes.leaves:
            self._sums.append(self._room().copy_(self._flat))
            self._flat.zero_()

    def reduce(self) -> None:
        """After the last one: over all ranks."""
        if not self._passes.tree:
            self._send(len(self._buckets))
            for wait in self._sent:
                wait()
            return
        distance = 1
        while distance < self._world.size:
            theirs = self._room()
            self._world.exchange(self._flat, self._world.rank ^ distance, theirs)
            self._flat.add_(theirs)
            self._spare.append(theirs)
            distance *= 2

    def _room(self) -> Tensor:
        return self._spare.pop() if self._spare else zeros_like(self._flat)

    def _arrived(self, bucket: int, parameter: Tensor) -> None:
        """The gradient of a parameter is there, in a backward pass."""
        if self._passes.tree or self._done < self._passes.count - 1:
            return
        self._missing[bucket] -= 1
        self._send(
            next((number for number, missing in enumerate(self._missing) if missing), len(self._buckets))
        )

    def _send(self, ready: int) -> None:
        """Every bucket before number `ready`, in this order on all ranks."""
        while len(self._sent) < ready:
            self._sent.append(self._world.add_up(self._buckets[len(self._sent)]))
