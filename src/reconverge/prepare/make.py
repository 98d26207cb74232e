"""From what people download to a data set: shards, one index a split, report.jsonl, dataset.json last."""

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from reconverge import synsets
from reconverge.data import files, index, shards
from reconverge.errors import Exit, Stop
from reconverge.lock import Lock
from reconverge.prepare import layouts
from reconverge.prepare.layouts import Layout, Taken
from reconverge.prepare.odd import UNREADABLE, Bomb, oddities, shrunk, strict_exif
from reconverge.prepare.scatter import Scatter, content
from reconverge.progress import Meter, say

IN1K, IN22K = synsets.DATASETS["imagenet1k"], synsets.DATASETS["imagenet22k"]  # the latter as of fall 2011
EXPECTED = {
    "imagenet1k": {"train": IN1K.training, "val": IN1K.validation},
    "fall11_whole.tar": {"train": IN22K.training},
}
CLASSES = {"imagenet1k": IN1K.classes, "fall11_whole.tar": IN22K.classes, "winter21_whole.tar.gz": 19_167}


@dataclass(frozen=True)
class Options:
    shard_mb: float  # 10^6 bytes of images in a shard, about
    hold_out: float  # percent of a set without validation images that become its val split
    resize: int | None  # pixels of the shorter side of a smaller copy
    quality: int  # of its JPEGs
    drop_unreadable: bool


def prepare(source: Path, to: Path, dataset: str | None, jobs: int, options: Options) -> dict[str, Any]:
    """Make the data set at `to` and return its dataset.json; go on where a killed process stopped.

    Errors: Stop.
    """
    if (to / "dataset.json").exists():
        raise Stop(
            Exit.USAGE, f"{to} holds a finished data set", "a new folder", "another --to, or reconverge check"
        )
    work = to / ".preparing"
    strangers = (
        [path.name for path in sorted(to.glob("*"))]
        if not work.exists() and to.resolve() != source.resolve()
        else []
    )
    if strangers:
        raise Stop(
            Exit.USAGE,
            f"{to} holds {', '.join(strangers[:3])}{' and more' if strangers[3:] else ''}, which is not a"
            " data set begun here",
            "a new folder, an empty one, or one that this command began: files in it are replaced",
            "another --to",
        )
    found = _shards_below(source)
    if not found and to.resolve() == source.resolve():
        raise Stop(
            Exit.USAGE,
            f"--to {to}, which is the source",
            "a folder of its own; only shards are indexed where they are",
            "another --to",
        )
    work.mkdir(parents=True, exist_ok=True)
    lock = Lock(to / ".lock")
    try:
        with strict_exif(), ThreadPoolExecutor(jobs) as threads:
            if found:
                about = _in_place(found, to, work, dataset, threads, options)
            else:
                about = _scattered(source, to, work, dataset, jobs, threads, options)
        files.write_whole(to / "dataset.json", json.dumps(about, indent=1) + "\n")
        shutil.rmtree(work)
        return about
    finally:
        lock.release()


# ---- archives and folders: one pass that scatters, one that indexes ----------------------------------------


def _scattered(
    source: Path,
    to: Path,
    work: Path,
    dataset: str | None,
    jobs: int,
    threads: ThreadPoolExecutor,
    options: Options,
) -> dict[str, Any]:
    layout = layouts.find(source, dataset)
    plan = _plan(layout, work, options)
    say(
        f"{layout.kind}: {plan['dataset']}, {len(plan['classes'])} classes,"
        f" {sum(layout.bytes.values()) / 1e9:.3g} GB"
    )
    scatter = Scatter(to, work, plan["shards"], threads)
    free = shutil.disk_usage(to).free + sum(scatter.state["lengths"].values())
    if options.resize is None and free < sum(layout.bytes.values()):
        raise Stop(
            Exit.DISK,
            f"{to} has {free / 1e9:.3g} GB free",
            f"{sum(layout.bytes.values()) / 1e9:.3g} GB",
            "another --to",
        )
    if not scatter.state.get("scattered"):
        try:
            _scatter(layout, plan, scatter, jobs, threads, options)
        finally:
            scatter.abandon()
    scatter.end()
    found = {split: scatter.names(split) for split in plan["shards"]}
    parts = _indexed(to, work, found, threads, lambda sample: None)
    for split, made in parts.items():
        if not sum(made["images"]):
            raise Stop(
                Exit.USAGE,
                f"--hold-out {options.hold_out:g} leaves no image in {split}",
                "a share that gives each split some images",
                f"another --hold-out, after rm -r {to}",
            )
        if made["content"] != scatter.state["content"].get(split, 0):
            raise Stop(
                Exit.DISK,
                f"{to}: the shards of {split} are not what was written",
                "a disk that keeps what it is given",
                "another --to",
            )
        if made["repeated"]:
            raise Stop(
                Exit.DAMAGED,
                f"two images of {split} have the key {made['repeated']}",
                "a name of its own for each: a.jpg and a.jpeg share one, and so do a.b.jpg and a_b.jpg",
                f"rename or remove one of the two; then rm -r {to} and the same command again",
            )
    lossy = {"resize": options.resize, "quality": options.quality} if options.resize else None
    return _about(to, plan, parts, lossy, scatter.state["dropped"])


