"""Augmentation of images with label maps in data workers, as published for UPerNet on ADE20K. All is uint8.

As in mmsegmentation's pipeline, which the published runs used: Resize, RandomCrop, RandomFlip,
PhotoMetricDistortion, Pad. Images are resized bilinearly without antialiasing (as OpenCV does; the pixels
differ by rounding), label maps by the nearest pixel. Everything random is drawn from torch's global
generator, which is seeded for each image by its key (chance.scope).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from reconverge.config.settings import Segment
from reconverge.data import image as images
from reconverge.data.image import Undecodable
from reconverge.data.maps import IGNORED

# The bytes of an image file and its label map -> pixels uint8 (H, W, 3), and labels uint8 (H, W).
Transform = Callable[[bytes, np.ndarray], tuple[np.ndarray, np.ndarray]]

TRIES = 10  # how often a crop is drawn again
DOMINANT = 0.75  # of the labelled pixels: largest share of one class in a crop
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18  # of PhotoMetricDistortion


def mapped(transform: Transform) -> Callable[[Any, int], tuple[np.ndarray, np.ndarray]]:
    """What a segmenter learns from: (source with label maps, sample id) -> transformed pixels and labels."""

    def load(source: Any, sample: int) -> tuple[np.ndarray, np.ndarray]:
        return transform(source.read(sample), source.target(sample))

    return load


def training(crop: int, segment: Segment, flip: float, mean: list[float]) -> Transform:
    """Random scale, crop, flip and colours: pixels (crop, crop, 3), labels (crop, crop).

    The image is resized to fit into segment.resize, longest x shortest, both times a random number from
    segment.scale. `flip` is a probability. Where the resized image ends before the crop, pixels have the
    colour `mean` (0..1), which is 0 after normalising but for rounding, and labels are IGNORED. Errors:
    Undecodable, also if the sizes of image and map differ.
    """
    longest, shortest = segment.resize
    filling = np.array([round(255 * value) for value in mean], np.uint8)

    def transform(data: bytes, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = _pixels(data, labels)
        ratio = _uniform(*segment.scale)
        size = fitted(labels.shape, int(longest * ratio), int(shortest * ratio))
        labels = nearest(labels, size)
        top, left = _place(labels, crop)
        part = slice(top, top + crop), slice(left, left + crop)
        labels, pixels = labels[part], resized(pixels, size)[part]
        if _uniform() < flip:
            labels, pixels = labels[:, ::-1], pixels[:, ::-1]
        full, full_labels = np.empty((crop, crop, 3), np.uint8), np.full((crop, crop), IGNORED, np.uint8)
        height, width = labels.shape
        full[:] = filling
        full[:height, :width] = distorted(pixels) if segment.distort else pixels
        full_labels[:height, :width] = labels
        return full, full_labels

    return transform


def whole(data: bytes, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image as it is, for evaluation, which resizes it on the device. Errors: as training()."""
    return _pixels(data, labels), labels


def _pixels(data: bytes, labels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3). Errors: Undecodable."""
    pixels = np.asarray(images.rgb(images.opened(data)))
    if pixels.shape[:2] != labels.shape:
        (height, width), (rows, columns) = pixels.shape[:2], labels.shape
        raise Undecodable(f"an image of {width} x {height} pixels with a label map of {columns} x {rows}")
    return pixels


def fitted(size: tuple[int, ...], longest: int, shortest: int) -> tuple[int, int]:
    """Height and width `size`, enlarged or reduced until the longer side is `longest`, or the shorter side is
    `shortest`, whichever comes first; as mmcv.imrescale rounds.
    """
    factor = min(longest / max(size), shortest / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) of another size, bilinearly, without antialiasing."""
    if pixels.shape[:2] == size:
        return pixels
    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), in the same memory
    return resized_planes(planes, size).permute(1, 2, 0).numpy()


