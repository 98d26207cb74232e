"""Reads archives and folders as streams of entries, without unpacking them to disk."""

import gzip
import os
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from reconverge.base.errors import Exit, Stop
from reconverge.data import tar
from reconverge.data.visits import Visits

Entry = tuple[str, Callable[[], bytes]]  # name, and a function that reads the contents


class Gzip(gzip.GzipFile):
    """A gzip stream that reports damage as Stop(DAMAGED)."""

    def read(self, size: int | None = -1) -> bytes:
        return self._named(lambda: super(Gzip, self).read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._named(lambda: super(Gzip, self).seek(offset, whence))

    def _named(self, job: Callable[[], Any]) -> Any:
        try:
            return job()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Stop(
                Exit.DAMAGED, f"{self.name}: {error}", "a complete gzip file", "download it again"
            ) from None


def opened(path: Path) -> BinaryIO:
    """Open a tar file, plain or gzipped, for reading from its beginning."""
    if path.suffix == ".gz":
        return Gzip(path)  # type: ignore[return-value]
    return open(path, "rb", buffering=1 << 20)


def entries(path: Path) -> Iterator[Entry]:
    """The entries of a tar file. Each must be read before the next one is requested."""
    with opened(path) as file:
        for member in tar.members(file, str(path)):
            yield member.name, partial(tar.read, file, member, str(path))


class Tree(Protocol):
    """Files below a root folder, by relative path, in sorted order."""

    again: list[str]  # links that lead to a folder that is read already, found while reading
    ignored: list[str]  # what is no file, found while reading

    def folders(self, below: str) -> list[str]: ...
    def beside(self, below: str) -> list[str]: ...  # what is no class folder: files, and hidden folders
    def entries(self, below: str) -> Iterator[Entry]: ...
    def total_bytes(self, below: str) -> int: ...
    def has(self, name: str) -> bool: ...
    def read(self, name: str) -> bytes: ...


class FolderTree:
    def __init__(self, root: Path):
        self.root = root
        self.again: list[str] = []  # links that lead to a folder that is read already, found while reading
        self.ignored: list[str] = []
        self._visits: dict[str, Visits] = {}  # by the folder that holds the class folders

    def folders(self, below: str) -> list[str]:
        return [
            name
            for name in self._names(below)
            if not name.startswith(".") and (self.root / below / name).is_dir()
        ]

    def beside(self, below: str) -> list[str]:
        return sorted({*self._names(below)} - {*self.folders(below)})

    def entries(self, below: str) -> Iterator[Entry]:
        """The files of one folder, for example of a class. Each folder below it is visited once."""
        top = os.path.dirname(below)
        if top not in self._visits:
            self._visits[top] = Visits(self.root / top, self.folders(top))
        visits = self._visits[top]
        known = len(visits.again)
        for name in self._below(below, visits, self.ignored):
            yield name, (self.root / name).read_bytes
        self.again += [os.path.relpath(path, self.root) for path in visits.again[known:]]

    def total_bytes(self, below: str) -> int:
        visits = Visits(self.root / below, self.folders(below))
        tops = [below, *(f"{below}/{name}" for name in self.folders(below))]
        names = [name for top in tops for name in self._below(top, visits, [])]
        return sum(os.stat(self.root / name).st_size for name in names)

    def _below(self, below: str, visits: Visits, ignored: list[str]) -> Iterator[str]:
        for name in self._names(below):
            path = self.root / below / name
            if not path.is_dir():
                if path.exists() and not path.is_file():  # a pipe or a device is never opened
                    ignored.append(f"{below}/{name}")
                else:
                    yield f"{below}/{name}"
            elif visits.enters(os.fspath(path)):
                yield from self._below(f"{below}/{name}", visits, ignored)

    def has(self, name: str) -> bool:
        return (self.root / name).exists()

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def _names(self, below: str) -> list[str]:
        return sorted(os.listdir(self.root / below)) if (self.root / below).is_dir() else []


class ZipTree:
    def __init__(self, path: Path):
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise Stop(Exit.DAMAGED, f"{path}: {error}", "a complete zip file", "download it again") from None
        self._where = str(path)
        self.again: list[str] = []
        self.ignored: list[str] = []
        self._names = sorted(name for name in self._zip.namelist() if not name.endswith("/"))
        for name in self._names:
            tar.refuse_path(name, self._where)

    def folders(self, below: str) -> list[str]:
        parts = [name[len(below) + 1 :].partition("/") for name in self._below(below)]
        return sorted({name for name, slash, _ in parts if slash and not name.startswith(".")})

    def beside(self, below: str) -> list[str]:
        names = {name[len(below) + 1 :].partition("/")[0] for name in self._below(below)}
        return sorted(names - {*self.folders(below)})

    def entries(self, below: str) -> Iterator[Entry]:
        for name in self._below(below):
            yield name, partial(self.read, name)

    def total_bytes(self, below: str) -> int:
        return sum(self._zip.getinfo(name).file_size for name in self._below(below))

    def has(self, name: str) -> bool:
        return name in self._zip.NameToInfo

    def read(self, name: str) -> bytes:
        if (size := self._zip.getinfo(name).file_size) > tar.LARGEST:
            raise Stop(
                Exit.DAMAGED,
                f"{self._where}, {name} has {size} bytes",
                f"files of at most {tar.LARGEST} bytes in the zip file",
                "download the zip file again, from a source that you trust",
            )
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise Stop(
                Exit.DAMAGED, f"{self._where}, {name}: {error}", "a complete zip file", "download it again"
            ) from None

    def _below(self, below: str) -> Iterator[str]:
        for at in range(bisect_left(self._names, below + "/"), len(self._names)):
            if not self._names[at].startswith(below + "/"):
                return
            yield self._names[at]
