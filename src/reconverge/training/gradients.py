"""The gradients of a model in one flat tensor, summed over the forward passes of a rank and over ranks.

They are summed and not averaged, because the loss is already divided by the batch size.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn, zeros, zeros_like

from reconverge.distributed.world import World
from reconverge.training.passes import Passes

BUCKET = 25 * 2**20 // 4  # float32 numbers in one all-reduce
# Each gradient begins at a multiple of 256 bytes, as tensors of their own would. Otherwise, after a head with
# an odd number of classes, all gradients are at odd addresses, where kernels load only one number at once.
ALIGNED = 256 // 4  # float32 numbers


def merges(leaves: int) -> list[int]:
    """For each leaf, the number of sums that are complete after it.

    The sums are tree(lo, hi) = tree(lo, mid) + tree(mid, hi) with mid = (lo + hi) // 2.
    """
    if leaves == 1:
        return [0]
    left, right = merges(leaves // 2), merges(leaves - leaves // 2)
    return [*left, *right[:-1], right[-1] + 1]


def copies(leaves: int) -> int:
    """The largest number of gradient copies in memory while one rank sums a tree of `leaves`: log2(leaves) +
    1, rounded up.
    """
    return 1 + (leaves - 1).bit_length()


class Gradients:
    """The gradients of `net` become views of one flat tensor. There are two ways to sum them:

    ddp: forward passes accumulate in place. Finished buckets are already sent while the last backward pass
    still runs. The buckets depend only on the model, which keeps R2. (torch's DistributedDataParallel
    rebuilds its buckets after the first step, so with 3 or more ranks a resumed run would add in another
    order.)

    tree: the gradients of all leaves are added in one fixed order. Each rank first adds its own leaves, which
    form a subtree; then the ranks are added by recursive doubling. So the sum does not depend on the number
    of ranks, which gives R4.
    """

    def __init__(self, net: nn.Module, world: World, passes: Passes):
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        parameters.reverse()  # about the order in which the backward pass finishes gradients
        self._world, self._passes = world, passes
        room = [-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in parameters]
        self._flat = zeros(sum(room), device=world.device)
        self._merges = merges(passes.leaves)
        self._buckets: list[Tensor] = []
        self._members: list[int] = []  # number of parameters in each bucket
        self._spare: list[Tensor] = []  # buffers for reuse
        self._sums: list[Tensor] = []  # sums of subtrees that wait for their right sibling
        first = begin = members = 0
        for parameter, size in zip(parameters, room, strict=True):
            parameter.grad = self._flat.as_strided(parameter.shape, parameter.stride(), begin)
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, len(self._buckets)))
            begin, members = begin + size, members + 1
            if begin - first >= BUCKET or begin == len(self._flat):
                self._buckets.append(self._flat[first:begin])
                self._members.append(members)
                first, members = begin, 0
        self.clear()

    def clear(self) -> None:
        """Set all gradients to zero for a new step."""
        self._flat.zero_()
        self._done = 0
        self._missing = list(self._members)  # for each bucket, the parameters without a gradient so far
        self._sent: list[Callable[[], object]] = []  # for each bucket that is sent, a function that waits

    def add(self) -> None:
        """Call it after each backward pass."""
        self._done += 1
        leaf, rest = divmod(self._done, self._passes.slices)
        if not self._passes.tree or rest:
            return
        for _ in range(self._merges[leaf - 1]):
            self._spare.append(self._sums.pop())
            self._flat.add_(self._spare[-1])  # a + b and b + a have the same bits
        if leaf < self._passes.leaves:
            self._sums.append(self._room().copy_(self._flat))
            self._flat.zero_()

    def reduce(self) -> None:
        """Sum the gradients over all ranks. Call it after the last backward pass of a step."""
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
        """Hook that runs when a backward pass has finished the gradient of a parameter."""
        if self._passes.tree or self._done < self._passes.count - 1:
            return
        self._missing[bucket] -= 1
        self._send(
            next((number for number, missing in enumerate(self._missing) if missing), len(self._buckets))
        )

    def _send(self, ready: int) -> None:
        """Send all buckets before number `ready` that are not sent yet, in the same order on all ranks."""
        while len(self._sent) < ready:
            self._sent.append(self._world.add_up(self._buckets[len(self._sent)]))