def resized_planes(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """The same of uint8 (..., 3, H, W), on its device."""
    return planes if planes.shape[-2:] == size else functional.resize(planes, list(size), antialias=False)


def nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) of another size. Pixel x of n takes pixel floor(x * W / n), as OpenCV's INTER_NEAREST."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, labels.shape, strict=True))
    return labels[rows[:, None], columns]


def _place(labels: np.ndarray, crop: int) -> tuple[int, int]:
    """Top and left of a random crop. It is drawn again, up to TRIES times, while one class has DOMINANT or
    more of the labelled pixels.
    """
    for attempt in range(TRIES + 1):
        top, left = (_whole(max(side - crop, 0) + 1) for side in labels.shape)
        if attempt == TRIES:
            break  # the last one is taken, whatever it has
        counts = np.bincount(labels[top : top + crop, left : left + crop].ravel(), minlength=256)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < DOMINANT * counts.sum():
            break
    return top, left


# ---- mmsegmentation's PhotoMetricDistortion ----------------------------------------------------------------


def distorted(pixels: np.ndarray) -> np.ndarray:
    """Random changes of brightness, contrast, saturation and hue, each with probability 1/2, of uint8
    (H, W, 3). Contrast comes second or last. Between them the pixels are rounded to uint8.
    """
    if _whole(2):
        pixels = _linear(pixels, 1, _uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = _whole(2)
    if contrast_first and _whole(2):
        pixels = _linear(pixels, _uniform(*CONTRAST), 0)
    if _whole(2):
        factor = _uniform(*SATURATION)
        hue, saturation, value = to_hsv(pixels)
        pixels = to_rgb(hue, _linear(saturation, factor, 0), value)
    if _whole(2):
        hue, saturation, value = to_hsv(pixels)
        pixels = to_rgb((hue + _whole(2 * HUE) - HUE) % 180, saturation, value)  # -18 to 17
    if not contrast_first and _whole(2):
        pixels = _linear(pixels, _uniform(*CONTRAST), 0)
    return pixels


def _linear(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """values * factor + offset of uint8, limited to 0..255 and cut to whole numbers."""
    table = (np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)).clip(0, 255)
    return table.astype(np.uint8)[values]


def _divisors(numerator: float) -> np.ndarray:
    """int32 (256,): 4096 * numerator / i, for divisions by multiplication, and 0 for 0."""
    return np.rint(4096 * numerator / np.arange(256).clip(1) * (np.arange(256) > 0)).astype(np.int32)


_BY_VALUE, _BY_RANGE = _divisors(255), _divisors(30)


def to_hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in 0..179 (int32), saturation and value in 0..255 (uint8), each (H, W), of uint8 (H, W, 3); as
    OpenCV computes them from 8 bits.
    """
    red, green, blue = (np.ascontiguousarray(pixels[..., channel], np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    saturation = (spread * _BY_VALUE[value] + 2048) >> 12
    sixth = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sixth * _BY_RANGE[spread] + 2048) >> 12
    return hue + 180 * (hue < 0), saturation.astype(np.uint8), value.astype(np.uint8)


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of what to_hsv() returns."""
    place = hue.astype(np.float32) * np.float32(1 / 30)  # on the circle of hues, 0 to 6
    level = value.astype(np.float32)
    depth = level * saturation * np.float32(1 / 255)  # between the largest and the smallest channel
    pixels = np.empty((*hue.shape, 3), np.uint8)
    for channel, start in enumerate((5, 3, 1)):
        away = (place + np.float32(start)) % np.float32(6)
        share = np.minimum(np.minimum(away, np.float32(4) - away), np.float32(1)).clip(0)
        pixels[..., channel] = level - depth * share  # cut to whole numbers, as OpenCV does
    return pixels


# ---- draws -------------------------------------------------------------------------------------------------


def _uniform(low: float = 0, high: float = 1) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()


def _whole(count: int) -> int:
    """A whole number from 0 to count - 1."""
    return int(_uniform() * count)
