"""Sources of images. A source returns the bytes of a sample, its label, and its name for messages."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Data
from reconverge.data import scenes
from reconverge.data.folder import open_folder
from reconverge.data.maps import open_ade20k, open_folders
from reconverge.data.shards import open_shards


class Source(Protocol):
    """The images of a split. A source has label maps if it has `target`, and labels of images if it has not.

    target(sample) -> uint8 (H, W): the label of each pixel, and maps.IGNORED. Its `labels` are zeros.
    """

    classes: list[str]
    fingerprint: str  # hash of paths, sizes and labels of files, or of the checksums and labels in shards
    notes: list[str]  # remarks that the user should see before training

    def __len__(self) -> int: ...
    def labels(self, ids: np.ndarray) -> np.ndarray: ...
    def read(self, sample: int) -> bytes: ...
    def where(self, sample: int) -> str: ...


def open_sources(data: Data) -> tuple[Source, Source | None]:
    """The training images and the validation images; the latter are None if data.val is null.

    Errors: Stop(MISSING, PERMISSION, USAGE, DAMAGED).
    """
    return KINDS[data.kind](data)


def open_validation(data: Data, classes: list[str]) -> Source:
    """Only the validation images, labelled by the model's `classes`.

    Errors: as open_sources, and Stop(NOT_COMPARABLE) if the data have different classes.
    """
    if data.val is None:
        raise Stop(
            Exit.USAGE,
            "data.val=null",
            "a data set with validation images",
            "data.val=val if the data have them, or another data=",
        )
    if data.kind == "folder":
        return open_folder(root_of(data) / data.val, Path(data.cache).expanduser(), classes)
    validation = open_sources(data)[1]
    assert validation is not None, "data.val is not null"
    if validation.classes != classes:
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"the classes of {data.name} ({len(validation.classes)}) are not those of the model"
            f" ({len(classes)})",
            "validation images with the same classes as in training (classes.txt of the run)",
            "choose another data= or data.root=",
        )
    return validation


def root_of(data: Data) -> Path:
    """The folder data.root, for kinds of data that have one."""
    return Path(str(data.root)).expanduser()


def _folder(data: Data) -> tuple[Source, Source | None]:
    root, cache = root_of(data), Path(data.cache).expanduser()
    train = open_folder(root / data.train, cache)
    return train, None if data.val is None else open_folder(root / data.val, cache, train.classes)


def _shards(data: Data) -> tuple[Source, Source | None]:
    return open_shards(root_of(data), data.dataset, validation=data.val is not None)


def _digits(data: Data) -> tuple[Source, Source | None]:
    """The scanned digits of scikit-learn, written as class folders of PNG files, and read like other data.

    The validation images are a fifth of each class (scenes.split_digits).
    """
    root = Path(data.cache).expanduser() / "digits-1"
    if not root.exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        root.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=root.parent))
        for split, ids in scenes.split_digits(digits.target).items():
            for sample in ids:
                folder = new / split / str(digits.target[sample])
                folder.mkdir(parents=True, exist_ok=True)
                pixels = np.round(digits.images[sample] * (255 / 16)).astype(np.uint8)  # from 17 gray levels
                Image.fromarray(pixels).save(folder / f"{sample:04d}.png")
        try:
            new.rename(root)
        except OSError:  # another process has just written the same content
            shutil.rmtree(new)
    return _folder(replace(data, root=os.fspath(root)))


class Synthetic:
    """Noise images, computed from their sample ids, to measure speed and memory without a data set."""

    def __init__(self, images: int, classes: int, split: str):
        self.images, self.split = images, split
        self.notes: list[str] = []
        self.classes = [f"class{label:05d}" for label in range(classes)]
        self.fingerprint = sha256(f"synthetic-1 {split} {images} {classes}".encode()).hexdigest()

    def __len__(self) -> int:
        return self.images

    def labels(self, ids: np.ndarray) -> np.ndarray:
        return ids % len(self.classes)

    def read(self, sample: int) -> bytes:
        noise = chance.uniform((400, 500, 3), "synthetic", self.split, sample)  # ImageNet's usual size
        return b"P6 500 400 255\n" + (noise * 256).astype(np.uint8).tobytes()  # a PPM file

    def where(self, sample: int) -> str:
        return f"synthetic image {sample}"


def _synthetic(data: Data) -> tuple[Source, Source | None]:
    validation = None if data.val is None else Synthetic(max(1, data.images // 10), data.classes, "val")
    return Synthetic(data.images, data.classes, "train"), validation


def _scenes(data: Data) -> tuple[Source, Source | None]:
    cache = Path(data.cache).expanduser()
    return open_folders(scenes.written(cache), cache, val=data.val and "val", ignore=None)


def _maps(data: Data) -> tuple[Source, Source | None]:
    return open_folders(root_of(data), Path(data.cache).expanduser(), data.train, data.val, data.ignore)


def _ade20k(data: Data) -> tuple[Source, Source | None]:
    return open_ade20k(root_of(data), Path(data.cache).expanduser(), data.val is not None)


KINDS: dict[str, Callable[[Data], tuple[Source, Source | None]]] = {
    "digits": _digits,
    "folder": _folder,
    "shards": _shards,
    "synthetic": _synthetic,
    "scenes": _scenes,
    "maps": _maps,
    "ade20k": _ade20k,
}
