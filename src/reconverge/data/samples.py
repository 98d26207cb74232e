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


class Sample(NamedTuple):
    """One sample of a shard, from its members KEY.jpg and KEY.cls."""

    key: str
    label: int
    suffix: str  # of the image; its last part, for KEY.input.jpg
    start: int  # byte offset of the image in the shard
    data: bytes


Content = tuple[int, bytes]  # byte offset in the shard, bytes


def read(
    file: BinaryIO, where: str, unused: Callable[[str], None] = lambda name: None
) -> Iterator[Sample]:
    """All samples of a shard, by webdataset's rule of names: a key ends at the first dot of the base name,
    and the rest is the suffix. `unused` is called with the name of every member that is not used.

    The image of a sample is the member with the suffix of an image, or else its only member whose suffix ends
    so (KEY.input.jpg); the label likewise with .cls. Errors: Stop(DAMAGED), also for a sample without image
    or label, or with several.
    """
    key: str | None = None
    images: dict[str, Content] = {}
    labels: dict[str, Content] = {}

    def finished() -> Iterator[Sample]:
        if images or labels:
            assert key is not None
            suffix, label = (
                _only(images, key, where, "image", unused),
                _only(labels, key, where, "label", unused),
            )
            yield Sample(key, _label(labels[label], key, where), suffix.rpartition(".")[2], *images[suffix])

    for member in tar.members(file, where):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        suffix = suffix.lower()
        last = suffix.rpartition(".")[2]
        kind = images if last in IMAGES else labels if last == "cls" else None
        if not stem or kind is None:  # webdataset leaves out .hidden.jpg
            unused(member.name)
            continue
        this = f"{folder}/{stem}" if folder else stem
        if this != key or (suffix in kind and images and labels):  # the next sample may have the same key
            yield from finished()
            key, images, labels = this, {}, {}
            kind = images if last in IMAGES else labels
        if suffix in kind:
            what = "images" if kind is images else "labels"
            raise damaged(f"{where}, byte {member.start}: {key} has two {what}")
        kind[suffix] = member.start, tar.read(file, member, where)
    yield from finished()


def _only(members: dict[str, Content], key: str, where: str, what: str, unused: Callable[[str], None]) -> str:
    """The suffix of the image or label of a sample. Errors: Stop(DAMAGED)."""
    plain = [suffix for suffix in members if "." not in suffix]
    found = plain or list(members)
    if not found:
        raise damaged(f"{where}: {key} has no {'image' if what == 'image' else 'label (.cls)'}")
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
    path: Path, number: int, examine: Callable[[Sample], None], unused: Callable[[str], None]
) -> tuple[np.ndarray, str]:
    """Index rows of shard `number`, and its sha256. `unused` as in read(). Errors: Stop(DAMAGED)."""
    rows, digest = [], sha256_of(path)
    with open(path, "rb") as file:
        for sample in read(file, str(path), unused):
            examine(sample)
            checksum = xxhash.xxh3_64_intdigest(sample.data)
            rows.append(
                (number, sample.start, len(sample.data), sample.label, checksum, os.fsencode(sample.key))
            )
    return np.array(rows, index.row(max([len(row[-1]) for row in rows], default=1))), digest


def damaged(what: str) -> Stop:
    """The error for a shard that is not as it was written. `what` says where, and what is wrong."""
    return Stop(
        Exit.DAMAGED,
        what,
        "shards as reconverge prepare wrote them",
        "copy the shard again (reconverge check DIR lists every fault); or use data.on_bad_image=substitute",
    )
