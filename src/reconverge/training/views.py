"""Class probabilities of each pixel of an image: of the whole image, of windows that slide over it, and of
several sizes, also mirrored.

As in mmsegmentation: where windows overlap, logits are averaged; over sizes and mirror images, probabilities.
One image is looked at a time, so the memory does not grow with the set.
"""

from collections.abc import Callable, Iterable

from torch import Tensor

from reconverge.data.map_transforms import fitted
from reconverge.models.resample import Resize

# Normalised images (N, 3, H, W) -> logits (N, classes, H, W) of the same height and width.
Logits = Callable[[Tensor], Tensor]


def starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of windows that cover `length` pixels. The last one ends at the edge, and moves back for
    that; a window that is longer than `length` starts at 0.
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride + window, length) - window, 0) for number in range(count)]


def sliding(logits: Logits, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (N, classes, H, W) of images (N, 3, H, W), from square windows. Published: 512 and 341, or 640
    and 426.
    """
    height, width = images.shape[-2:]
    total: Tensor | None = None
    count = images.new_zeros(1, 1, height, width)
    for top in starts(height, window, stride):
        for left in starts(width, window, stride):
            part = (..., slice(top, top + window), slice(left, left + window))
            found = logits(images[part])
            if total is None:
                total = found.new_zeros(len(images), found.shape[1], height, width)
            total[part] += found
            count[part] += 1
    assert total is not None, "there is at least one window"
    return total / count


def probabilities(logits: Logits, image: Tensor, size: tuple[int, int], mirrored: bool = False) -> Tensor:
    """Softmax (1, classes, *size) of one image (1, 3, H, W), after its logits are resized to `size`.

    `mirrored`: the image is looked at in a mirror, and the answer is turned back.
    """
    found = logits(image.flip(-1) if mirrored else image)
    found = found.flip(-1) if mirrored else found
    return Resize()(found.float(), size).softmax(1)


def averaged(logits: Logits, views: Iterable[Tensor], size: tuple[int, int], flip: bool) -> Tensor:
    """The mean of probabilities() over one image in several sizes, with `flip` also mirrored. (1, classes,
    *size). The views are used one after the other. Errors: ValueError if there is none.
    """
    total, count = None, 0
    for image in views:
        for mirrored in (False, True) if flip else (False,):
            found = probabilities(logits, image, size, mirrored)
            total, count = found if total is None else total + found, count + 1
    if total is None:
        raise ValueError("no view of the image")
    return total / count


def sides(
    size: tuple[int, int], longest: int, shortest: int, scales: Iterable[float]
) -> list[tuple[int, int]]:
    """Height and width of an image of `size` for each scale. Published: 0.5, 0.75, 1, 1.25, 1.5, 1.75."""
    return [fitted(size, int(longest * scale), int(shortest * scale)) for scale in scales]
