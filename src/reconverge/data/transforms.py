"""Augmentation in data workers: from the bytes of an image file to uint8 pixels, with timm's transforms.

Normalising, erasing and mixing follow on the device (mix.py).
"""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_train

from reconverge.config.settings import Augment, Evaluate
from reconverge.data import native
from reconverge.data.decode import crop_and_resize, dimensions
from reconverge.data.sources import Source

Transform = Callable[[bytes], np.ndarray]


def labelled(transform: Transform) -> Callable[[Source, int], tuple[np.ndarray, np.ndarray]]:
    """What a classifier learns from: (source, sample id) -> transformed pixels uint8 (H, W, 3), label int64
    ().
    """

    def load(source: Source, sample: int) -> tuple[np.ndarray, np.ndarray]:
        return transform(source.read(sample)), source.labels(np.array(sample))

    return load


def training(augment: Augment, mean: list[float], decode: str = "exact") -> Transform:
    """Random resized crop, flip and RandAugment: uint8 (size, size, 3). Draws from the global generators.
    Errors: Undecodable.

    Random numbers and pixels are the same as in timm's transforms_imagenet_train, without normalising and
    erasing. Colour jitter is off: the published command sets it to 0.4, but timm ignores it with RandAugment.
    `mean` is the colour of areas that a rotation leaves empty. `decode`: exact or fast, see decode.py. inc0
    is left out of the policy, because timm before 1.0.29 takes it for inc1.
    """
    first, auto, _ = transforms_imagenet_train(
        augment.size,
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        hflip=augment.flip,
        color_jitter=None,  # type: ignore[arg-type]
        auto_augment=None if augment.auto == "none" else re.sub(r"-inc0+(?![\d.])", "", augment.auto),
        interpolation=augment.interpolation,
        mean=tuple(mean),
        use_prefetcher=True,
        separate=True,
    )
    for randaugment in auto.transforms:
        for operation in randaugment.ops:
            if operation.name in AFFINE:
                operation.aug_fn = _natively(operation.aug_fn)
    crop = first.transforms[0]
    filters = crop.interpolation if augment.interpolation == "random" else None

    def transform(data: bytes) -> np.ndarray:
        width, height = dimensions(data)
        like = torch.empty((height, width), device="meta")  # get_params only reads the size
        top, left, rows, columns = crop.get_params(like, crop.scale, crop.ratio)
        interpolation = random.choice(filters).value if filters else augment.interpolation
        box = (left, top, left + columns, top + rows)
        image = crop_and_resize(data, box, (augment.size, augment.size), interpolation, decode == "fast")
        if augment.flip and torch.rand(1).item() < augment.flip:  # drawn as torchvision does
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for augmentation in auto.transforms:
            image = augmentation(image)
        return np.asarray(image)

    return transform


# The affine operations of RandAugment, by their names in timm.
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


class Movable:
    """Wraps an image for timm's affine operations. They compute a matrix and call transform(), which uses
    native/ here.
    """

    rotate = Image.Image.rotate  # Pillow's method computes a matrix from degrees and calls transform()

    def __init__(self, image: Image.Image):
        self._image, self.size = image, image.size

    def __getattr__(self, name: str) -> Any:  # a rotation by 0 or 90 degrees calls copy() or transpose()
        return getattr(self._image, name)

    def transform(
        self, size: Any, method: Any, matrix: Any, resample: int, fillcolor: tuple[int, int, int]
    ) -> Image.Image:
        library = native.chosen()
        if library is None:
            return self._image.transform(size, method, matrix, resample, fillcolor=fillcolor)
        return library.affine(self._image, matrix, resample, fillcolor)


def _natively(operation: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    return lambda image, *magnitudes, **options: operation(Movable(image), *magnitudes, **options)


def evaluation(evaluate: Evaluate) -> Transform:
    """Resize and centre crop, or squash to a square: uint8 (size, size, 3). No random numbers.

    Errors: Undecodable.
    """
    side, size = resized_side(evaluate), evaluate.size

    def transform(data: bytes) -> np.ndarray:
        width, height = dimensions(data)
        short = min(width, height)
        resized = (
            (side, side)
            if evaluate.mode == "squash"
            else (int(side * width / short), int(side * height / short))
        )
        pixels = np.asarray(
            crop_and_resize(data, (0, 0, width, height), resized, evaluate.interpolation, fast=False)
        )
        left, top = (round((length - size) / 2) for length in resized)
        return pixels[top : top + size, left : left + size]

    return transform


def resized_side(evaluate: Evaluate) -> int:
    """Pixels of the shorter side after resizing: for example 256 for a size of 224 and a ratio of 0.875."""
    return math.floor(evaluate.size / evaluate.crop_ratio)
