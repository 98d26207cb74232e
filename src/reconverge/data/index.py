"""The index of a class folder: one row a sample, memory-mapped, made once and kept in the cache.

1.28 M files are listed with a progress bar the first time only; no Python object per image is ever kept.
"""

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

from reconverge.errors import Exit, Stop

VERSION = "index-1"
ROW = np.dtype([("start", "<u8"), ("length", "<u4"), ("label", "<i4"), ("bytes", "<u8")])  # path in names.bin, class, file size


# Formats that Pillow knows by name but cannot decode by itself.
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


class Index:
    """Rows of one split, by sample id. `classes` are the sorted folder names; `fingerprint` hashes paths, sizes and labels."""

    def __init__(self, folder: Path, root: Path, about: dict[str, Any]):
        self.root = root
        self.classes: list[str] = about["classes"]
        self.fingerprint: str = about["fingerprint"]
        self.ignored: list[str] = about["ignored"]  # paths of files that are no images
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        self._names = np.memmap(folder / "names.bin", np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels, int64, of sample ids of any shape."""
        return self._rows["label"][ids].astype(np.int64)

    def path(self, sample: int) -> Path:
        row = self._rows[sample]
        return self.root / os.fsdecode(self._names[row["start"] : row["start"] + row["length"]].tobytes())

    def bytes(self, sample: int) -> int:
        """Size of the file when it was listed."""
        return int(self._rows[sample]["bytes"])


def open_index(root: Path, cache: Path, classes: list[str] | None = None) -> Index:
    """The index of the class folders below `root`, listed anew if a folder has changed since it was cached.

    `classes`: those of the training split, which give the labels of this one. Errors: Stop(MISSING) for a missing or
    empty folder, Stop(USAGE) for a class that `classes` lacks.
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
    return Index(page.parent / about["fingerprint"], root, about)


def _modified(root: Path, folders: Any) -> dict[str, int]:
    """Time of the last change (ns) of each folder: adding or removing a file changes its folder's."""
    return {name: (root / name).stat().st_mtime_ns if (root / name).is_dir() else 0 for name in folders}


def _list(root: Path, page: Path, classes: list[str] | None) -> dict[str, Any]:
    """List the files; keep their rows in a folder named by the fingerprint, and what is known of them on `page`."""
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    known = classes or found
    if strangers := sorted(set(found) - set(known)):
        raise Stop(
            Exit.USAGE,
            f"{root}: {len(strangers)} classes that the training images lack: {', '.join(strangers[:5])}",
            f"the {len(known)} folder names of the training images",
            "the folder names, or data.val=",
        )
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in STUBS}
    labels = {name: label for label, name in enumerate(known)}
    rows: list[np.ndarray] = []
    names, ignored, modified, hashed, start = bytearray(), [], {".": root.stat().st_mtime_ns}, sha256(), 0
    for name in track(found, f"listing {root}", transient=True, disable=len(found) < 100):
        of_class = []
        for path, size in _files(root, name, modified):
            if os.path.splitext(path)[1].lower() not in suffixes:
                ignored.append(path)
                continue
            encoded = os.fsencode(path)
            of_class.append((start, len(encoded), labels[name], size))
            names += encoded
            start += len(encoded)
            hashed.update(encoded + b"\0%d\0%d\n" % (size, labels[name]))
        if not of_class:
            raise Stop(
                Exit.MISSING,
                f"no image in {root / name}",
                f"image files: {', '.join(sorted(suffixes)[:8])}, ...",
                "fill or remove the folder",
            )
        rows.append(np.array(of_class, ROW))
    if not rows:
        raise Stop(
            Exit.MISSING, f"no class folder in {root}", "one folder a class, with its images", "data.root=, data.train= or data.val="
        )
    hashed.update(json.dumps(known).encode())
    about = {"root": str(root.resolve()), "classes": known, "fingerprint": hashed.hexdigest(), "ignored": ignored, "modified": modified}
    _write(page, about, np.concatenate(rows), bytes(names))
    return about


def _write(page: Path, about: dict[str, Any], rows: np.ndarray, names: bytes) -> None:
    """Whole or not at all: written beside and renamed. What a fingerprint stands for never changes, so other runs may have it open."""
    page.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=page.parent))
    np.save(new / "rows.npy", rows)
    (new / "names.bin").write_bytes(names)
    try:
        new.rename(page.parent / about["fingerprint"])
    except OSError:  # it is there already
        shutil.rmtree(new)
    draft = page.with_name(f".{page.name}-{os.getpid()}")
    draft.write_text(json.dumps(about))
    draft.rename(page)


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
