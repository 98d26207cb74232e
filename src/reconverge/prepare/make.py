"""From what people download to a data set: shards, one index a split, report.jsonl, dataset.json last."""

import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from reconverge.base import files, imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.base.lock import Lock
from reconverge.base.terminal import Meter, say
from reconverge.prepare import in_place, indexing, layouts
from reconverge.prepare.layouts import Layout, Taken
from reconverge.prepare.odd import UNREADABLE, Bomb, oddities, shrunk, strict_exif
from reconverge.prepare.scatter import Scatter


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
    found = in_place.shards_below(source)
    if not found and to.resolve() == source.resolve():
        raise Stop(
            Exit.USAGE,
            f"--to {to}, which is the source",
            "a folder of its own; only shards are indexed where they are",
            "another --to",
        )
    asked = [name for name in ("resize", "hold_out", "drop_unreadable") if getattr(options, name)]
    if found and asked:
        raise Stop(
            Exit.USAGE,
            f"{', '.join('--' + name.replace('_', '-') for name in asked)} with shards that exist",
            "they are indexed where they are, and not rewritten",
            "drop it",
        )
    work.mkdir(parents=True, exist_ok=True)
    lock = Lock(to / ".lock")
    try:
        with strict_exif(), ThreadPoolExecutor(jobs) as threads:
            if found:
                about = in_place.indexed(found, to, work, dataset, threads)
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
    parts = indexing.indexed(to, work, found, threads, lambda sample: None)
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
    return indexing.about(to, plan, parts, lossy, scatter.state["dropped"])


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
        "classes": imagenet.described(classes),
        "shards": {split: max(1, round(size / (options.shard_mb * 1e6))) for split, size in sizes.items()},
        "expected": indexing.EXPECTED.get(layout.dataset) or indexing.EXPECTED.get(layout.kind) or {},
        "expected_classes": indexing.CLASSES.get(layout.dataset) or indexing.CLASSES.get(layout.kind),
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
