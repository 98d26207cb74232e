"""Shards that exist: indexed where they are, and not rewritten."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reconverge.base import imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.data import shards
from reconverge.prepare import indexing
from reconverge.prepare.odd import Bomb, oddities


def shards_below(source: Path) -> dict[str, list[Path]]:
    """Split -> the tars of a folder, or of its train and val folders; the word val, valid or validation in a
    name says which.

    Nothing where the tars are not shards. Errors: Stop(MISSING) for a part of ImageNet's archives.
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
                f"{path} without the archive that belongs to it",
                "ILSVRC2012_img_train.tar as it was published, a tar of one tar a synset, with"
                " ILSVRC2012_img_val.tar beside it",
                f"put it into {source}; class archives that were unpacked: tar -cf ILSVRC2012_img_train.tar"
                " n*.tar",
            )
        words = set(re.findall("[a-z]+", str(path.relative_to(source).with_suffix("")).lower()))
        found[
            "test" if "test" in words else "val" if words & {"val", "valid", "validation"} else "train"
        ].append(path)
    if ignored := found.pop("test"):
        say(f"{len(ignored)} shards of a test split are left out")
    return {split: paths for split, paths in found.items() if paths}


def indexed(
    found: dict[str, list[Path]],
    to: Path,
    work: Path,
    dataset: str | None,
    threads: ThreadPoolExecutor,
) -> dict[str, Any]:
    """dataset.json; an index a split and report.jsonl are written into `to`. Errors: Stop(USAGE, DAMAGED)."""
    here = to.resolve()  # what a link leads to: .. of a link is not where it lies
    names = {
        split: [os.path.relpath(path.parent.resolve() / path.name, here) for path in paths]
        for split, paths in found.items()
    }
    say(
        "WebDataset shards, indexed where they are:"
        f" {', '.join(f'{len(paths)} of {split}' for split, paths in found.items())}"
    )
    report = to / "report.jsonl"
    lines: list[str] = []

    def examine(sample: shards.Sample) -> None:
        try:
            odd = oddities(sample.data, sample.suffix)
        except Bomb as bomb:
            raise Stop(
                Exit.DAMAGED,
                f"{sample.key}: {bomb}",
                "images of a reasonable size",
                "remove it from the shard",
            ) from None
        if odd:
            lines.append(json.dumps({"key": sample.key, "odd": odd, "fate": "kept as it is"}) + "\n")

    parts = indexing.indexed(to, work, names, threads, examine)
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
            f"labels up to {labels - 1} in {to}",
            f"{len(classes)} classes of {dataset}",
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
