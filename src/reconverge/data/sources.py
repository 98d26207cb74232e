"""Where images come from. A source has `classes`, `fingerprint`, `len`, `labels(ids)` and `image(id)`."""

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

from reconverge import chance
from reconverge.data.index import Index, open_index
from reconverge.errors import Exit, Stop
from reconverge.settings import Data


class Source(Protocol):
    classes: list[str]
    fingerprint: str  # of what decides the images: paths, sizes and labels of files, not their content
    ignored: int  # files that are no images

    def __len__(self) -> int: ...
    def labels(self, ids: np.ndarray) -> np.ndarray: ...
    def image(self, sample: int) -> Image.Image: ...


def open_sources(data: Data) -> tuple[Source, Source | None]:
    """The training and the validation images; None for these where data.val is null. Errors: Stop(MISSING, PERMISSION, USAGE)."""
    return KINDS[data.kind](data)


class Folder:
    """Images of class folders, in any format that Pillow reads, as RGB."""

    def __init__(self, index: Index):
        self.index = index
        self.classes = index.classes
        self.fingerprint = index.fingerprint
        self.ignored = len(index.ignored)
        self.labels = index.labels

    def __len__(self) -> int:
        return len(self.index)

    def image(self, sample: int) -> Image.Image:
        """RGB as Pillow's convert gives it, whatever the mode of the file; EXIF is not parsed.

        Errors: Stop(DAMAGED, MISSING, PERMISSION), and NOT_COMPARABLE for a file that has changed since it was listed.
        """
        path = self.index.path(sample)
        try:
            with open(path, "rb") as file:
                if (size := os.fstat(file.fileno()).st_size) != self.index.bytes(sample):
                    raise Stop(
                        Exit.NOT_COMPARABLE,
                        f"{path} (sample {sample}) has {size} bytes and had {self.index.bytes(sample)} when it was listed",
                        "the files that were listed when the run began",
                        "put it back; or touch its folder, so that it is listed anew, and start a new run",
                    )
                return Image.open(file).convert("RGB")
        except Stop:
            raise
        except FileNotFoundError:
            raise Stop(
                Exit.MISSING,
                f"{path} (sample {sample}) is gone",
                "the files that were listed when the run began",
                "put it back, or start a new run",
            ) from None
        except PermissionError:
            raise Stop(
                Exit.PERMISSION, f"{path} (sample {sample}) may not be read", "files that this user may read", f"chmod +r {path}"
            ) from None
        except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error and more on broken files
            raise Stop(
                Exit.DAMAGED,
                f"{path} (sample {sample}): {type(error).__name__}: {error}",
                "images that Pillow can decode whole",
                "replace or remove the file, and start a new run",
            ) from None


def open_validation(data: Data, classes: list[str]) -> Source:
    """The validation images alone, with the labels of a model's `classes`.

    Errors: as open_sources, and Stop(NOT_COMPARABLE) for other classes.
    """
    if data.val is None:
        raise Stop(Exit.USAGE, "data.val=null", "a data set with validation images", "data.val=val, or another data=")
    if data.kind == "folder":
        return Folder(open_index(Path(str(data.root)).expanduser() / data.val, Path(data.cache).expanduser(), classes))
    validation = open_sources(data)[1]
    assert validation is not None, "data.val is not null"
    if validation.classes != classes:
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"{data.name} has {len(validation.classes)} classes, and the model {len(classes)} or others",
            "validation images with the classes of training (classes.txt)",
            "data= or data.root=",
        )
    return validation


def _folder(data: Data) -> tuple[Source, Source | None]:
    root, cache = Path(str(data.root)).expanduser(), Path(data.cache).expanduser()
    train = open_index(root / data.train, cache)
    return Folder(train), None if data.val is None else Folder(open_index(root / data.val, cache, train.classes))


def _digits(data: Data) -> tuple[Source, Source | None]:
    """The scanned digits that scikit-learn bundles, as PNG class folders, read like any other data.

    A fifth of each class is held out, the same on every machine: the images with the smallest keys.
    """
    root = Path(data.cache).expanduser() / "digits-1"
    if not root.exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        root.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=root.parent))
        for label in range(10):
            ids = sorted(np.flatnonzero(digits.target == label), key=lambda sample: chance.key("digits-1", int(sample)))
            for rank, sample in enumerate(ids):
                folder = new / ("val" if rank < round(len(ids) / 5) else "train") / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                pixels = np.round(digits.images[sample] * (255 / 16)).astype(np.uint8)  # scanned in 17 levels
                Image.fromarray(pixels).save(folder / f"{sample:04d}.png")
        try:
            new.rename(root)
        except OSError:  # another process was first, with the same content
            shutil.rmtree(new)
    return _folder(replace(data, root=os.fspath(root)))


class Synthetic:
    """Noise, each image a function of its sample id, for speed and memory without a data set."""

    def __init__(self, images: int, classes: int, split: str):
        self.images, self.split, self.ignored = images, split, 0
        self.classes = [f"class{label:05d}" for label in range(classes)]
        self.fingerprint = sha256(f"synthetic-1 {split} {images} {classes}".encode()).hexdigest()

    def __len__(self) -> int:
        return self.images

    def labels(self, ids: np.ndarray) -> np.ndarray:
        return ids % len(self.classes)

    def image(self, sample: int) -> Image.Image:
        noise = chance.uniform((400, 500, 3), "synthetic", self.split, sample)  # ImageNet's usual size
        return Image.fromarray((noise * 256).astype(np.uint8))


def _synthetic(data: Data) -> tuple[Source, Source | None]:
    validation = None if data.val is None else Synthetic(max(1, data.images // 10), data.classes, "val")
    return Synthetic(data.images, data.classes, "train"), validation


KINDS: dict[str, Callable[[Data], tuple[Source, Source | None]]] = {"digits": _digits, "folder": _folder, "synthetic": _synthetic}
