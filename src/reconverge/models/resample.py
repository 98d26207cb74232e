"""Average pooling and bilinear resizing as two matrix products, one for each axis.

torch's own operations add gradients with atomic additions on CUDA, in an order that changes from run to run.
Both operations are separable: each output row is a weighted sum of input rows, with weights that do not
depend on the column. A matrix product is deterministic, forward and backward. Neither class has parameters.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn


class Pool(nn.Module):
    """AdaptiveAvgPool2d: (N, C, H, W) -> (N, C, bins, bins)."""

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        return _weighted(x, *(_averages(side, self.bins, x) for side in x.shape[2:]))

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


class Resize(nn.Module):
    """interpolate(mode="bilinear", align_corners=False): (N, C, H, W) -> (N, C, *size)."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if x.shape[2:] == size:
            return x
        return _weighted(x, *(_hats(side, to, x) for side, to in zip(x.shape[2:], size, strict=True)))


def _weighted(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, C, H, W), (h, H), (w, W) -> (N, C, h, w), whose memory is in the order (N, h, w, C).

    The products have the dtype of `x` under autocast too, as torch's own operations have.
    """
    images, channels, height, width = x.shape
    h, w = len(rows), len(columns)
    device = x.device.type
    plain = (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    )
    with plain:
        x = x.permute(0, 2, 3, 1).reshape(images * height, width, channels)
        x = torch.bmm(columns.expand(images * height, w, width), x)  # (N H, w, C)
        x = x.view(images, height, w * channels)
        x = torch.bmm(rows.expand(images, h, height), x)  # (N, h, w C)
    return x.view(images, h, w, channels).permute(0, 3, 1, 2)


def _averages(side: int, bins: int, like: Tensor) -> Tensor:
    """(bins, side): bin i is the mean of positions floor(i side / bins) to ceil((i + 1) side / bins) - 1."""
    number = torch.arange(bins, device=like.device).view(-1, 1)
    first, end = number * side // bins, ((number + 1) * side + bins - 1) // bins
    at = torch.arange(side, device=like.device)
    return (((at >= first) & (at < end)).double() / (end - first)).to(like.dtype)


def _hats(side: int, to: int, like: Tensor) -> Tensor:
    """(to, side): output i is at the input's position (i + 1/2) side / to - 1/2, not beyond its ends. The
    weight of an input falls linearly from 1 at this position to 0 at a distance of 1.
    """
    outputs = torch.arange(to, device=like.device, dtype=torch.float64).view(-1, 1)
    position = ((outputs + 0.5) * (side / to) - 0.5).clamp(0, side - 1)
    return (1 - (position - torch.arange(side, device=like.device)).abs()).clamp(min=0).to(like.dtype)
