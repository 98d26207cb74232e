"""The loss of semantic segmentation."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reconverge.data.maps import IGNORED
from reconverge.models.resample import Resize

WEIGHTS = (1.0, 0.4)  # of the decoder's logits and of the auxiliary head's


def pixel_loss(outputs: tuple[Tensor, Tensor], labels: Tensor, batch: int) -> Tensor:
    """This forward pass's share of a step's loss; the shares of all passes of the step are added.

    The cross-entropy of each pixel, summed and divided by all pixels of the step: `batch` images of H x W.
    Ignored pixels add 0 and count in the divisor, as in the published code. `outputs`: logits of any two
    sizes, (N, classes, h, w), which are resized to the labels' size. `labels`: (N, H, W), integers; IGNORED
    or a class.
    """
    size, truth = labels.shape[1:], labels.flatten().long()
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for weight, logits in zip(WEIGHTS, outputs, strict=True):
        # (N, classes, H, W) -> (pixels, classes): torch's loss over maps is not deterministic on CUDA, and
        # its own sum over rows runs on few threads.
        rows = Resize()(logits.float(), size).permute(0, 2, 3, 1).flatten(0, 2)
        total = total + weight * cross_entropy(rows, truth, ignore_index=IGNORED, reduction="none").sum()
    return total / (batch * size.numel())
