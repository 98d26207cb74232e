"""Measure the data loader or the model alone, with the settings of train.py."""

import argparse
from pathlib import Path

from reconverge.base.errors import Exit, Stop
from reconverge.config import compose, presets, rules

OVERRIDES = (
    "settings as for train.py: model=convnext_t recipe=in1k precision=bf16 data=imagenet1k data.root=/path"
    " workers=8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(required=True, metavar="PART", dest="part")
    data = parts.add_parser(
        "data",
        help="speed of the data loader without a model",
        description="Measure the speed of the data loader without a model.",
    )
    data.add_argument("--seconds", type=float, default=20.0, metavar="S", help="measuring time (default: 20)")
    data.add_argument(
        "--gpu",
        type=float,
        default=1000.0,
        metavar="X",
        help="images/s that one GPU trains, to compute how many GPUs the loader can feed (default: 1000)",
    )
    what = "images/s and peak memory of inference and training for each batch size, with published figures"
    model = parts.add_parser("model", help=what, description=f"Measure {what}.")
    model.add_argument(
        "--batches",
        default="1,2,4,8,16,32,64,128,256,512",
        metavar="N,N",
        help="batch sizes to try in this order; stops at the first that does not fit into memory",
    )
    model.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="measuring time of each size (default: 3)"
    )
    model.add_argument("--phase", choices=("inference", "training"), help="measure only this (default: both)")
    model.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the results to this JSON file; the terminal shows a Markdown table",
    )
    for part in (data, model):
        part.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def main(arguments: argparse.Namespace) -> int:
    gpu = getattr(arguments, "gpu", 1.0)
    if not (arguments.seconds > 0 and gpu > 0):
        raise Stop(
            Exit.USAGE,
            f"--seconds {arguments.seconds:g} --gpu {gpu:g}",
            "numbers more than 0",
            "--seconds 20 --gpu 1000",
        )
    batches = [int(text) if text.isdigit() else 0 for text in getattr(arguments, "batches", "1").split(",")]
    if not all(batches):
        raise Stop(
            Exit.USAGE,
            f"--batches {arguments.batches}",
            "whole numbers of 1 or more, separated by commas",
            "--batches 1,32,256",
        )
    cfg = compose.of_training(arguments.overrides)
    rules.check(cfg)

    import torch

    presets.refuse_without_gpu(cfg, torch.cuda.is_available())
    if arguments.part == "data":
        from reconverge.commands.bench import data

        return data.bench(cfg, arguments.seconds, gpu)

    from reconverge.commands.bench import model

    phases = [arguments.phase] if arguments.phase else ["inference", "training"]
    return model.bench(cfg, batches, arguments.seconds, phases, arguments.json)
