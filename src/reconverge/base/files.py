"""Files: reading by position, retries after short faults, atomic replacement, and lines of JSON. Imports no
torch.

A run's folder may come from somebody else. Files in it are read, and appended to, only if they are plain
files, and are replaced under a name that nobody can foresee: a link in the folder leads nowhere.
"""

import errno
import json
import math
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO, TypeVar

from reconverge.base.errors import Exit, Stop

PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EREMOTEIO,
    errno.ECONNRESET,
    errno.ENETDOWN,
    errno.EHOSTDOWN,
}
WAITS = (0.1, 1.0, 5.0)  # seconds before each retry

Result = TypeVar("Result")


def patiently(job: Callable[[], Result], where: Callable[[], str]) -> Result:
    """What `job` returns. Faults of the disk or network are retried, and printed with the text of `where`.

    Errors: Stop(DISK) if the last retry fails too.
    """
    for wait in WAITS:
        try:
            return job()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            print(f"{where()}: {error.strerror}; trying again in {wait} s", file=sys.stderr, flush=True)
        time.sleep(wait)
    try:
        return job()
    except OSError as error:
        if error.errno not in PASSING:
            raise
        raise Stop(
            Exit.DISK,
            f"{where()}: {error.strerror}, {len(WAITS) + 1} times in {sum(WAITS):.0f} s",
            "a disk and a network that work",
            "check the disk or network, then run the same command again to continue from the last checkpoint",
        ) from error


@contextmanager
def anew(path: Path) -> Iterator[Path]:
    """A path of the same name, in a new folder beside `path`. What is written there replaces `path`
    atomically when the context ends without an error: if the process is killed, the old or the new file is
    there, whole. A link at `path` is replaced; its target stays as it is.

    Errors: OSError; then no part of the new file is left.
    """
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / path.name
        yield draft
        sync(draft)
        draft.replace(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file `path` atomically, as `anew` does. Errors: OSError."""
    with anew(path) as draft:
        draft.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)


def read_plain(path: Path) -> bytes:
    """The contents of a plain file. Errors: OSError; Stop(DAMAGED) if it is a link, a pipe, a device."""
    with open(_opened(path, os.O_RDONLY), "rb") as file:
        return file.read()


def read_text(path: Path) -> str:
    """The text of a plain file. Errors: as read_plain, and ValueError if it is no text."""
    return read_plain(path).decode("utf-8")


def appending(path: Path) -> TextIO:
    """A plain file, made if it is not there, to append lines to. Errors: as read_plain."""
    return open(_opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a")


def _opened(path: Path, flags: int) -> int:
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if not (path.is_symlink() or error.errno == errno.ENXIO):  # ENXIO: a pipe that nobody reads
            raise
        raise no_plain_file(path) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise no_plain_file(path)
    return number


def no_plain_file(path: Path) -> Stop:
    return Stop(
        Exit.DAMAGED,
        f"{path} is a link, or another thing that is no plain file",
        "plain files and folders in the folder of a run, a checkpoint or an export",
        "put the file itself there; to keep a run on another disk, make its whole folder a link",
    )


def sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a following rename cannot reach the disk first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checksum(content: dict[str, Any]) -> str:
    """The sha256 of json.dumps(content, sort_keys=True), without its entry "sha256", in hexadecimal.

    A file of JSON carries it as that entry, and so shows that no number in it was changed by accident.
    """
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class ByPosition:
    """An open file that is read at given positions, so that forked processes may share it. Closed when the
    object is deleted.
    """

    def __init__(self, path: Path):
        self._number = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._number, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


# ---- files that grow by a line of JSON: metrics.jsonl, record.jsonl, quarantine.jsonl ----


def json_line(values: dict[str, Any]) -> str:
    """One line of JSON. JSON has no infinity and NaN, which fp16 can produce, so they are written as null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    return json.dumps(finite) + "\n"


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a file, or none if there is no file. A kill may have cut the last line short."""
    text = read_text(path).split("\n") if path.exists() or path.is_symlink() else []
    return [json.loads(line) for line in text[:-1]]
