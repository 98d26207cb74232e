"""Processes a microbatch on the device: normalise, then random erasing, then Mixup or CutMix.

Random numbers are drawn on the host from the key (seed, step, microbatch), so they do not depend on the
device. Only the pixels are computed on the device.
"""

import math
import random

import torch
from timm.data import Mixup
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
        self.mixup = Mixup(
            mix.mixup,
            mix.cutmix,
            prob=mix.probability if mix.mixup or mix.cutmix else 0.0,  # with both off, timm must not mix
            switch_prob=mix.switch,
            label_smoothing=mix.smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W) and labels (N,) -> images, targets (N, classes). Changes the images
        in place.

        key = (seed, step, microbatch)
        """
        with chance.scope(*key[:1], "erase", *key[1:]):
            erase(images, self.erase)
        with chance.scope(*key[:1], "mix", *key[1:]):
            return self.mixup(images, labels)


def erase(images: Tensor, probability: float) -> None:
    """Random erasing (Zhong et al., 2017) of images (N, 3, H, W), in place.

    With `probability`, a box of an image is filled with standard normal noise. The box covers 2 % to 1/3 of
    the area and has an aspect ratio of 0.3 to 1 / 0.3. The random numbers are drawn from the global
    generators of python and torch in the same order as in timm's RandomErasing(mode="pixel"), so the result
    is bit-equal. Unlike timm's, the noise of all boxes is drawn on the host and copied to the device in one
    non-blocking copy.
    """
    count, channels, height, width = images.shape
    boxes, noise = [], []
    for image in range(count):
        if random.random() > probability:
            continue
        for _attempt in range(10):
            area = random.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                boxes.append((image, top, left, h, w))
                noise.append(torch.empty(channels, h, w).normal_().flatten())
                break
    if not boxes:
        return
    flat = torch.cat(noise)
    if images.is_cuda:
        flat = flat.pin_memory().to(images.device, non_blocking=True)
    for (image, top, left, h, w), pixels in zip(
        boxes, flat.split([channels * h * w for *_, h, w in boxes]), strict=True
    ):
        images[image, :, top : top + h, left : left + w] = pixels.view(channels, h, w)
