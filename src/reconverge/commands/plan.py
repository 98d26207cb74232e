"""Print what a training would do, without training: batch, steps, learning rates, layers, possible numbers of
ranks, FLOPs, memory, hours, and what differs from the published recipe. It takes the settings of train.py.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reconverge.base import terminal
from reconverge.base.errors import Exit, Stop
from reconverge.base.imagenet import DATASETS
from reconverge.config import compose, presets, published, rules
from reconverge.config.settings import SEGMENT, Train
from reconverge.training.clock import Clock

if TYPE_CHECKING:  # they import torch
    from torch import nn

    from reconverge.training.passes import Passes

PICTURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings as for train.py: model=NAME recipe=NAME data=NAME ...",
    )
    parser.add_argument(
        "--ranks",
        "--world",
        type=int,
        default=1,
        metavar="N",
        help="number of ranks, which is the number of GPUs (default: 1); --world means the same",
    )
    parser.add_argument(
        "--images-per-second",
        type=float,
        metavar="X",
        help="training speed of one rank, as a run prints it; needed to estimate the hours",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="file for the picture of the schedule (default: plan-MODEL-RECIPE.png)",
    )


def main(arguments: argparse.Namespace) -> int:
    cfg = compose.of_training(arguments.overrides)
    # A plan does not need the images: data.root may be missing.
    rules.check(replace(cfg, data=replace(cfg.data, root=cfg.data.root or ".")))
    picture = arguments.picture or Path(f"plan-{cfg.model.name}-{cfg.recipe.name}.png")
    speed = arguments.images_per_second
    if speed is not None and not 0 < speed < float("inf"):
        raise Stop(
            Exit.USAGE,
            f"--images-per-second {speed:g}",
            "a number more than 0",
            "--images-per-second 400, or the speed that a run prints",
        )
    if picture.suffix not in PICTURES or not picture.parent.is_dir():
        raise Stop(
            Exit.USAGE,
            f"--picture {picture}",
            f"a file in a folder that exists, with the suffix {', '.join(PICTURES)}",
            "--picture plan.png",
        )

    from reconverge import tasks
    from reconverge.distributed.ranks import block, worlds
    from reconverge.report import panel, pictures
    from reconverge.training import batch_norm, optim
    from reconverge.training.passes import Passes

    images, classes, data = _images(cfg, arguments.overrides)
    clock = Clock.of(cfg, images)
    ranks, tree = arguments.ranks, cfg.reduce == "tree"
    mine = block(clock.microbatches, 0, ranks, tree, cfg.microbatch)
    passes = Passes(len(mine), cfg.microbatch, cfg.forward_images, tree)
    net = tasks.of(cfg).on_meta(cfg, classes)
    groups = optim.parameter_groups(net, cfg.optim)

    def rate(step: int) -> float:
        return optim.learning_rate(cfg.optim, step, clock)

    sizes = [f"{size} x {clock.microbatches // size}" for size in worlds(clock.microbatches, tree)]
    rates = [f"{step + 1}: {rate(step):.4g} ({what})" for step, what in _key_steps(clock)]
    rows = panel.job(cfg, clock, net, groups, data) | {
        "ranks": f"{ranks}; possible (ranks x microbatches of each rank): {', '.join(sizes)}",
        "lr at steps": "; ".join(rates),
        **panel.preset(cfg),
        **({} if cfg.task == SEGMENT else _cost(cfg, net, passes, ranks, classes, cfg.batch * clock.end)),
        "time": _time(speed, ranks, cfg.batch * clock.end),
        "picture": str(picture),
    }
    steps = _spread(clock.total, 2000)
    layers = {group["layer"]: group["lr_scale"] for group in groups}
    pictures.plan(picture, [step / clock.steps_per_epoch for step in steps], list(map(rate, steps)), layers)
    notices = published.notices(cfg, arguments.overrides, batch_norm.has(net))
    rows |= panel.numbered("notice", notices)
    terminal.panel(f"plan of {cfg.model.name} with {cfg.recipe.name}", rows)
    return Exit.DONE


def _cost(
    cfg: Train, net: "nn.Module", passes: "Passes", ranks: int, classes: int, images: int
) -> dict[str, str]:
    """FLOPs and memory of training `net` on `images` images.

    `net` is on the meta device and cannot be used afterwards.
    """
    from reconverge.distributed.world import DTYPES
    from reconverge.models import cost
    from reconverge.training.gradients import copies

    under = f" with precision={cfg.precision} of machine={cfg.machine.name}"
    under = under if presets.given(cfg).get("precision") == cfg.precision else ""
    flops = cost.operations(net, cfg.augment.size) * images
    if cfg.checkpointing:
        net.set_grad_checkpointing()  # type: ignore[operator]
    dtype, ema = DTYPES[cfg.precision], cfg.ema.decay is not None
    # Adding gradients of two ranks needs two copies; a rank with several leaves has had these already.
    gradients = max(copies(passes.leaves), min(ranks, 2)) if passes.tree else 1
    memory = cost.memory(net, passes.images, cfg.augment.size, classes, dtype, ema, gradients)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory._asdict().items() if size).replace(
        "ema", "EMA"
    )
    return {
        "FLOPs": (
            f"{flops:.4g} for {images:,} images of {cfg.augment.size} px (a multiply-add counts as 2,"
            " forward and backward as 3 forward passes)"
        ),
        "memory": f"{memory.total / 1e9:.2f} GB for each rank{under}: {parts}; CUDA and its"
        " kernels need more",
    }


def _images(cfg: Train, overrides: Sequence[str]) -> tuple[int, int, str]:
    """Numbers of training images and classes, and a text about them.

    They come from the data if data= was given and it can be opened, and else from the published data set.
    """
    from reconverge.data import sources, suitable
    from reconverge.report import panel

    known = DATASETS.get(str(cfg.recipe.dataset))
    named = any(override.startswith(("data=", "data.")) for override in overrides)
    reason = "no data= was given"
    if named or known is None:
        try:
            if cfg.data.kind in ("folder", "shards", "maps", "ade20k") and cfg.data.root is None:
                raise Stop(
                    Exit.MISSING, f"data={cfg.data.name} without data.root", "a folder", "data.root=/path"
                )
            training, validation = sources.open_sources(cfg.data)
            suitable.refuse_other_task(cfg.task, training, cfg.data.name)
            return len(training), len(training.classes), panel.images(cfg, training, validation)
        except Stop as stop:
            if known is None or stop.code not in (Exit.MISSING, Exit.PERMISSION):
                raise
            reason = stop.args[1]
    words = f"{known.training:,} training images of {known.classes:,} classes ({reason})"
    return known.training, known.classes, f"{cfg.recipe.dataset} as published: {words}"


def _key_steps(clock: Clock) -> list[tuple[int, str]]:
    found = {0: "first", clock.total // 2: "half way", clock.total - 1: "last"}
    if clock.warmup:
        found |= {
            clock.warmup // 2: "in the warm-up",
            clock.warmup - 1: "last of the warm-up",
            clock.warmup: "first after the warm-up",
        }
    return sorted(found.items())


def _time(speed: float | None, ranks: int, images: int) -> str:
    if speed is None:
        return (
            "not estimated: add --images-per-second X, the speed of one rank (python train.py ..."
            " debug=synthetic measures it)"
        )
    hours = images / (speed * ranks) / 3600
    return (
        f"{hours:.3g} hours on {terminal.counted(ranks, 'rank')} of {speed:g} images/s each,"
        f" {hours * ranks:.3g} GPU-hours, without evaluation"
    )


def _spread(total: int, most: int) -> Sequence[int]:
    """About `most` evenly spaced steps of 0..total-1, with the last step."""
    steps = list(range(0, total, max(1, total // most)))
    return steps if steps[-1] == total - 1 else [*steps, total - 1]