def _plan(layout: Layout, work: Path, options: Options) -> dict[str, Any]:
    """What decides the shards, fixed at the first start.

    Errors: Stop(USAGE) if this start asks for something else.
    """
    asked = {
        "dataset": layout.dataset,
        "source": {
            "kind": layout.kind,
            "files": [{"name": path.name, "bytes": path.stat().st_size} for path in layout.files],
            "bytes": layout.bytes,
        },
        "options": asdict(options),
    }
    path = work / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text())
        if changed := [name for name in asked if json.loads(json.dumps(asked[name])) != plan[name]]:
            raise Stop(
                Exit.USAGE,
                f"{work.parent} was begun with another {' and '.join(changed)}",
                "the command that began it, which goes on where it stopped",
                f"the same SOURCE and options; or rm -r {work.parent} to begin anew",
            )
        return plan
    classes = layout.classes()
    if not classes:
        raise Stop(Exit.MISSING, f"{layout.kind}: no class", "one folder or tar a class", "the path")
    if options.hold_out and "val" in layout.splits:
        raise Stop(
            Exit.USAGE,
            f"--hold-out {options.hold_out:g} for a source with validation images",
            "one or the other",
            "no --hold-out",
        )
    held = {"train": 1 - options.hold_out / 100, "val": options.hold_out / 100} if options.hold_out else {}
    sizes = {split: layout.bytes["train"] * share for split, share in held.items()} or layout.bytes
    plan = asked | {
        "classes": synsets.described(classes),
        "shards": {split: max(1, round(size / (options.shard_mb * 1e6))) for split, size in sizes.items()},
        "expected": EXPECTED.get(layout.dataset) or EXPECTED.get(layout.kind) or {},
        "expected_classes": CLASSES.get(layout.dataset) or CLASSES.get(layout.kind),
    }
    files.write_whole(path, json.dumps(plan))
    return plan


def _scatter(
    layout: Layout,
    plan: dict[str, Any],
    scatter: Scatter,
    jobs: int,
    threads: ThreadPoolExecutor,
    options: Options,
) -> None:
    """Read in order, examine in parallel, write in order."""
    classes = [entry["synset"] for entry in plan["classes"]]
    state, splits = scatter.state, list(layout.splits)
    if state["taken"] or state["split"]:
        say(f"going on after {sum(state['images'].values())} images")
    with Meter("writing shards", sum(layout.bytes.values()) - state["read"]) as meter:
        for number in range(state["split"], len(splits)):
            split, skip = splits[number], state["taken"]
            for taken, data, odd in _in_order(layout, split, classes, skip, jobs, threads, options):
                state["taken"] += 1
                state["read"] += len(data)
                meter.add(len(data))
                drop = options.drop_unreadable and any(word.startswith((*UNREADABLE, "bomb")) for word in odd)
                if odd:
                    scatter.report(
                        {
                            "split": split,
                            "name": taken.name,
                            "key": taken.key,
                            "odd": odd,
                            "fate": "dropped" if drop else "kept as it is",
                        }
                    )
                if drop:
                    state["dropped"] += 1
                else:
                    into = (
                        "val"
                        if split not in plan["shards"] or _held_out(taken.key, split, plan, options)
                        else split
                    )
                    scatter.add(into, taken.key, taken.suffix, taken.label, data)
                if scatter.full():
                    scatter.commit()
            state["split"], state["taken"] = number + 1, 0
            scatter.commit()
        for name in layout.ignored:
            scatter.report({"name": name, "odd": ["no image"], "fate": "left out"})
        state["scattered"] = True
        scatter.commit()


def _held_out(key: str, split: str, plan: dict[str, Any], options: Options) -> bool:
    """A hash of the key decides: the same images on every machine."""
    if not options.hold_out or "val" in plan["source"]["bytes"]:
        return False
    return (
        split == "train"
        and xxhash.xxh3_64_intdigest(f"held out {key}".encode("utf-8", "surrogateescape")) % 100_000
        < options.hold_out * 1000
    )


