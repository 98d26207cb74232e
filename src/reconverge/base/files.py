"""Files: reading by position, retries after short faults, atomic replacement, and lines of JSON. Imports no
torch.
"""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

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


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file `path` atomically: if the process is killed, the old or the new file is there, whole.

    Errors: OSError; then no part of the new file is left.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    draft = path.with_name(f".{path.name}.new")
    try:
        with open(draft, "wb") as file:
            file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def sync(path: Path) -> None:
    """Wait until the contents of a file are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    text = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in text[:-1]]
