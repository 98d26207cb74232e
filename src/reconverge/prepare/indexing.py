"""Makes the index of a data set and its dataset.json. Each shard is read once."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from reconverge.base import files, imagenet
from reconverge.base.terminal import Meter, say
from reconverge.data import image, index, samples, shards
from reconverge.prepare.odd import is_unreadable
from reconverge.prepare.scatter import content

IN1K, IN22K = imagenet.DATASETS["imagenet1k"], imagenet.DATASETS["imagenet22k"]  # the latter as of fall 2011
EXPECTED = {
    "imagenet1k": {"train": IN1K.training, "val": IN1K.validation},
    "fall11_whole.tar": {"train": IN22K.training},
}
CLASSES = {"imagenet1k": IN1K.classes, "fall11_whole.tar": IN22K.classes, "winter21_whole.tar.gz": 19_167}


def indexed(
    to: Path,
    work: Path,
    found: dict[str, list[str]],
    threads: ThreadPoolExecutor,
    examine: Callable[[str, samples.Sample], None],
) -> dict[str, dict[str, Any]]:
    """Read every shard once. Writes the index of each split, and returns the facts for dataset.json."""
    made = {}
    with Meter(
        "indexing", sum((to / name).stat().st_size for names in found.values() for name in names)
    ) as meter:
        for split, names in found.items():
            jobs = [
                threads.submit(_piece, to, work, name, number, partial(examine, split), meter)
                for number, name in enumerate(names)
            ]
            pieces = [job.result() for job in jobs]
            rows = [piece["rows"] for piece in pieces]
            index.write(to / f"{split}.index.npy", rows)
            keys = np.sort(np.concatenate([part["key"] for part in rows]))
            twice = keys[1:][keys[1:] == keys[:-1]]
            combined = 0
            for piece in pieces:
                combined ^= piece["content"]
            made[split] = {
                "names": names,
                "sha256": [piece["sha256"] for piece in pieces],
                "images": [len(part) for part in rows],
                "content": combined,
                "labels": max((int(part["label"].max()) + 1 for part in rows if len(part)), default=0),
                "unused": [(suffix, *of) for piece in pieces for suffix, of in piece["unused"].items()],
                "repeated": os.fsdecode(twice[0]) if len(twice) else None,
            }
    return made


def _piece(
    to: Path, work: Path, name: str, number: int, examine: Callable[[samples.Sample], None], meter: Meter
) -> dict[str, Any]:
    """Index rows, sha256 and combined content hash of one shard."""
    combined = 0

    def look(sample: samples.Sample) -> None:
        nonlocal combined
        combined ^= content(sample.key, sample.data)
        examine(sample)

    unused: dict[str, list[Any]] = {}  # suffix -> number of members, name of the first

    def count(member: str) -> None:
        suffix = member.rpartition("/")[2].partition(".")[2]
        unused.setdefault(suffix, [0, f"{name}, {member}"])[0] += 1

    rows, digest = samples.scan(to / name, number, look, count)
    meter.add((to / name).stat().st_size, len(rows))
    return {"rows": rows, "sha256": digest, "content": combined, "unused": unused}


def about(
    to: Path,
    plan: dict[str, Any],
    parts: dict[str, dict[str, Any]],
    lossy: dict[str, Any] | None,
    dropped: int,
) -> dict[str, Any]:
    """The contents of dataset.json. Prints a note if the numbers are not those of the published set."""
    splits: dict[str, Any] = {}
    unusual = _unusual(to / "report.jsonl")
    total = {split: sum(part["images"]) for split, part in parts.items()}
    for split, part in parts.items():
        table = to / f"{split}.index.npy"
        expected = plan["expected"].get(split)
        if expected and split == "train" and "val" not in plan["expected"]:
            expected -= total.get("val", 0)  # --hold-out took these from the training images
        splits[split] = {
            "images": total[split],
            "expected": expected,
            "unusual": unusual.get(split, {}),
            "index": table.name,
            "index_bytes": table.stat().st_size,
            "index_sha256": files.sha256_of(table),
            "shards": [
                {"name": name, "bytes": (to / name).stat().st_size, "images": images, "sha256": digest}
                for name, images, digest in zip(part["names"], part["images"], part["sha256"], strict=True)
            ],
        }
    classes = plan["classes"]
    if plan["expected_classes"] not in (None, len(classes)):
        say(f"note: {len(classes)} classes, but the published set has {plan['expected_classes']}")
    found = {
        "format": shards.FORMAT,
        "dataset": plan["dataset"],
        "source": plan["source"],
        "lossy": lossy,
        "dropped": dropped,
        "class_list": {
            "name": (
                plan["source"]["kind"].partition("_")[0]
                if plan["dataset"] == "imagenet22k"
                else plan["dataset"]
            ),
            "sha256": sha256("\n".join(entry["synset"] for entry in classes).encode()).hexdigest(),
        },
        "classes": classes,
        "splits": splits,
    }
    for split in splits:
        for note in shards.notes(found, split):
            say(f"note: {note}")
    return found


def _unusual(report: Path) -> dict[str, dict[str, int]]:
    """Split -> how many of its images are of each kind that a training says before it begins."""
    found: dict[str, Counter[str]] = {}
    for line in files.json_lines(report):
        if "split" in line and line["fate"] != "dropped":
            of_split = found.setdefault(line["split"], Counter())
            of_split.update(word for word in line["odd"] if word in (*image.KINDS, shards.FLAT))
            of_split.update({shards.UNREADABLE} if any(map(is_unreadable, line["odd"])) else ())
    return {split: dict(sorted(kinds.items())) for split, kinds in found.items()}
