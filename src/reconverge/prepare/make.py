"""Converts a downloaded data set into shards, one index for each split, report.jsonl, and at last
dataset.json.
"""

import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from reconverge.base import files, imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.base.lock import Lock
from reconverge.base.terminal import Meter, say
from reconverge.data.samples import LABEL_MAP
from reconverge.prepare import in_place, indexing, label_maps, layouts
from reconverge.prepare.layouts import Layout, Taken
from reconverge.prepare.odd import UNREADABLE, Bomb, oddities, shrunk, warnings_kept
from reconverge.prepare.scatter import Scatter


@dataclass(frozen=True)
class Options:
    shard_mb: float  # approximate size of a shard in 10^6 bytes
    hold_out: float  # percent of the training images that become the val split
    resize: int | None  # largest shorter side in pixels; None: do not resize
    quality: int  # JPEG quality of resized images
    drop_unreadable: bool
    ignore: str | None = None  # value of pixels without a class in label maps, or none; None: not given


class Examined(NamedTuple):
    taken: Taken
    data: bytes  # of the image
    target: dict[str, bytes]  # its label or label map, by suffix
    odd: list[str]  # what is unusual about the image


def prepare(source: Path, to: Path, dataset: str | None, jobs: int, options: Options) -> dict[str, Any]:
    """Make the data set at `to`, and return the contents of its dataset.json. Continues the work of a process
    that was killed.

    Errors: Stop.
    """
    if (to / "dataset.json").exists():
        raise Stop(
            Exit.USAGE,
            f"{to} contains a finished data set",
            "a new folder",
            f"choose another --to; to check this data set: reconverge check {to}",
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
            f"{to} contains {', '.join(strangers[:3])}{' and more' if strangers[3:] else ''}, which this"
            " command did not write",
            "a new folder, an empty folder, or a folder in which this command was interrupted",
            "choose another --to",
        )
    found = in_place.shards_below(source)
    if not found and to.resolve() == source.resolve():
        raise Stop(
            Exit.USAGE,
            f"--to {to} is the same folder as SOURCE",
            "a folder that is not SOURCE, except for existing shards, which are indexed in their folder",
            "choose another --to",
        )
    form = None if found else label_maps.form(source)
    if dataset and (source / "train").is_dir():
        form = None  # the class folders beside the label maps
    _refuse_options(bool(found), form, dataset, options)
    work.mkdir(parents=True, exist_ok=True)
    lock = Lock(to / ".lock")
    try:
        with warnings_kept(), ThreadPoolExecutor(jobs) as threads:
            if found:
                about = in_place.indexed(found, to, dataset, threads)
            else:
                layout = (
                    label_maps.layout(form, source, work, options.ignore)
                    if form
                    else layouts.find(source, dataset)
                )
                about = _scattered(layout, to, work, jobs, threads, options)
        files.write_whole(to / "dataset.json", json.dumps(about, indent=1) + "\n")
        shutil.rmtree(work)
        return about
    finally:
        lock.release()


def _refuse_options(existing: bool, form: str | None, dataset: str | None, options: Options) -> None:
    """`existing`: the source is WebDataset shards. `form`: that of its label maps. Errors: Stop(USAGE)."""
    others = "--hold-out, --drop-unreadable, --shard-mb and --jobs; images and label maps keep their size"
    what, names, allowed = {
        "shards": (
            "existing shards",
            ("resize", "hold_out", "drop_unreadable", "ignore"),
            "no such option, because existing shards are indexed and not rewritten",
        ),
        "maps": ("label maps", ("dataset", "resize"), f"--ignore, {others}"),
        "ade20k": ("ADE20K", ("dataset", "resize", "ignore"), f"{others}, and the value 0 is ignored"),
        None: ("images without label maps", ("ignore",), "this option with images/ and maps/ only"),
    }["shards" if existing else form]
    given = asdict(options) | {"dataset": dataset}
    asked = [{"dataset": "as"}.get(name, name) for name in names if given[name]]
    if asked:
        raise Stop(
            Exit.USAGE,
            f"{', '.join('--' + name.replace('_', '-') for name in asked)} with {what}",
            allowed,
            "leave out this option",
        )


# ---- archives and folders: the first pass writes the shards, the second pass indexes them ------------------


def _scattered(
    layout: Layout,
    to: Path,
    work: Path,
    jobs: int,
    threads: ThreadPoolExecutor,
    options: Options,
) -> dict[str, Any]:
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
            f"{to} has {free / 1e9:.3g} GB of free space",
            f"{sum(layout.bytes.values()) / 1e9:.3g} GB of free space for the copy of the images",
            "free some space, or choose --to on another disk",
        )
    if not scatter.state.get("scattered"):
        try:
            _scatter(layout, plan, scatter, jobs, threads, options)
        finally:
            scatter.abandon()
    scatter.end()
    found = {split: scatter.names(split) for split in plan["shards"]}
    parts = indexing.indexed(to, found, threads, lambda split, sample: None, "label_maps" in plan)
    for split, made in parts.items():
        if not sum(made["images"]):
            raise Stop(
                Exit.USAGE,
                f"with --hold-out {options.hold_out:g} the split {split} has no image",
                "a percentage with which each split has images",
                f"rm -r {to}, then run the command with another --hold-out",
            )
        if made["content"] != scatter.state["content"].get(split, 0):
            raise Stop(
                Exit.DISK,
                f"{to}: the shards of {split} do not contain what was written",
                "a disk that stores files without errors",
                "check the disk, or choose --to on another disk",
            )
        if made["repeated"]:
            raise Stop(
                Exit.DAMAGED,
                f"two images of {split} have the key {made['repeated']}",
                "a different key for each image; a.jpg and a.jpeg have the same key, and so do a.b.jpg and"
                " a_b.jpg",
                f"rename or remove one of the two images; then rm -r {to} and run the same command again",
            )
    lossy = {"resize": options.resize, "quality": options.quality} if options.resize else None
    return indexing.about(to, plan, parts, lossy, scatter.state["dropped"])


