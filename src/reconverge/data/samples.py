"""Reads the samples of a shard by the names of its members, as webdataset does."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import sha256_of
from reconverge.data import index, tar
from reconverge.data.image import suffixes

IMAGES = {suffix[1:] for suffix in suffixes()}  # of members
LABEL_MAP = "seg.png"  # suffix of label maps; webdataset names the parts of a sample so: KEY.jpg, KEY.seg.png

Content = tuple[int, bytes]  # byte offset in the shard, bytes


class Sample(NamedTuple):
    """One sample of a shard, from its members KEY.jpg and KEY.cls, or KEY.jpg and KEY.seg.png."""

    key: str
    label: int  # 0 for an image with a label map
    suffix: str  # of the image; its last part, for KEY.input.jpg
    start: int  # byte offset of the image in the shard
    data: bytes
    map: Content | None = None  # the label map


def read(
    file: BinaryIO, where: str, unused: Callable[[str], None] = lambda name: None, maps: bool = False
) -> Iterator[Sample]:
    """All samples of a shard, by webdataset's rule of names: a key ends at the first dot of the base name,
    and the rest is the suffix. `unused` is called with the name of every member that is not used.

    The image of a sample is the member with the suffix of an image, or else its only member whose suffix ends
    so (KEY.input.jpg); the label likewise with .cls. With `maps`, each sample has a label map KEY.seg.png
    instead of a label. Errors: Stop(DAMAGED), also for a sample in which one is missing or occurs twice.
    """
    key: str | None = None
    images: dict[str, Content] = {}
    targets: dict[str, Content] = {}  # labels, or label maps

    def finished() -> Iterator[Sample]:
        if not (images or targets):
            return
        assert key is not None
        suffix = _only(images, key, where, "image", unused)
        last = suffix.rpartition(".")[2]
        if maps:
            of_map = targets[_only(targets, key, where, "label map", unused)]
            yield Sample(key, 0, last, *images[suffix], of_map)
        else:
            label = targets[_only(targets, key, where, "label", unused)]
            yield Sample(key, _label(label, key, where), last, *images[suffix])

    for member in tar.members(file, where):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        suffix = suffix.lower()
        last = suffix.rpartition(".")[2]
        is_target = suffix == LABEL_MAP if maps else last == "cls"
        if not stem or not (is_target or last in IMAGES):  # webdataset leaves out .hidden.jpg
            unused(member.name)
            continue
        this = f"{folder}/{stem}" if folder else stem
        seen = targets if is_target else images
        if this != key or (suffix in seen and images and targets):  # the next sample may have the same key
            yield from finished()
            key, images, targets = this, {}, {}
            seen = targets if is_target else images
        if suffix in seen:
            raise damaged(f"{where}, byte {member.start}: {key} has two members .{suffix}")
        seen[suffix] = member.start, tar.read(file, member, where)
    yield from finished()


def _only(members: dict[str, Content], key: str, where: str, what: str, unused: Callable[[str], None]) -> str:
    """The suffix of the image or the target of a sample. Errors: Stop(DAMAGED)."""
    plain = [suffix for suffix in members if "." not in suffix]
    found = plain or list(members)
    if not found:
        named = {"label": " (.cls)", "label map": f" (.{LABEL_MAP})"}.get(what, "")
        raise damaged(f"{where}: {key} has no {what}{named}")
    if len(found) > 1:
        first, second = (f"{key}.{suffix}" for suffix in found[:2])
        raise Stop(
            Exit.DAMAGED,
            f"{where}: {first} and {second} are two {what}s of one sample, because a key ends at the first"
            " dot of a name",
            f"shards as webdataset reads them: one {what} for each key",
            "write the shards again, with keys that have no dot (2024_05_003.jpg) and one image for each key;"
            " or unpack them to class folders",
        )
    for suffix in members:
        if suffix != found[0]:
            unused(f"{key}.{suffix}")
    return found[0]


def _label(content: Content, key: str, where: str) -> int:
    start, data = content
    text = data.strip()
    if not text.isdigit():
        raise damaged(f"{where}, byte {start}: the label of {key} is {text[:20]!r}")
    return int(text)


def scan(
    path: Path,
    number: int,
    examine: Callable[[Sample], None],
    unused: Callable[[str], None],
    maps: bool = False,
) -> tuple[np.ndarray, str]:
    """Index rows of shard `number`, and its sha256. `unused`, `maps` and errors as in read()."""
    rows, digest = [], sha256_of(path)
    with open(path, "rb") as file:
        for sample in read(file, str(path), unused, maps):
            examine(sample)
            of_map = (
                (sample.map[0], len(sample.map[1]), xxhash.xxh3_64_intdigest(sample.map[1]))
                if sample.map
                else ()
            )
            checksum = xxhash.xxh3_64_intdigest(sample.data)
            of_image = number, sample.start, len(sample.data), sample.label, checksum
            rows.append((*of_image, *of_map, os.fsencode(sample.key)))
    return np.array(rows, index.row(max([len(row[-1]) for row in rows], default=1), maps)), digest


def damaged(what: str) -> Stop:
    """The error for a shard that is not as it was written. `what` says where, and what is wrong."""
    return Stop(
        Exit.DAMAGED,
        what,
        "shards as reconverge prepare wrote them",
        "copy the shard again (reconverge check DIR lists every fault); or use data.on_bad_image=substitute",
    )
