"""BatchNorm's running statistics follow microbatch 0 of each step, whatever the number of microbatches: one
update a step.

That is what the published runs kept: each GPU held one microbatch, and rank 0 saved. Every forward pass in
training updates the buffers, and so does every recomputation under activation checkpointing; hence they are
noted after the forward pass that counts, and set from the note when the step ends.
"""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Of a model as it is now: every buffer that its checkpoints hold.

    num_batches_tracked thus counts the steps, without suppressed ones.
    """

    def __init__(self, model: nn.Module):
        saved = model.state_dict().keys()
        self._buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
        self._settled = [buffer.clone() for buffer in self._buffers]
        self._noted = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def note(self) -> None:
        """After the forward pass of microbatch 0, before its backward pass."""
        for buffer, noted in zip(self._buffers, self._noted, strict=True):
            noted.copy_(buffer)

    @torch.no_grad()
    def settle(self, skip: Tensor) -> None:
        """After a step.

        `skip`: float scalar on the device, 1 where it was suppressed; its statistics may not be finite, and
        do not stay.
        """
        for buffer, settled, noted in zip(self._buffers, self._settled, self._noted, strict=True):
            settled.copy_(torch.where(skip.bool(), settled, noted))
            buffer.copy_(settled)
