"""Read every byte of a prepared data set, and list each fault with its shard, key and byte offset."""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reconverge.base.errors import Exit, Stop
from reconverge.base.launcher import cores
from reconverge.base.terminal import Meter, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder written by reconverge prepare")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="shards to read in parallel (default: the number of cores)"
    )


def main(arguments: argparse.Namespace) -> int:
    from reconverge.data import shards

    root = arguments.folder.expanduser()
    about = shards.load(root)
    faults = shards.problems(root, about)
    total = sum(shard["bytes"] for part in about["splits"].values() for shard in part["shards"])
    with ThreadPoolExecutor(arguments.jobs or cores()) as threads, Meter("checking", total) as meter:
        jobs = []
        for split, part in about["splits"].items():
            if shards.index_problem(root, part) is None:
                jobs += [
                    threads.submit(_faults, root, about, split, number, meter)
                    for number in range(len(part["shards"]))
                ]
        for job in jobs:
            faults += [fault for fault in job.result() if fault not in faults]
    for _, fault in faults:
        say(fault)
    for note in [note for split in about["splits"] for note in shards.notes(about, split)]:
        say(f"note: {note}")
    if faults:
        raise Stop(
            min(code for code, _ in faults),
            f"{len(faults)} fault{'s' * (len(faults) > 1)} in {root}, listed above",
            "a data set in which every byte is as reconverge prepare wrote it",
            "copy these shards again, or prepare the data set again",
        )
    say(f"{root}: no fault; every byte is as reconverge prepare wrote it")
    return Exit.DONE


def _faults(
    root: Path, about: dict[str, Any], split: str, number: int, meter: Meter
) -> list[tuple[Exit, str]]:
    """The faults of one shard. Its images and label maps are checked one by one only if the sha256 of the
    shard is wrong.
    """
    import xxhash

    from reconverge.base import files
    from reconverge.data import samples, shards

    source = shards.source(root, about, split)
    shard = source.shards[number]
    path = root / shard["name"]
    try:
        if files.sha256_of(path) == shard["sha256"]:
            meter.add(shard["bytes"], shard["images"])
            return []
    except FileNotFoundError:
        return [(Exit.MISSING, f"{path} is missing")]
    found = []
    parts = [("", "")] + [("label map of ", "map_")] * ("label_maps" in about)  # columns of the index
    first = int(source.images_of[:number].sum())
    with open(path, "rb") as file:
        for row in source.index.table[first : first + shard["images"]]:
            for what, prefix in parts:
                offset, size = int(row[f"{prefix}offset"]), int(row[f"{prefix}size"])
                file.seek(offset)
                data = file.read(size)
                if len(data) != size or xxhash.xxh3_64_intdigest(data) != row[f"{prefix}checksum"]:
                    fault = "is cut off" if len(data) != size else "has changed bytes"
                    said = f"{path}: {what}{os.fsdecode(row['key'])} at byte {offset} {fault}"
                    found.append((Exit.DAMAGED, said))
        file.seek(0)
        try:
            for _ in samples.read(file, str(path), maps="label_maps" in about):
                pass
        except Stop as stop:
            found.append((stop.code, str(stop.args[1])))
    return found or [(Exit.DAMAGED, f"{path}: a tar header, a label or padding has changed (wrong sha256)")]
