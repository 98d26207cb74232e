"""From a PIL image to uint8 pixels, in a data worker: timm's own transforms, up to where the device takes over."""

import math
from collections.abc import Callable

from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor

from reconverge.settings import Augment, Evaluate

Transform = Callable[[Image.Image], Tensor]


def training(augment: Augment, mean: list[float]) -> Transform:
    """Random resized crop, flip, RandAugment: uint8 (3, size, size). Draws from the global generators.

    timm's use_prefetcher leaves normalising and erasing to the device. Colour jitter is off: the published command asks
    for 0.4, which timm drops wherever RandAugment is on. `mean` fills what a rotation or shear uncovers.
    """
    return transforms_imagenet_train(
        augment.size,
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        hflip=augment.flip,
        color_jitter=None,  # type: ignore[arg-type]
        auto_augment=None if augment.auto == "none" else augment.auto,
        interpolation=augment.interpolation,
        mean=tuple(mean),
        use_prefetcher=True,
    )


def evaluation(evaluate: Evaluate) -> Transform:
    """Resize and centre crop, or warp: uint8 (3, size, size). Draws nothing."""
    return transforms_imagenet_eval(
        evaluate.size,
        crop_pct=evaluate.crop_ratio,
        crop_mode="squash" if evaluate.mode == "squash" else "center",
        interpolation=evaluate.interpolation,
        use_prefetcher=True,
    )


def resized_side(evaluate: Evaluate) -> int:
    """Pixels of the shorter side after the resize: 256 for 224 at a ratio of 0.875."""
    return math.floor(evaluate.size / evaluate.crop_ratio)
