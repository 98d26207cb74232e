"""Class folders: listed once into an index that is kept in the cache, and read file by file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import patiently
from reconverge.data import index

VERSION = "index-2"  # names the folder of the cache

# Formats that Pillow knows by name but cannot decode by itself.
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def suffixes() -> set[str]:
    """Of the files that are taken for images: those of the formats that Pillow decodes."""
    return {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in STUBS
    }


class Folder:
    """A source (see sources.py) of the files of class folders.

    `fingerprint` hashes paths, sizes and labels, not contents.
    """

    def __init__(self, root: Path, about: dict[str, Any], rows: Path):
        self.root = root
        self.index = index.Index(rows)
        self.classes: list[str] = about["classes"]
        self.fingerprint: str = about["fingerprint"]
        self.ignored: list[str] = about["ignored"]  # paths of files that are no images
        self.notes = [f"{len(self.ignored)} files that are no images left out"] if self.ignored else []
        self.labels = self.index.labels

    def __len__(self) -> int:
        return len(self.index)

    def path(self, sample: int) -> Path:
        return self.root / self.index.key(sample)

    def where(self, sample: int) -> str:
        return f"{self.path(sample)} (sample {sample})"

    def read(self, sample: int) -> bytes:
        """Errors: Stop(MISSING, PERMISSION, DISK), and NOT_COMPARABLE for a file that has changed since it
        was listed.
        """
        path, listed = self.path(sample), int(self.index.row(sample)["size"])
        try:
            data = patiently(path.read_bytes, path.__str__)
        except FileNotFoundError:
            raise Stop(
                Exit.MISSING,
                f"{self.where(sample)} is gone",
                "the files that were listed when the run began",
                "put it back, or start a new run",
            ) from None
        except PermissionError:
            raise Stop(
                Exit.PERMISSION,
                f"{self.where(sample)} may not be read",
                "files that this user may read",
                f"chmod +r {path}",
            ) from None
        if len(data) != listed:
            raise Stop(
                Exit.NOT_COMPARABLE,
                f"{self.where(sample)} has {len(data)} bytes and had {listed} when it was listed",
                "the files that were listed when the run began",
                "put it back; or touch its folder, so that it is listed anew, and start a new run",
            )
        return data


def open_folder(root: Path, cache: Path, classes: list[str] | None = None) -> Folder:
    """The images below `root`, listed anew if a folder has changed since it was cached.

    `classes`: those of the training split, which give the labels of this one. Errors: Stop(MISSING) for a
    missing or empty folder, Stop(USAGE) for a class that `classes` lacks.
    """
    if not root.is_dir():
        raise Stop(
            Exit.MISSING,
            f"no folder {root}",
            "a folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg",
            "data.root=, data.train= or data.val=",
        )
    identity = sha256(json.dumps([str(root.resolve()), classes]).encode()).hexdigest()[:16]
    page = cache / VERSION / f"{identity}.json"
    about = json.loads(page.read_text()) if page.exists() else None
    if about is None or about["modified"] != _modified(root, about["modified"]):
        about = _list(root, page, classes)
    return Folder(root, about, page.with_name(f"{about['fingerprint']}.npy"))


def _modified(root: Path, folders: Any) -> dict[str, int]:
    """Time of the last change (ns) of each folder: adding or removing a file changes its folder's."""
    return {name: (root / name).stat().st_mtime_ns if (root / name).is_dir() else 0 for name in folders}


def _list(root: Path, page: Path, classes: list[str] | None) -> dict[str, Any]:
    """List the files; keep their rows in a file named by the fingerprint, and what is known of them on
    `page`.
    """
    found = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )
    known = classes or found
    if strangers := sorted(set(found) - set(known)):
        raise Stop(
            Exit.USAGE,
            f"{root}: {len(strangers)} folders that are no classes: {', '.join(strangers[:5])}",
            f"the {len(known)} classes of the training images or of the model:"
            f" {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}",
            "the folder names, or data.root=, data.val=",
        )
    images = suffixes()
    labels = {name: label for label, name in enumerate(known)}
    parts: list[np.ndarray] = []
    ignored, modified, hashed = [], {".": root.stat().st_mtime_ns}, sha256()
    for name in track(found, f"listing {root}", transient=True, disable=len(found) < 100):
        of_class = []
        for path, size in _files(root, name, modified):
            if os.path.splitext(path)[1].lower() not in images:
                ignored.append(path)
                continue
            encoded = os.fsencode(path)
            of_class.append((0, 0, size, labels[name], 0, encoded))
            hashed.update(encoded + b"\0%d\0%d\n" % (size, labels[name]))
        if not of_class:
            raise Stop(
                Exit.MISSING,
                f"no image in {root / name}",
                f"image files: {', '.join(sorted(images)[:8])}, ...",
                "fill or remove the folder",
            )
        parts.append(np.array(of_class, index.row(max(len(entry[-1]) for entry in of_class))))
    if not parts:
        raise Stop(
            Exit.MISSING,
            f"no class folder in {root}",
            "one folder a class, with its images",
            "data.root=, data.train= or data.val=",
        )
    hashed.update(json.dumps(known).encode())
    about = {
        "root": str(root.resolve()),
        "classes": known,
        "fingerprint": hashed.hexdigest(),
        "ignored": ignored,
        "modified": modified,
    }
    _write(page, about, parts)
    return about


def _write(page: Path, about: dict[str, Any], parts: list[np.ndarray]) -> None:
    """Whole or not at all: written beside and renamed.

    What a fingerprint stands for never changes, so other runs may have it open.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=page.parent))
    index.write(new / "rows.npy", parts)
    (new / "rows.npy").rename(page.with_name(f"{about['fingerprint']}.npy"))
    (new / page.name).write_text(json.dumps(about))
    (new / page.name).rename(page)
    shutil.rmtree(new)


def _files(root: Path, below: str, modified: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Path below root and size of every file of a class, sorted; hidden ones left out."""
    modified[below] = (root / below).stat().st_mtime_ns
    for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(root, f"{below}/{entry.name}", modified)
        else:
            yield f"{below}/{entry.name}", entry.stat().st_size
