"""What a step costs, worked out with tensors that hold no data: floating-point operations and memory."""

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
    """Bytes on one device at the height of a step, without what kernels and the device's runtime take for
    themselves.
    """

    weights: int
    gradients: int
    moments: int  # AdamW's two
    average: int  # EMA
    images: int  # of a forward pass as float32, and twice as uint8: these and the next
    activations: int  # most that forward and backward of one pass hold at once

    @property
    def total(self) -> int:
        return sum(self)


def operations(net: nn.Module, side: int) -> float:
    """Floating-point operations of forward and backward of one image, a multiply-add being two; `net` is on
    the meta device.

    Three times those of forward, as is usual: for each product, backward computes two of its size. (Counted
    directly they would be wrong: torch's FlopCounterMode takes the weight gradient of a depthwise convolution
    for that of a full one.)
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.empty(1, 3, side, side, device="meta"))
    return 3 * counter.get_total_flops()


def memory(
    net: nn.Module, images: int, side: int, classes: int, dtype: torch.dtype, ema: bool, gradients: int
) -> Memory:
    """Of training `net`, which is on the meta device and becomes unusable, with AdamW and autocast to
    `dtype`; `images` of a forward pass, `gradients` that lie side by side.

    Forward and backward run on fake tensors, which know their sizes alone, and what lives at the same time is
    added up.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = net.to_empty(device="cpu").train()
        weights = sum(parameter.nbytes for parameter in net.parameters())
        buffers = sum(buffer.nbytes for buffer in net.buffers())
        pixels = torch.empty(images, 3, side, side)
        for parameter in net.parameters():  # into which backward adds
            parameter.grad = torch.empty_like(parameter)
        with Living() as living, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            masks, targets = torch.empty(len(drop_path.rates(net)), images), torch.empty(images, classes)
            cross_entropy(drop_path.Masked(net)(pixels, masks).float(), targets).backward()
    average = (weights + buffers) * ema
    return Memory(
        weights + buffers, gradients * weights, 2 * weights, average, pixels.nbytes * 6 // 4, living.peak
    )


class Living(TorchDispatchMode):
    """While it is entered, adds up the storages that operations make and that still live.

    `peak`: the most at any time, in bytes.
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
            if (
                storage._cdata not in before and storage._cdata not in self._sizes
            ):  # neither a view of an input, nor known
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)
