"""Random erasing, Mixup and CutMix as the published runs had them (timm 0.3.2), written slowly in numpy, from
the same random numbers as reconverge's.

`python tests/published_engine.py` compares both with the installed timm; test_libraries.py starts it under
each version of timm that can be had.
"""

import math
import random

import numpy as np
import torch

from reconverge.base import chance


def erased(images, probability, key):
    """Images float32 (N, 3, H, W) with, in some of them, a box of noise. key = (seed, step, microbatch)"""
    python = random.Random(chance.key(key[0], "erase", *key[1:], "python"))
    noise = torch.Generator().manual_seed(chance.key(key[0], "erase", *key[1:], "torch"))
    result = images.copy()
    _, channels, height, width = images.shape
    for image in result:
        if python.random() > probability:
            continue
        for _ in range(10):
            area = (0.02 + (1 / 3 - 0.02) * python.random()) * height * width
            low, high = math.log(0.3), math.log(1 / 0.3)
            aspect = math.exp(low + (high - low) * python.random())
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top = python.randint(0, height - rows)
                left = python.randint(0, width - columns)
                pixels = torch.empty(channels, rows, columns).normal_(generator=noise)
                image[:, top : top + rows, left : left + columns] = pixels.numpy()
                break
    return result


def drawn(key, mixup, cutmix, probability, switch, height, width):
    """Share of the image itself, and the box (top, bottom, left, right) of CutMix; None for Mixup."""
    numpy = np.random.RandomState(chance.key(key[0], "mix", *key[1:], "numpy") % 2**32)
    if not (mixup or cutmix) or numpy.random_sample() >= probability:
        return 1.0, None
    cut = numpy.random_sample() < switch if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cut else mixup
    share = float(numpy.beta(alpha, alpha))
    if not cut or share == 1:
        return share, None
    rows, columns = (int(length * math.sqrt(1 - share)) for length in (height, width))
    row, column = int(numpy.randint(0, height)), int(numpy.randint(0, width))
    top, bottom = max(0, row - rows // 2), min(height, row + rows // 2)
    left, right = max(0, column - columns // 2), min(width, column + columns // 2)
    return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


def mixed(images, labels, classes, key, mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, smoothing=0.1):
    """Images float32 (N, 3, H, W) and labels (N,) -> images, targets float32 (N, classes)."""
    share, box = drawn(key, mixup, cutmix, probability, switch, *images.shape[2:])
    ours, theirs = np.float32(share), np.float32(1 - share)
    result = images.copy()
    if box is not None:
        top, bottom, left, right = box
        for mine, partner in zip(result, images[::-1], strict=True):
            mine[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    elif share != 1:
        result = images * ours + images[::-1] * theirs
    off = np.float32(smoothing / classes)
    smooth = np.full((len(labels), classes), off, np.float32)
    smooth[np.arange(len(labels)), labels] = np.float32(1 - smoothing + smoothing / classes)
    return result, smooth * ours + smooth[::-1] * theirs


def compared(microbatches, images=4, side=224, classes=10, erase=0.25, **mix):
    """How many microbatches of reconverge have other bits than these functions, of each kind."""
    from reconverge.config.settings import Mix as Settings
    from reconverge.data.mix import Mix

    ours = Mix(erase, Settings(**mix), classes)
    found = {"mixup": 0, "cutmix": 0, "not mixed": 0, "other bits": 0}
    for number in range(microbatches):
        key = (7, number // 3, number % 3)
        before = chance.uniform((images, 3, side, side), "images", number % 10).astype(np.float32)
        labels = chance.uniform((images,), "labels", number) * classes
        settings = Settings(**mix)
        expected, targets = mixed(
            erased(before, erase, key), labels.astype(int), classes, key, settings.mixup, settings.cutmix,
            settings.probability, settings.switch, settings.smoothing,
        )  # fmt: skip
        pixels, soft = ours(torch.from_numpy(before.copy()), torch.from_numpy(labels.astype(np.int64)), key)
        share, box = drawn(
            key, settings.mixup, settings.cutmix, settings.probability, settings.switch, side, side
        )
        found["not mixed" if share == 1 else "cutmix" if box else "mixup"] += 1
        same = np.array_equal(pixels.numpy(), expected) and np.array_equal(soft.numpy(), targets)
        found["other bits"] += not same
    return found


if __name__ == "__main__":
    import timm

    print(timm.__version__, compared(300))
