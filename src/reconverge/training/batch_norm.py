"""Updates BatchNorm's running statistics once per step, from microbatch 0 only.

The published runs did the same: each GPU had one microbatch, and rank 0 saved. In training, every forward
pass updates the buffers, and so does every recomputation of activation checkpointing. Therefore the buffers
are copied after the forward pass of microbatch 0, and restored from this copy at the end of the step.
"""

import torch
from torch import Tensor, nn


def has(model: nn.Module) -> bool:
    """Whether the model has a layer of BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


class RunningStatistics:
    """Covers every buffer of the model that its checkpoints contain.

    So num_batches_tracked counts the steps, without the skipped ones.
    """

    def __init__(self, model: nn.Module):
        saved = model.state_dict().keys()
        self._buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
        self._settled = [buffer.clone() for buffer in self._buffers]
        self._noted = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def note(self) -> None:
        """Call it after the forward pass of microbatch 0, before its backward pass."""
        for buffer, noted in zip(self._buffers, self._noted, strict=True):
            noted.copy_(buffer)

    @torch.no_grad()
    def settle(self, skip: Tensor) -> None:
        """Call it at the end of a step.

        `skip`: float scalar on the device, 1 if the step is skipped. The statistics of a skipped step may not
        be finite, so they are discarded.
        """
        for buffer, settled, noted in zip(self._buffers, self._settled, self._noted, strict=True):
            settled.copy_(torch.where(skip.bool(), settled, noted))
            buffer.copy_(settled)
