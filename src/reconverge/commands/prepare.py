"""Convert downloaded archives, class folders, or images with label maps into a data set of shards. If it is
interrupted, run the same command again to continue.
"""

import argparse
import json
from pathlib import Path

from reconverge.base.errors import Exit, Stop
from reconverge.base.launcher import cores
from reconverge.base.terminal import counted, say

RANGES = {
    "jobs": "1 or more",
    "hold-out": "0 or more, and less than 100 (percent)",
    "resize": "16 or more (pixels)",
    "quality": "1 to 100",
    "shard-mb": "more than 0",
    "ignore": "0 to 255, or none",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="an archive; or the folder that contains the archives, the class folders, or images/ and maps/;"
        " or ADEChallengeData2016",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the new data set")
    parser.add_argument(
        "--as",
        dest="dataset",
        choices=("imagenet1k", "imagenet22k", "folder"),
        help="the kind of data set, needed only if the layout of SOURCE fits more than one",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="images to decode and check in parallel (default: the number of cores)",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="use this share of the training images for validation, if the data set has no validation images",
    )
    parser.add_argument(
        "--drop-unreadable",
        action="store_true",
        help="leave out images that Pillow cannot decode, and list them in report.jsonl",
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="SHORT_SIDE",
        help="shrink images whose shorter side has more than this many pixels; saved as JPEG, which is lossy",
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="JPEG quality with --resize (default: 90)"
    )
    parser.add_argument(
        "--shard-mb", type=float, default=200.0, metavar="MB", help="approximate shard size (default: 200)"
    )
    parser.add_argument(
        "--ignore",
        metavar="VALUE",
        help="with images/ and maps/: value of pixels without a class, or none (default: 255)",
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
        ("ignore", arguments.ignore, arguments.ignore in (None, "none", *map(str, range(256)))),
    ):
        if not good:
            raise Stop(
                Exit.USAGE,
                f"--{name} {value}",
                RANGES[name],
                f"choose another --{name}",
            )
    options = Options(
        arguments.shard_mb,
        arguments.hold_out,
        arguments.resize,
        arguments.quality,
        arguments.drop_unreadable,
        arguments.ignore,
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
            else " (training stops at an unreadable image: prepare with --drop-unreadable, or train with"
            " data.on_bad_image=substitute)"
        )
        say(
            f"unusual files: {len(lines)}, of which unreadable: {unread}{stays}; left out:"
            f" {about['dropped']}. All are listed in report.jsonl"
        )
    name = about["dataset"] if about["dataset"] in ("imagenet1k", "imagenet22k") else "shards"
    task = "task=segment " if "label_maps" in about else ""
    say(f"to train on it: python train.py {task}data={name} data.root={arguments.to}")
    return Exit.DONE
