"""Whether training and validation images are what they are meant to be: said or refused before training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import SEGMENT
from reconverge.data import image
from reconverge.data.folder import Folder
from reconverge.data.listing import Listed
from reconverge.data.maps import Maps
from reconverge.data.shards import Shards

LOOKED_AT = 16  # training images that are decoded, at equal distances, to see whether they show anything
COMPARED = 200  # pairs of files that are read and compared, at most


def refuse_other_task(task: str, training: Any, name: str) -> None:
    """Errors: Stop(USAGE) for label maps in a classification, or labels of images in a segmentation."""
    if (task == SEGMENT) != hasattr(training, "target"):
        has, needs = ("label maps", "a label for each image") if task != SEGMENT else ("labels", "label maps")
        raise Stop(
            Exit.USAGE,
            f"task={task} with data={name}, whose images have {has}",
            f"images with {needs}",
            "task=segment, or data whose images have labels"
            if task != SEGMENT
            else "data=scenes, data=maps data.root=..., data=ade20k, or data=shards with label maps",
        )


def refuse_one_class(training: Any) -> None:
    """Errors: Stop(USAGE)."""
    if len(training.classes) < 2:
        raise Stop(
            Exit.USAGE,
            f"training images of one class, {training.classes[0]}",
            "two classes or more; with one class the loss is 0 and the top-1 is 100 %, whatever is learned",
            "give the folder that holds the class folders; now it may be one level too high (data.root=,"
            " data.train=)",
        )


def refuse_broken(sources: list[Any]) -> None:
    """Errors: Stop(DAMAGED) if headers of listed images were unreadable."""
    broken = [
        f"{source.root / path}: {said}"
        for source in sources
        if isinstance(source, Listed)
        for path, said in source.broken.items()
    ]
    if broken:
        more = f"; and {len(broken) - 5} more" if broken[5:] else ""
        raise Stop(
            Exit.DAMAGED,
            "; ".join(broken[:5]) + more,
            "images that Pillow can decode completely",
            "repair or remove these files; or with data.on_bad_image=substitute, damaged training images are"
            " replaced by others, and damaged validation images left out",
        )


def doubts(training: Any, validation: Any) -> list[str]:
    """What the user should know before training, beside the notes of each source."""
    said = []
    seen = range(0, len(training), -(-len(training) // LOOKED_AT))
    if all(_flat(training, sample) for sample in seen):
        said.append(f"each of {len(seen)} training images that were decoded is of one colour only")
    if isinstance(training, Folder | Maps | Shards) and isinstance(validation, type(training)):
        if training.fingerprint == validation.fingerprint:
            said.append("the validation images are the training images: accuracy says what was memorised")
        elif common := _common(training, validation):
            said.append(common)
    return said


def _flat(source: Any, sample: int) -> bool:
    try:
        return image.rgb(image.opened(source.read(sample))).getcolors(1) is not None
    except (Stop, image.Undecodable):
        return False  # training says more, when it comes to this image


def _common(training: Any, validation: Any) -> str | None:
    """How many validation images are also training images."""
    if isinstance(training, Shards):
        known = np.unique(training.index.table["checksum"])
        count = int(np.isin(validation.index.table["checksum"], known).sum())
        return f"{count} of {len(validation)} validation images are training images too" if count else None
    pairs = list(_alike(training, validation))
    same = {ours for ours, theirs in pairs if _same(validation.path(ours), training.path(theirs))}
    if not same:
        return None
    return (
        f"at least {len(same)} of {len(validation)} validation images are training images too (the first is"
        f" {validation.path(min(same))})"
    )


def _alike(training: Listed, validation: Listed) -> Iterator[tuple[int, int]]:
    """Pairs (validation, training) of sample ids with the same label and size, at most COMPARED."""
    ours, theirs = (
        source.index.table["label"].astype(np.int64) << 40 | source.index.table["size"].astype(np.int64)
        for source in (validation, training)
    )
    order = np.argsort(theirs, kind="stable")
    first, after = (np.searchsorted(theirs[order], ours, side) for side in ("left", "right"))
    left = COMPARED
    for sample in np.flatnonzero(after > first).tolist():
        for place in range(int(first[sample]), int(after[sample])):
            if left == 0:
                return
            left -= 1
            yield sample, int(order[place])


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other) or one.read_bytes() == other.read_bytes()
    except OSError:
        return False
