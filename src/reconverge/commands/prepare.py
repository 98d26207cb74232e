"""Make a data set of shards from what people download; interrupted, the same command goes on."""

import argparse
import json
from pathlib import Path

from reconverge.base.errors import Exit, Stop
from reconverge.base.launcher import cores
from reconverge.base.terminal import counted, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="an archive, or the folder where the archives or class folders are",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the new data set")
    parser.add_argument(
        "--as",
        dest="dataset",
        choices=("imagenet1k", "imagenet22k", "folder"),
        help="what it is, where the form does not tell",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="images that are decoded and examined at a time (default: the cores)",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="validation images, of a set that has none (by key)",
    )
    parser.add_argument(
        "--drop-unreadable",
        action="store_true",
        help="leave out what Pillow cannot decode, and say so in report.jsonl",
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="SHORT_SIDE",
        help="a smaller, lossy copy: pixels of the shorter side at most",
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="JPEG quality of the smaller copy (default: 90)"
    )
    parser.add_argument(
        "--shard-mb", type=float, default=200.0, metavar="MB", help="size of a shard, about (default: 200)"
    )


def main(arguments: argparse.Namespace) -> int:
    from reconverge.prepare.make import Options, prepare
    from reconverge.prepare.odd import UNREADABLE

    jobs = cores() if arguments.jobs is None else arguments.jobs
    for name, value, good in (
        ("jobs", jobs, jobs >= 1),
        ("hold-out", arguments.hold_out, 0 <= arguments.hold_out < 100),
        ("resize", arguments.resize, arguments.resize is None or arguments.resize >= 16),
        ("quality", arguments.quality, 1 <= arguments.quality <= 100),
        ("shard-mb", arguments.shard_mb, arguments.shard_mb > 0),
    ):
        if not good:
            raise Stop(
                Exit.USAGE,
                f"--{name} {value}",
                "jobs from 1, hold-out 0 to 100, resize from 16, quality 1 to 100, shard-mb above 0",
                f"another --{name}",
            )
    options = Options(
        arguments.shard_mb, arguments.hold_out, arguments.resize, arguments.quality, arguments.drop_unreadable
    )
    about = prepare(
        arguments.source.expanduser(), arguments.to.expanduser(), arguments.dataset, jobs, options
    )
    lines = (arguments.to.expanduser() / "report.jsonl").read_text().splitlines()
    splits = ", ".join(
        f"{counted(part['images'], 'image')} in {counted(len(part['shards']), 'shard')} of {split}"
        for split, part in about["splits"].items()
    )
    say(f"{about['dataset']}: {splits}; {counted(len(about['classes']), 'class', 'classes')}")
    if lines:
        unread = sum(any(word.startswith(UNREADABLE) for word in json.loads(line)["odd"]) for line in lines)
        stays = (
            ""
            if unread == about["dropped"]
            else " (training stops at one: --drop-unreadable, or data.on_bad_image=substitute)"
        )
        say(
            f"{counted(len(lines), 'odd file')}, {unread} of them unreadable{stays}; {about['dropped']}"
            " dropped: report.jsonl"
        )
    say(
        f"data=shards data.root={arguments.to}"
        if about["dataset"] == "folder"
        else f"data={about['dataset']} data.root={arguments.to}"
    )
    return Exit.DONE
