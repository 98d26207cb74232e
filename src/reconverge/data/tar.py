"""Reads tar archives strictly: an incomplete archive is an error, not a shorter list of members.

For Python's tarfile and for webdataset, a damaged header or a cut between two members is the end of the
archive, and the rest is lost without a message. Here an archive must end with an end-of-archive block.
"""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from reconverge.base.errors import Exit, Stop

BLOCK = tarfile.BLOCKSIZE  # 512 bytes
LARGEST = 1 << 28  # bytes of one image or label; a header with more is damaged or malicious
REGULAR, DIRECTORY, EXTENDED, LONG_NAME, GLOBAL = (tarfile.REGTYPE, tarfile.AREGTYPE), b"5", b"x", b"L", b"g"


class Member(NamedTuple):
    name: str
    start: int  # byte offset of the data in the file
    size: int  # bytes


def members(
    file: BinaryIO, where: str, end: int | None = None, largest: int | None = LARGEST
) -> Iterator[Member]:
    """The regular files of the archive that begins at the file's position. `end`: end of the archive in
    bytes, if it is a member of another archive.

    At each member, the file's position is at the member's data. The position only moves forward, so `file`
    may be a gzip stream. `where` names the archive in messages. `largest` limits the size of a member (None
    for archives that contain archives). Errors: Stop(DAMAGED) for a damaged header, an archive that is cut
    off or has no end; and for absolute paths, "..", links and devices.
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
            raise _damaged(f"{where}, byte {at}", f"is not a tar header ({error})") from None
        start, at = at + BLOCK, at + BLOCK + -(-header.size // BLOCK) * BLOCK
        said = name or header.name
        if (end is not None and at > end) or header.size < 0:
            raise _damaged(f"{where}, {said}, byte {start}", "is longer than the archive that contains it")
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
            raise _damaged(f"{where}, {said}, byte {start}", "is a link, a device or of an unknown type")
        else:
            refuse_path(said, where)
            if largest is not None and header.size > largest:
                raise _damaged(
                    f"{where}, {said}, byte {start}",
                    f"has {header.size} bytes by its header, but {largest} are allowed",
                )
            yield Member(said, start, header.size)
            name = ""
        file.seek(at)


def read(file: BinaryIO, member: Member, where: str) -> bytes:
    """The member's bytes. The file must be at the position where `members` left it.

    Errors: Stop(DAMAGED) if the file ends too early.
    """
    return _take(file, member.size, where, member.start, f"is cut off in {member.name}")


def refuse_path(name: str, where: str) -> None:
    """Errors: Stop(DAMAGED) for a name that would be unpacked outside of the target folder."""
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        raise _damaged(f"{where}, {name!r}", "is an absolute path or contains '..'")


def _take(file: BinaryIO, size: int, where: str, at: int, trouble: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _damaged(f"{where}, byte {at + len(data)}", trouble)
    return data


def _expect_zeros(file: BinaryIO, where: str, at: int, end: int | None) -> None:
    """After the end-of-archive block only zeros are allowed; anything else is a member with a lost header."""
    while end is None or file.tell() < end:
        rest = file.read(1 << 16 if end is None else min(1 << 16, end - file.tell()))
        if rest.strip(b"\0"):
            raise _damaged(f"{where}, byte {at}", "has zeros instead of a tar header, but more data follow")
        if not rest:
            return


def _path_of(extra: bytes) -> str:
    """The path in a pax header, whose records have the form "LENGTH path=NAME\\n"."""
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
        "complete tar archives of plain files with relative paths",
        "download or copy the archive again",
    )
