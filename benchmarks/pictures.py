"""Makes JPEGs similar to those of ImageNet: 482 x 413 pixels and 100 KB on average, half 4:2:0 and half
4:4:4, 3 % progressive.

Their content has the spectrum of photographs (the amplitude is proportional to 1 / frequency, and colours are
correlated) and some noise, so that entropy decoding, which takes most of the time, takes as long as for
photographs.
"""

from pathlib import Path

import numpy as np
from PIL import Image


def write(root: Path, train: int, val: int, classes: int = 4, copies: int = 1) -> None:
    """Write class folders root/train and root/val; each training picture `copies` times, as hard links."""
    random = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            path = root / split / f"n{number % classes:08d}" / f"{number:05d}_0.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            quality = int(random.integers(76, 92))
            picture(random).save(
                path, quality=quality, subsampling=2 * (number // classes % 2), progressive=number % 33 == 0
            )
            for copy in range(1, copies if split == "train" else 1):
                path.with_name(f"{number:05d}_{copy}.jpg").hardlink_to(path)


def picture(random: np.random.Generator) -> Image.Image:
    width, height = (int(np.clip(random.normal(mean, 60), 200, 700)) for mean in (482, 413))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = np.maximum(frequency, 1 / max(width, height)) ** -random.uniform(1.0, 1.25)

    def noise() -> np.ndarray:
        wave = np.fft.irfft2(amplitude * np.exp(2j * np.pi * random.random(amplitude.shape)), (height, width))
        return wave / wave.std()

    light = noise()
    pixels = np.stack([128 + 45 * (0.8 * light + 0.6 * noise()) for _ in range(3)], axis=-1) + random.normal(
        0, 3, (height, width, 1)
    )
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
