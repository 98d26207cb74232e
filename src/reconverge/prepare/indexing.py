"""Makes the index of a data set and its dataset.json. Each shard is read once."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from reconverge.base import files, imagenet
from reconverge.base.terminal import Meter, say
from reconverge.data import image, index, maps, samples, shards
from reconverge.data.image import Undecodable
from reconverge.prepare.odd import is_unreadable
from reconverge.prepare.scatter import content

IN1K, IN22K = imagenet.DATASETS["imagenet1k"], imagenet.DATASETS["imagenet22k"]  # the latter as of fall 2011
ADE20K = imagenet.DATASETS["ade20k"]
EXPECTED = {
    "imagenet1k": {"train": IN1K.training, "val": IN1K.validation},
    "fall11_whole.tar": {"train": IN22K.training},
    "ade20k": {"train": ADE20K.training, "val": ADE20K.validation},
}
CLASSES = {"imagenet1k": IN1K.classes, "fall11_whole.tar": IN22K.classes, "winter21_whole.tar.gz": 19_167}


def indexed(
    to: Path,
    found: dict[str, list[str]],
    threads: ThreadPoolExecutor,
    examine: Callable[[str, samples.Sample], None],
    with_maps: bool = False,
) -> dict[str, dict[str, Any]]:
    """Read every shard once. Writes the index of each split, and returns the facts for dataset.json.
    `with_maps`: the samples have label maps instead of labels.
    """
    made = {}
    with Meter(
        "indexing", sum((to / name).stat().st_size for names in found.values() for name in names)
    ) as meter:
        for split, names in found.items():
            jobs = [
                threads.submit(_piece, to / name, name, number, partial(examine, split), with_maps, meter)
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
                "pixels": sum(piece["pixels"] for piece in pieces),
                "labels": max((int(part["label"].max()) + 1 for part in rows if len(part)), default=0),
                "unused": [(suffix, *of) for piece in pieces for suffix, of in piece["unused"].items()],
                "repeated": os.fsdecode(twice[0]) if len(twice) else None,
            }
    return made


def _piece(
    path: Path,
    name: str,
    number: int,
    examine: Callable[[samples.Sample], None],
    with_maps: bool,
    meter: Meter,
) -> dict[str, Any]:
    """Index rows, sha256 and combined content hash of one shard; the pixels of its label maps by value."""
    combined, pixels = 0, np.zeros(256, np.int64)

    def look(sample: samples.Sample) -> None:
        nonlocal combined, pixels
        label_map = sample.map[1] if sample.map else None
        combined ^= content(sample.key, sample.data, label_map)
        if label_map is not None:
            with suppress(
                Undecodable
            ):  # it was decoded before, so its bytes have changed, and `content`, too
                pixels += np.bincount(maps.decoded(label_map).ravel(), minlength=256)
        examine(sample)

    unused: dict[str, list[Any]] = {}  # suffix -> number of members, name of the first

    def count(member: str) -> None:
        suffix = member.rpartition("/")[2].partition(".")[2]
        unused.setdefault(suffix, [0, f"{name}, {member}"])[0] += 1

    rows, digest = samples.scan(path, number, look, count, with_maps)
    meter.add(path.stat().st_size, len(rows))
    return {"rows": rows, "sha256": digest, "content": combined, "pixels": pixels, "unused": unused}


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
        if of_maps := plan.get("label_maps"):
            splits[split] |= {
                "pixels": part["pixels"][of_maps["values"]].tolist(),  # of each class
                "unlabelled": int(part["pixels"][of_maps["ignored_values"]].sum()),
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
    if "label_maps" in plan:
        found["label_maps"] = plan["label_maps"]
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
