"""Tar archives, read strictly: what is not a whole archive is an error, never a shorter list.

Python's tarfile and webdataset take a damaged header or a cut between two members for the end of the archive,
and what followed is silently gone. Here an archive ends with its end-of-archive block, or it is damaged.
"""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from reconverge.base.errors import Exit, Stop

BLOCK = tarfile.BLOCKSIZE  # 512 bytes
LARGEST = 1 << 28  # bytes of one image or label; more is a damaged or hostile header
REGULAR, DIRECTORY, EXTENDED, LONG_NAME, GLOBAL = (tarfile.REGTYPE, tarfile.AREGTYPE), b"5", b"x", b"L", b"g"


class Member(NamedTuple):
    name: str
    start: int  # byte of the file where the data begins
    size: int  # bytes


def members(
    file: BinaryIO, where: str, end: int | None = None, largest: int | None = LARGEST
) -> Iterator[Member]:
    """Regular files of the archive that begins at the file's position and, if it lies in another one, takes
    up to `end`.

    The file is left at each member's data; it is only ever moved forward, so a gzip stream will do. `where`
    names the archive in messages, `largest` bounds the size of a member (None: archives of archives). Errors:
    Stop(DAMAGED) for a header that is not one, a cut, or a missing end; for absolute paths, "..", links and
    devices.
    """
    name, at = "", file.tell()
    while True:
        block = _take(file, BLOCK, where, at, "ends without an end-of-archive block: it was cut off")
        if block == bytes(BLOCK):
            _expect_zeros(file, where, at, end)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _damaged(f"{where}, byte {at}", f"is no tar header ({error})") from None
        start, at = at + BLOCK, at + BLOCK + -(-header.size // BLOCK) * BLOCK
        said = name or header.name
        if (end is not None and at > end) or header.size < 0:
            raise _damaged(
                f"{where}, {said}, byte {start}", "runs over the end of the member that it lies in"
            )
        if header.type in (LONG_NAME, EXTENDED, GLOBAL):
            if header.size > 1 << 16:
                raise _damaged(f"{where}, byte {start}", f"has a header of {header.size} bytes")
            extra = _take(file, header.size, where, start, "is cut off in a header")
            if header.type == LONG_NAME:
                name = extra.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type == EXTENDED:
                name = _path_of(extra) or name
        elif header.type == DIRECTORY:
            name = ""
        elif header.type not in REGULAR:
            raise _damaged(f"{where}, {said}, byte {start}", "is a link, a device or of an unknown kind")
        else:
            refuse_path(said, where)
            if largest is not None and header.size > largest:
                raise _damaged(
                    f"{where}, {said}, byte {start}",
                    f"claims {header.size} bytes, more than the {largest} allowed",
                )
            yield Member(said, start, header.size)
            name = ""
        file.seek(at)


def read(file: BinaryIO, member: Member, where: str) -> bytes:
    """The member's bytes; the file stands where `members` left it.

    Errors: Stop(DAMAGED) if they are cut short.
    """
    return _take(file, member.size, where, member.start, f"is cut off in {member.name}")


def refuse_path(name: str, where: str) -> None:
    """Errors: Stop(DAMAGED) for a name that would lead out of the folder it is unpacked in."""
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        raise _damaged(f"{where}, {name!r}", "is an absolute path or leads upwards")


def _take(file: BinaryIO, size: int, where: str, at: int, trouble: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _damaged(f"{where}, byte {at + len(data)}", trouble)
    return data


def _expect_zeros(file: BinaryIO, where: str, at: int, end: int | None) -> None:
    """After the end-of-archive block come zeros alone; anything else is a member without its header."""
    while end is None or file.tell() < end:
        rest = file.read(1 << 16 if end is None else min(1 << 16, end - file.tell()))
        if rest.strip(b"\0"):
            raise _damaged(f"{where}, byte {at}", "is zeros where a tar header was: more data follows")
        if not rest:
            return


def _path_of(extra: bytes) -> str:
    """The path of a pax header, whose records read "LENGTH path=NAME\\n"."""
    while extra:
        length, _, _ = extra.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(extra):
            return ""
        key, _, value = extra[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        extra = extra[int(length) :]
    return ""


def _damaged(what: str, trouble: str) -> Stop:
    return Stop(
        Exit.DAMAGED,
        f"{what}: {trouble}",
        "whole tar archives of plain files with relative paths",
        "download or copy the archive again",
    )
