"""Listings of folders in the cache: what was listed is read again, until a folder has changed."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reconverge.base import files
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.data import image as images
from reconverge.data import index
from reconverge.data.image import Undecodable
from reconverge.data.visits import Visits


class Listed:
    """The images of a listed folder: what sources (see sources.py) of class folders and of label maps share.

    `fingerprint` is a hash of what was listed; `broken` are images whose headers are unreadable, and why.
    """

    def __init__(self, root: Path, about: dict[str, Any], rows: Path):
        self.root = root
        self.index = index.Index(rows)
        self.classes: list[str] = about["classes"]
        self.fingerprint: str = about["fingerprint"]
        # Without those that were repaired since they were listed.
        self.broken: dict[str, str] = {
            path: said for path, said in about["broken"].items() if isinstance(looked_at(root / path), str)
        }

    def __len__(self) -> int:
        return len(self.index)

    def path(self, sample: int) -> Path:
        return self.root / self.index.key(sample)

    def where(self, sample: int) -> str:
        return f"{self.path(sample)} (sample {sample})"

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """int64 labels of sample ids; zeros for images that have label maps instead."""
        return self.index.labels(ids)

    def read(self, sample: int) -> bytes:
        """The image file. Errors: Stop(MISSING, PERMISSION, DISK), or NOT_COMPARABLE if its size has changed
        since it was listed.
        """
        size = int(self.index.row(sample)["size"])
        return content(self.path(sample), size, self.where(sample))


def rows(page: Path, about: dict[str, Any]) -> Path:
    return page.with_name(f"{about['fingerprint']}.npy")


def cached(page: Path) -> dict[str, Any] | None:
    """What an earlier start has listed, if both of its files are as they were written."""
    try:
        kept = json.loads(page.read_text())
        about = kept["about"]
        whole = kept["sha256"] == files.checksum(kept) and about["rows"] == files.sha256_of(rows(page, about))
    except (OSError, ValueError, KeyError, TypeError):  # missing, cut off, or not what was written
        whole = False
    if not whole and page.exists():
        say(f"the cached index {page} is damaged; the folder is listed again")
    return about if whole else None


def modified(root: Path, folders: Any) -> dict[str, int]:
    """Time of the last change (ns) of each folder, which changes when a file is added or removed."""
    return {name: (root / name).stat().st_mtime_ns if (root / name).is_dir() else 0 for name in folders}


def looked_at(path: Path) -> list[str] | str:
    """The kinds (image.kinds) of an image file, by its header; or a text that says why it is unreadable."""
    try:
        with open(path, "rb") as file:
            image = images.opened(file)
            return images.unusable(image) or images.kinds(image)
    except Undecodable as error:
        return str(error)
    except OSError:  # reading it says more
        return []


def write(page: Path, about: dict[str, Any], parts: list[np.ndarray]) -> None:
    """Write both files whole: first under another name, synced, then renamed. `about` gets the checksum of
    the rows, and the page has its own.

    The rows of a fingerprint never change, so other runs may have the file open.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=page.parent))
    index.write(new / "rows.npy", parts)
    about["rows"] = files.sha256_of(new / "rows.npy")
    files.sync(new / "rows.npy")
    (new / "rows.npy").rename(rows(page, about))
    files.write_whole(page, json.dumps({"about": about, "sha256": files.checksum({"about": about})}))
    shutil.rmtree(new)


def files_below(
    root: Path, below: str, modified: dict[str, int], visits: Visits, hidden: list[str]
) -> Iterator[tuple[str, int | None]]:
    """Path below `root` and size of every file of a class, sorted; no size for a pipe or a device, which is
    never opened. Hidden files are only added to `hidden`.
    """
    modified[below] = (root / below).stat().st_mtime_ns
    for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            hidden.append(f"{below}/{entry.name}")
        elif entry.is_dir():
            if visits.enters(entry.path):
                yield from files_below(root, f"{below}/{entry.name}", modified, visits, hidden)
        else:
            about = entry.stat()
            yield f"{below}/{entry.name}", about.st_size if stat.S_ISREG(about.st_mode) else None


def content(path: Path, listed: int, where: str) -> bytes:
    """The bytes of a file that had `listed` bytes when its folder was listed. `where` names it in messages.

    Errors: Stop(MISSING, PERMISSION, DISK), or NOT_COMPARABLE if its size has changed.
    """
    try:
        data = files.patiently(path.read_bytes, path.__str__)
    except FileNotFoundError:
        raise Stop(
            Exit.MISSING,
            f"{where} does not exist any more",
            "all files that existed when the run was started",
            "restore the file, or start a new run with another run=NAME",
        ) from None
    except PermissionError:
        raise Stop(
            Exit.PERMISSION,
            f"{where} is not readable",
            "files that this user may read",
            f"chmod +r {path}",
        ) from None
    if len(data) != listed:
        raise changed(path, f"{where} has {len(data)} bytes, but had {listed} when the folder was listed")
    return data


def changed(path: Path, given: str) -> Stop:
    """The error for a file that is another one than when its folder was listed."""
    return Stop(
        Exit.NOT_COMPARABLE,
        given,
        "the same files as when the run was started",
        f"restore the file; or start a new run with another run=NAME after `touch {path.parent}`,"
        " which makes reconverge list the folder again",
    )
