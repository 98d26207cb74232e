"""Processes a microbatch on the device: normalise, then random erasing, then Mixup or CutMix.

Random numbers are drawn on the host from the key (seed, step, microbatch), so they do not depend on the
device. Only the pixels are computed on the device.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reconverge.base import chance
from reconverge.config import settings


class Normalise:
    """Normalises images by `mean` and `std` (of R, G, B in 0..1): uint8 (N, 3, H, W) -> float32."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device, channels_last: bool):
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        # Bit-equal to ToTensor and Normalize. Including the division by 255 in mean and std would change
        # bits.
        return images.to(torch.float32, memory_format=self.format).div_(255).sub_(self.mean).div_(self.std)


class Mix:
    """Random erasing (mode pixel), then Mixup or CutMix, then label smoothing.

    One lambda for each microbatch. Each image is mixed with its partner in the microbatch in reversed order.
    """

    def __init__(self, erase: float, mix: settings.Mix, classes: int):
        self.erase = erase
        self.mixup = Mixup(mix, classes)

    def __call__(
        self, images: Tensor, labels: Tensor, key: tuple[int, int, int], noise: "Noise | None" = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W) and labels (N,) -> images, targets (N, classes). Changes the images
        in place.

        key = (seed, step, microbatch). `noise`: what Noise.of returns for this key, if a data worker has
        drawn it; on the device of the images.
        """
        if self.erase:
            erase(images, noise or Noise.of(self.erase, images.shape, key).to(images.device))
        with chance.scope(*key[:1], "mix", *key[1:]):
            return self.mixup(images, labels)


class Mixup:
    """Mixup or CutMix as the published runs had them (timm 0.3.2), whatever version of timm is installed.

    Random numbers are drawn from numpy's global generator in the same order as in timm's Mixup(mode="batch").
    The box of CutMix is not that of every timm: since 1.0.29 it is a pixel larger if its side is odd.
    """

    def __init__(self, mix: settings.Mix, classes: int):
        self.mix, self.classes = mix, classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Like Mix, without erasing."""
        share, box = self.draw(*images.shape[2:])
        if box is not None:
            rows, columns = box
            images[:, :, rows, columns] = images[:, :, rows, columns].flip(0)
        elif share != 1:
            partners = images.flip(0).mul_(1 - share)
            images.mul_(share).add_(partners)
        smooth = self._smooth(labels)
        return images, smooth * share + smooth.flip(0) * (1 - share)

    def draw(self, height: int, width: int) -> tuple[float, tuple[slice, slice] | None]:
        """The share (lambda) of each image in its mixture, and the rows and columns that CutMix takes from
        the partner; None instead of these for Mixup.
        """
        mix = self.mix
        if not (mix.mixup or mix.cutmix) or np.random.rand() >= mix.probability:
            return 1.0, None
        cut = np.random.rand() < mix.switch if mix.mixup and mix.cutmix else bool(mix.cutmix)
        alpha = mix.cutmix if cut else mix.mixup
        share = float(np.random.beta(alpha, alpha))
        if not cut or share == 1:
            return share, None
        rows, columns = (_cut(length, math.sqrt(1 - share)) for length in (height, width))
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        return 1 - area / (height * width), (rows, columns)

    def _smooth(self, labels: Tensor) -> Tensor:
        """float32 (N, classes): the rest of label smoothing is shared by all classes, the right one too."""
        off = self.mix.smoothing / self.classes
        smooth = torch.full((len(labels), self.classes), off, device=labels.device)
        return smooth.scatter_(1, labels.view(-1, 1), 1 - self.mix.smoothing + off)


def _cut(length: int, ratio: float) -> slice:
    """Where CutMix cuts one side of an image: around a random centre, clipped at the edges."""
    half, centre = int(length * ratio) // 2, int(np.random.randint(0, length))
    return slice(max(0, centre - half), min(length, centre + half))


class Noise(NamedTuple):
    """What random erasing writes over the images of a microbatch."""

    pixels: Tensor  # int64 (P,): (image * height + row) * width + column
    values: Tensor  # float32 (P, channels)

    def to(self, device: torch.device) -> "Noise":
        return Noise(*(part.to(device, non_blocking=True) for part in self))

    @staticmethod
    def of(probability: float, shape: Sequence[int], key: tuple[int, int, int]) -> "Noise":
        """For images of `shape` (N, C, H, W); key = (seed, step, microbatch). It takes some milliseconds for
        128 images, so data workers draw it.
        """
        with chance.scope(*key[:1], "erase", *key[1:]):
            return Noise.drawn(probability, *shape)

    @staticmethod
    def drawn(probability: float, count: int, channels: int, height: int, width: int) -> "Noise":
        """Of `count` images. With `probability`, a box of an image is filled with standard normal noise. The
        box covers 2 % to 1/3 of the area and has an aspect ratio of 0.3 to 1 / 0.3.

        The random numbers are drawn from the global generators of python and torch in the same order as in
        timm's RandomErasing(mode="pixel") (Zhong et al., 2017), so the result is bit-equal.
        """
        pixels, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, channels)]
        rows, columns = torch.arange(height)[:, None] * width, torch.arange(width)
        for image in range(count):
            if random.random() > probability:
                continue
            for _attempt in range(10):
                area = random.uniform(0.02, 1 / 3) * height * width
                aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    top, left = random.randint(0, height - h), random.randint(0, width - w)
                    box = rows[top : top + h] + columns[left : left + w] + image * height * width
                    pixels.append(box.flatten())
                    values.append(torch.empty(channels, h * w).normal_().T)
                    break
        return Noise(torch.cat(pixels), torch.cat(values))


def erase(images: Tensor, noise: Noise) -> None:
    """Random erasing of images (N, C, H, W), in place."""
    height, width = images.shape[2:]
    rows = noise.pixels // width  # of all images, one below the other
    places = rows // height, rows % height, noise.pixels % width
    images.permute(0, 2, 3, 1).index_put_(places, noise.values)  # (N, C, H, W) -> (N, H, W, C)
