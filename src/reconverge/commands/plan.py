"""What a training will be, without training: batch, worlds, steps, learning rates, layers, memory,
operations, hours, and what departs from the published recipe. The arguments are train.py's.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reconverge.base import terminal
from reconverge.base.errors import Exit, Stop
from reconverge.base.imagenet import DATASETS
from reconverge.config import compose, published, rules
from reconverge.config.settings import Train
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
        help="as for train.py: model=NAME recipe=NAME data=NAME ...",
    )
    parser.add_argument(
        "--world", type=int, default=1, metavar="N", help="ranks that share each step; one a GPU"
    )
    parser.add_argument(
        "--images-per-second",
        type=float,
        metavar="X",
        help="of one rank, as a run prints it; else no hours are given",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="where to draw the schedule; plan-MODEL-RECIPE.png"
    )


def main(arguments: argparse.Namespace) -> int:
    cfg = compose.of_training(arguments.overrides)
    # Images need not be here yet.
    rules.check(replace(cfg, data=replace(cfg.data, root=cfg.data.root or ".")))
    picture = arguments.picture or Path(f"plan-{cfg.model.name}-{cfg.recipe.name}.png")
    speed = arguments.images_per_second
    if speed is not None and not 0 < speed < float("inf"):
        raise Stop(Exit.USAGE, f"--images-per-second {speed:g}", "more than 0", "what a run prints")
    if picture.suffix not in PICTURES or not picture.parent.is_dir():
        raise Stop(
            Exit.USAGE,
            f"--picture {picture}",
            f"a file in a folder that exists, ending in {', '.join(PICTURES)}",
            "--picture plan.png",
        )

    from reconverge.distributed.ranks import block, worlds
    from reconverge.models import create
    from reconverge.report import panel, pictures
    from reconverge.training import optim
    from reconverge.training.passes import Passes

    images, classes, data = _images(cfg, arguments.overrides)
    clock = Clock.of(cfg, images)
    world, tree = arguments.world, cfg.reduce == "tree"
    mine = block(clock.microbatches, 0, world, tree, cfg.microbatch)
    passes = Passes(len(mine), cfg.microbatch, cfg.forward_images, tree)
    net = create.on_meta(cfg.model, classes)
    create.refuse_sizes(net, {"augment.size": cfg.augment.size, "evaluate.size": cfg.evaluate.size})
    groups = optim.parameter_groups(net, cfg.optim)

    def rate(step: int) -> float:
        return optim.learning_rate(cfg.optim, step, clock)

    sizes = [f"{size} x {clock.microbatches // size}" for size in worlds(clock.microbatches, tree)]
    rates = [f"{step + 1}: {rate(step):.4g} ({what})" for step, what in _key_steps(clock)]
    rows = panel.job(cfg, clock, net, groups, data) | {
        "worlds": f"{'; '.join(sizes)}  (ranks x microbatches of a rank)",
        "lr at steps": "; ".join(rates),
        **_cost(cfg, net, passes, world, classes, cfg.batch * clock.end),
        "time": _time(speed, world, cfg.batch * clock.end),
        "picture": str(picture),
    }
    steps = _spread(clock.total, 2000)
    layers = {group["layer"]: group["lr_scale"] for group in groups}
    pictures.plan(picture, [step / clock.steps_per_epoch for step in steps], list(map(rate, steps)), layers)
    notices = panel.numbered("notice", published.notices(cfg, arguments.overrides))
    terminal.panel(f"plan of {cfg.model.name} with {cfg.recipe.name}", rows | notices)
    return Exit.DONE


def _cost(
    cfg: Train, net: "nn.Module", passes: "Passes", world: int, classes: int, images: int
) -> dict[str, str]:
    """Operations and memory of training `net`, which is on the meta device and becomes unusable."""
    from reconverge.distributed.world import DTYPES
    from reconverge.models import cost
    from reconverge.training.gradients import copies

    operations = cost.operations(net, cfg.augment.size) * images
    if cfg.checkpointing:
        net.set_grad_checkpointing()  # type: ignore[operator]
    dtype, ema = DTYPES[cfg.precision], cfg.ema.decay is not None
    # A sum over ranks needs room for a partner's, which a sum over leaves has left.
    gradients = max(copies(passes.leaves), min(world, 2)) if passes.tree else 1
    memory = cost.memory(net, passes.images, cfg.augment.size, classes, dtype, ema, gradients)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory._asdict().items() if size)
    return {
        "operations": (
            f"{operations:.4g} floating-point operations: forward and backward of {images:,} images at"
            f" {cfg.augment.size} px"
        ),
        "memory": (
            f"{memory.total / 1e9:.2f} GB a rank, and what kernels and the device take for themselves:"
            f" {parts}"
        ),
    }


def _images(cfg: Train, overrides: Sequence[str]) -> tuple[int, int, str]:
    """Training images, classes, and both in words: those of the data if it was named and can be opened, else
    the published ones.
    """
    from reconverge.data import sources
    from reconverge.report import panel

    known = DATASETS.get(str(cfg.recipe.dataset))
    named = any(override.startswith(("data=", "data.")) for override in overrides)
    reason = "no data= was given"
    if named or known is None:
        try:
            if cfg.data.kind in ("folder", "shards") and cfg.data.root is None:
                raise Stop(
                    Exit.MISSING, f"data={cfg.data.name} without data.root", "a folder", "data.root=/path"
                )
            training, validation = sources.open_sources(cfg.data)
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


def _time(speed: float | None, world: int, images: int) -> str:
    if speed is None:
        return (
            "not estimated: --images-per-second X, of one rank (python train.py ... debug=synthetic"
            " measures it)"
        )
    hours = images / (speed * world) / 3600
    return (
        f"{hours:.3g} hours on {terminal.counted(world, 'rank')} of {speed:g} images/s,"
        f" {hours * world:.3g} GPU-hours, without evaluation"
    )


def _spread(total: int, most: int) -> Sequence[int]:
    """Up to about `most` of the steps 0..total-1, the last among them."""
    steps = list(range(0, total, max(1, total // most)))
    return steps if steps[-1] == total - 1 else [*steps, total - 1]