def _in_order(
    layout: Layout,
    split: str,
    classes: list[str],
    skip: int,
    jobs: int,
    threads: ThreadPoolExecutor,
    options: Options,
) -> Iterator[tuple[Taken, bytes, list[str]]]:
    """Each sample after the first `skip` with its bytes and what is odd about it; `jobs` are examined at a
    time, a few wait.

    Single files are read by the threads as well; a stream has one place where it is.
    """

    def examine(taken: Taken, data: bytes | None) -> tuple[Taken, bytes, list[str]]:
        data = taken.read() if data is None else data
        try:
            odd = oddities(data, taken.suffix)
        except Bomb as bomb:
            if not options.drop_unreadable:
                raise Stop(
                    Exit.DAMAGED,
                    f"{taken.name}: {bomb}",
                    "images of a reasonable size",
                    "remove it, or --drop-unreadable leaves it out",
                ) from None
            return taken, data, [f"bomb: {bomb}"]
        if options.resize:
            taken, data = taken._replace(suffix="jpg"), shrunk(data, options.resize, options.quality)
        return taken, data, odd

    waiting: deque[Future] = deque()
    for taken in islice(layout.splits[split](classes), skip, None):
        waiting.append(threads.submit(examine, taken, taken.read() if layout.stream else None))
        if len(waiting) > 4 * jobs:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---- shards that exist: indexed where they are -------------------------------------------------------------


def _shards_below(source: Path) -> dict[str, list[Path]]:
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


def _in_place(
    found: dict[str, list[Path]],
    to: Path,
    work: Path,
    dataset: str | None,
    threads: ThreadPoolExecutor,
    options: Options,
) -> dict[str, Any]:
    if refused := [
        f"--{name.replace('_', '-')}"
        for name in ("resize", "hold_out", "drop_unreadable")
        if getattr(options, name)
    ]:
        raise Stop(
            Exit.USAGE,
            f"{', '.join(refused)} with shards that exist",
            "they are indexed where they are, and not rewritten",
            "drop it",
        )
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

    parts = _indexed(to, work, names, threads, examine)
    report.write_text("".join(sorted(lines)))
    labels = max((part["labels"] for part in parts.values()), default=0)
    classes = (
        synsets.imagenet1k()
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
        "classes": synsets.described(classes),
        "expected": EXPECTED.get(str(dataset), {}),
        "expected_classes": CLASSES.get(str(dataset)),
    }
    return _about(to, plan, parts, None, 0)


# ---- the index ---------------------------------------------------------------------------------------------


def _indexed(
    to: Path,
    work: Path,
    found: dict[str, list[str]],
    threads: ThreadPoolExecutor,
    examine: Callable[[shards.Sample], None],
) -> dict[str, dict[str, Any]]:
    """One reading of every shard: the index of each split and what dataset.json says of its shards."""
    made = {}
    with Meter(
        "indexing", sum((to / name).stat().st_size for names in found.values() for name in names)
    ) as meter:
        for split, names in found.items():
            jobs = [
                threads.submit(_piece, to, work, name, number, examine, meter)
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
                "repeated": os.fsdecode(twice[0]) if len(twice) else None,
            }
    return made


def _piece(
    to: Path, work: Path, name: str, number: int, examine: Callable[[shards.Sample], None], meter: Meter
) -> dict[str, Any]:
    """Rows, sha256 and combined content of one shard."""
    combined = 0

    def look(sample: shards.Sample) -> None:
        nonlocal combined
        combined ^= content(sample.key, sample.data)
        examine(sample)

    rows, digest = shards.scan(to / name, number, look)
    meter.add((to / name).stat().st_size, len(rows))
    return {"rows": rows, "sha256": digest, "content": combined}


def _about(
    to: Path,
    plan: dict[str, Any],
    parts: dict[str, dict[str, Any]],
    lossy: dict[str, Any] | None,
    dropped: int,
) -> dict[str, Any]:
    """dataset.json. Says so where the source is short of what was published."""
    splits = {}
    total = {split: sum(part["images"]) for split, part in parts.items()}
    for split, part in parts.items():
        table = to / f"{split}.index.npy"
        expected = plan["expected"].get(split)
        if expected and split == "train" and "val" not in plan["expected"]:
            expected -= total.get("val", 0)  # held out of it
        splits[split] = {
            "images": total[split],
            "expected": expected,
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
        say(f"short: {len(classes)} classes where the published set has {plan['expected_classes']}")
    about = {
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
        for note in shards.notes(about, split):
            say(f"note: {note}")
    return about
