"""Measure a part of a training job by itself, with the settings of train.py."""

import argparse
from pathlib import Path

from reconverge.base.errors import Exit, Stop
from reconverge.config import compose, rules

OVERRIDES = (
    "as for train.py: model=convnext_t recipe=in1k precision=bf16 data=imagenet1k data.root=/path workers=8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(required=True, metavar="PART", dest="part")
    data = parts.add_parser(
        "data", help="the loader alone, at full speed", description="Measure the loader alone, at full speed."
    )
    data.add_argument("--seconds", type=float, default=20.0, metavar="S", help="to measure (default: 20)")
    data.add_argument(
        "--gpu", type=float, default=1000.0, metavar="X", help="images/s that one GPU trains (default: 1000)"
    )
    what = "inference and training by batch size: images/s and peak memory, beside the published figures"
    model = parts.add_parser("model", help=what, description=f"Measure {what}.")
    model.add_argument(
        "--batches",
        default="1,2,4,8,16,32,64,128,256,512",
        metavar="N,N",
        help="batch sizes, until one does not fit",
    )
    model.add_argument("--seconds", type=float, default=3.0, metavar="S", help="to measure each (default: 3)")
    model.add_argument("--phase", choices=("inference", "training"), help="only this")
    model.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="what was measured, for programs; the table on the terminal is Markdown",
    )
    for part in (data, model):
        part.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def main(arguments: argparse.Namespace) -> int:
    gpu = getattr(arguments, "gpu", 1.0)
    if not (arguments.seconds > 0 and gpu > 0):
        raise Stop(
            Exit.USAGE,
            f"--seconds {arguments.seconds:g} --gpu {gpu:g}",
            "numbers above 0",
            "--seconds 20 --gpu 1000",
        )
    batches = [int(text) if text.isdigit() else 0 for text in getattr(arguments, "batches", "1").split(",")]
    if not all(batches):
        raise Stop(
            Exit.USAGE,
            f"--batches {arguments.batches}",
            "numbers from 1, with commas between",
            "--batches 1,32,256",
        )
    cfg = compose.of_training(arguments.overrides)
    rules.check(cfg)
    if arguments.part == "data":
        from reconverge.commands.bench import data

        return data.bench(cfg, arguments.seconds, gpu)

    from reconverge.commands.bench import model

    phases = [arguments.phase] if arguments.phase else ["inference", "training"]
    return model.bench(cfg, batches, arguments.seconds, phases, arguments.json)
