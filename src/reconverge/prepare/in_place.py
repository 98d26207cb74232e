"""Indexes existing WebDataset shards without copying or changing them."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reconverge.base import imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.data import samples
from reconverge.prepare import indexing
from reconverge.prepare.odd import Bomb, oddities


def shards_below(source: Path) -> dict[str, list[Path]]:
    """Split -> the tar files of `source`, or of its folders. A file whose path has the word val, valid or
    validation belongs to the validation split.

    Empty if the tar files are not shards. Errors: Stop(MISSING) if they are parts of ImageNet's archives.
    """
    if not source.is_dir() or any(
        (source / name).exists() for name in ("ILSVRC2012_img_train.tar", "fall11_whole.tar")
    ):
        return {}
    found: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for path in sorted([*source.glob("*.tar"), *source.glob("*/*.tar")]):
        if path.name.startswith("ILSVRC2012_img_") or re.fullmatch(r"n\d{8}", path.stem):
            raise Stop(
                Exit.MISSING,
                f"{path} without the archive of the training images",
                "ILSVRC2012_img_train.tar as published (it contains one tar file for each synset), with"
                " ILSVRC2012_img_val.tar in the same folder",
                f"put ILSVRC2012_img_train.tar into {source}; if it was unpacked to n*.tar, make it again:"
                " tar -cf ILSVRC2012_img_train.tar n*.tar",
            )
        words = set(re.findall("[a-z]+", str(path.relative_to(source).with_suffix("")).lower()))
        found[
            "test" if "test" in words else "val" if words & {"val", "valid", "validation"} else "train"
        ].append(path)
    if ignored := found.pop("test"):
        say(f"left out: {len(ignored)} shards of a test split")
    return {split: paths for split, paths in found.items() if paths}


def indexed(
    found: dict[str, list[Path]],
    to: Path,
    dataset: str | None,
    threads: ThreadPoolExecutor,
) -> dict[str, Any]:
    """Write an index for each split and report.jsonl into `to`. Returns the contents of dataset.json.

    Errors: Stop(USAGE, DAMAGED).
    """
    here = to.resolve()  # without symbolic links, because .. of a link is not the folder that contains it
    names = {
        split: [os.path.relpath(path.parent.resolve() / path.name, here) for path in paths]
        for split, paths in found.items()
    }
    say(
        "indexing WebDataset shards without copying them:"
        f" {', '.join(f'{len(paths)} of {split}' for split, paths in found.items())}"
    )
    for split, paths in found.items():
        _show_first(split, paths)
    report = to / "report.jsonl"
    lines: list[str] = []

    def examine(split: str, sample: samples.Sample) -> None:
        try:
            odd = oddities(sample.data, sample.suffix)
        except Bomb as bomb:
            raise Stop(
                Exit.DAMAGED,
                f"{sample.key}: {bomb}",
                "images of a size that Pillow accepts",
                "remove the image from the shard",
            ) from None
        if odd:
            lines.append(
                json.dumps({"split": split, "key": sample.key, "odd": odd, "fate": "kept as it is"}) + "\n"
            )

    parts = indexing.indexed(to, names, threads, examine)
    for split, part in parts.items():
        if not sum(part["images"]):
            raise Stop(
                Exit.MISSING,
                f"{len(found[split])} shards of {split} without any image",
                "members KEY.jpg, or with another suffix of an image, and KEY.cls",
                "correct SOURCE, or write the shards again",
            )
        unused: dict[str, list[Any]] = {}
        for suffix, count, first in part["unused"]:
            unused.setdefault(suffix, [0, first])[0] += count
        for _, (count, first) in sorted(unused.items()):
            odd = [f"{count} members with this suffix are neither image nor label"]
            lines.append(json.dumps({"name": first, "odd": odd, "fate": "left out"}) + "\n")
        if unused:
            told = ", ".join(f"{count} .{suffix}" for suffix, (count, _) in sorted(unused.items()))
            say(f"{split}: members that are not used: {told}")
    report.write_text("".join(sorted(lines)))
    labels = max((part["labels"] for part in parts.values()), default=0)
    classes = (
        imagenet.imagenet1k()
        if dataset == "imagenet1k"
        else [f"{label:0{len(str(labels - 1))}d}" for label in range(labels)]
    )
    if labels > len(classes):
        raise Stop(
            Exit.USAGE,
            f"labels up to {labels - 1} in the shards",
            f"labels below {len(classes)}, the number of classes of {dataset}",
            "--as folder",
        )
    plan = {
        "dataset": dataset or "folder",
        "source": {"kind": "WebDataset shards", "files": [], "bytes": {}},
        "classes": imagenet.described(classes),
        "expected": indexing.EXPECTED.get(str(dataset), {}),
        "expected_classes": indexing.CLASSES.get(str(dataset)),
    }
    return indexing.about(to, plan, parts, None, 0)


def _show_first(split: str, paths: list[Path]) -> None:
    """Print how the names of the first sample are read. Errors: Stop(DAMAGED)."""
    for path in paths:
        with open(path, "rb") as file:
            if (one := next(samples.read(file, str(path)), None)) is not None:
                say(f"{split}: the first key is {one.key}, its image a .{one.suffix}, its label {one.label}")
                return
