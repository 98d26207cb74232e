"""FLOPs and memory of a training step, computed with tensors that hold no data."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from reconverge.models import drop_path


class Memory(NamedTuple):
    """Peak bytes of a step on one device, without the memory of kernels and of the device's runtime."""

    weights: int
    gradients: int
    moments: int  # AdamW's first and second moments
    ema: int  # EMA weights
    images: int  # of one forward pass: float32, and uint8 twice, for this microbatch and the next
    activations: int  # the most that forward and backward of one pass hold at one time

    @property
    def total(self) -> int:
        return sum(self)


def operations(net: nn.Module, side: int) -> float:
    """FLOPs of forward and backward of one image of `side` px; a multiply-add counts as 2. `net` is on the
    meta device.

    Training counts as 3 forward passes, as is usual: for each product, backward computes two products of the
    same size. FlopCounterMode cannot count backward directly: it takes the weight gradient of a depthwise
    convolution for that of a full convolution.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.empty(1, 3, side, side, device="meta"))
    return 3 * counter.get_total_flops()


def memory(
    net: nn.Module, images: int, side: int, classes: int, dtype: torch.dtype, ema: bool, gradients: int
) -> Memory:
    """Memory of training `net` with AdamW and autocast to `dtype`.

    `net` is on the meta device and cannot be used afterwards. `images`: number in one forward pass.
    `gradients`: number of copies of the gradients in memory. Forward and backward run on fake tensors, which
    have sizes but no data; the sizes of those that live at the same time are added.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = net.to_empty(device="cpu").train()
        weights = sum(parameter.nbytes for parameter in net.parameters())
        buffers = sum(buffer.nbytes for buffer in net.buffers())
        pixels = torch.empty(images, 3, side, side)
        for parameter in net.parameters():  # backward adds to existing gradients
            parameter.grad = torch.empty_like(parameter)
        with Living() as living, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            masks, targets = torch.empty(images, len(drop_path.rates(net))), torch.empty(images, classes)
            cross_entropy(drop_path.Masked(net)(pixels, masks).float(), targets).backward()
    averaged = (weights + buffers) * ema
    return Memory(
        weights + buffers, gradients * weights, 2 * weights, averaged, pixels.nbytes * 6 // 4, living.peak
    )


class Living(TorchDispatchMode):
    """While active, adds up the sizes of all storages that torch's operations create, until they are freed.

    `peak`: the largest sum at any time, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            # Not a view of an input, and not counted yet.
            if storage._cdata not in before and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)