def _plan(layout: Layout, work: Path, options: Options) -> dict[str, Any]:
    """Everything that decides the contents of the shards. It is saved at the first start.

    Errors: Stop(USAGE) if a later start has another source or other options.
    """
    asked: dict[str, Any] = {
        "dataset": layout.dataset,
        "source": {
            "kind": layout.kind,
            "files": [{"name": path.name, "bytes": path.stat().st_size} for path in layout.files],
            "bytes": layout.bytes,
        },
        "options": asdict(options),
    }
    if layout.label_maps:
        asked["source"] |= {"fingerprints": layout.fingerprints}
        asked["label_maps"] = layout.label_maps
    path = work / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text())
        if changed := [name for name in asked if json.loads(json.dumps(asked[name])) != plan[name]]:
            raise Stop(
                Exit.USAGE,
                f"{work.parent} was started with different {' and '.join(changed)}",
                "the same SOURCE and options as in the first start, to continue",
                f"use the same SOURCE and options; or rm -r {work.parent} to start from the beginning",
            )
        return plan
    classes = layout.classes()
    if not classes:
        raise Stop(
            Exit.MISSING,
            f"{layout.kind} without any class",
            "one folder or tar file for each class",
            "correct the path SOURCE",
        )
    if len(classes) == 1 and not layout.stream:
        raise Stop(
            Exit.USAGE,
            f"{layout.kind} with one class, {classes[0]}",
            "two classes or more",
            "correct the path SOURCE, which may be one level too high: the folders in SOURCE/train are the"
            " classes",
        )
    if options.hold_out and "val" in layout.splits:
        raise Stop(
            Exit.USAGE,
            f"--hold-out {options.hold_out:g}, but the source has validation images",
            "--hold-out only for a source without validation images",
            "leave out --hold-out",
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
    """Write the shards. Images are read in order, checked in parallel, and written in order."""
    classes = [entry["synset"] for entry in plan["classes"]]
    state, splits = scatter.state, list(layout.splits)
    if state["taken"] or state["split"]:
        say(f"continuing after {sum(state['images'].values())} images")
    with Meter("writing shards", sum(layout.bytes.values()) - state["read"]) as meter:
        for number in range(state["split"], len(splits)):
            split, skip = splits[number], state["taken"]
            for taken, data, target, odd in _in_order(layout, split, classes, skip, jobs, threads, options):
                state["taken"] += 1
                state["read"] += len(data) + len(target.get(LABEL_MAP, b""))
                meter.add(len(data) + len(target.get(LABEL_MAP, b"")))
                drop = options.drop_unreadable and any(word.startswith((*UNREADABLE, "bomb")) for word in odd)
                held = split not in plan["shards"] or _held_out(taken.key, split, plan, options)
                into = "val" if held else split
                if odd:
                    scatter.report(
                        {
                            "split": into,
                            "name": taken.name,
                            "key": taken.key,
                            "odd": odd,
                            "fate": "dropped" if drop else "kept as it is",
                        }
                    )
                if drop:
                    state["dropped"] += 1
                else:
                    scatter.add(into, taken.key, taken.suffix, data, target)
                if scatter.full():
                    scatter.commit()
            state["split"], state["taken"] = number + 1, 0
            scatter.commit()
        for name in layout.ignored:
            odd = ["no image or label map, or hidden, or read already" if layout.label_maps else "no image"]
            scatter.report({"name": name, "odd": odd, "fate": "left out"})
        for name in layout.again:
            odd = ["a link to a folder that is read already"]
            scatter.report({"name": name, "odd": odd, "fate": "left out"})
        state["scattered"] = True
        scatter.commit()


def _held_out(key: str, split: str, plan: dict[str, Any], options: Options) -> bool:
    """Whether --hold-out takes this image. A hash of its key decides, so it is the same on every machine."""
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
) -> Iterator[Examined]:
    """Each sample after the first `skip`. The threads check up to `jobs` samples at the same time.

    Single files are also read in the threads. A stream is read only in this thread, because it has one
    position.
    """

    def examine(taken: Taken, data: bytes | None) -> Examined:
        data = taken.read() if data is None else data
        target = {LABEL_MAP: taken.read_map()} if taken.read_map else {"cls": str(taken.label).encode()}
        try:
            odd = oddities(data, taken.suffix)
        except Bomb as bomb:
            if not options.drop_unreadable:
                raise Stop(
                    Exit.DAMAGED,
                    f"{taken.name}: {bomb}",
                    "images of a size that Pillow accepts",
                    "remove the image, or add --drop-unreadable to leave it out",
                ) from None
            return Examined(taken, data, target, [f"bomb: {bomb}"])
        if options.resize:
            taken, data = taken._replace(suffix="jpg"), shrunk(data, options.resize, options.quality)
        return Examined(taken, data, target, odd)

    waiting: deque[Future] = deque()
    for taken in islice(layout.splits[split](classes), skip, None):
        waiting.append(threads.submit(examine, taken, taken.read() if layout.stream else None))
        if len(waiting) > 4 * jobs:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
