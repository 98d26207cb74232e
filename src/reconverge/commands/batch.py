"""Print, and with --show draw, exactly the images of one step of a run, with the keys of their augmentation
and mixing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from reconverge.errors import Exit, Stop
from reconverge.opened import Opened, opened
from reconverge.progress import say

DRAWN = 256  # images, at most, of one picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    parser.add_argument(
        "--step",
        type=int,
        required=True,
        metavar="N",
        help="from 0; what metrics.jsonl calls step N + 1 is the state after it",
    )
    parser.add_argument("--microbatch", type=int, metavar="M", help="this one alone")
    parser.add_argument(
        "--show", action="store_true", help=f"draw them as the model sees them, {DRAWN} at most"
    )


def run(arguments: argparse.Namespace) -> int:
    run = opened(arguments.run)
    cfg = run.cfg

    from reconverge import chance
    from reconverge.clock import Clock
    from reconverge.data import native, sources, transforms
    from reconverge.data.loader import Images
    from reconverge.data.order import Order

    training, validation = sources.open_sources(cfg.data)
    _same_data(run, training.fingerprint, validation.fingerprint if validation else None)
    clock = Clock.of(cfg, len(training))
    for name, value, end in (
        ("step", arguments.step, clock.total),
        ("microbatch", arguments.microbatch or 0, clock.microbatches),
    ):
        if not 0 <= value < end:
            raise Stop(
                Exit.USAGE, f"--{name} {value}", f"0 to {end - 1}", f"--{name} {min(max(value, 0), end - 1)}"
            )
    native.choose(cfg.data.native)
    numbers = range(clock.microbatches) if arguments.microbatch is None else [arguments.microbatch]
    images = Images(
        training,
        transforms.training(cfg.augment, cfg.data.mean, cfg.data.decode),
        cfg.seed,
        cfg.data.on_bad_image,
    )
    order = Order.of(cfg, training)

    for number in numbers:
        microbatch = order.microbatch(arguments.step, number)
        mixing = "/".join(map(str, (cfg.seed, "mix", arguments.step, number)))
        say(
            f"step {arguments.step}, epoch {microbatch.epoch}, microbatch {number} of {clock.microbatches};"
            f" mixing key {mixing}"
        )
        labels = training.labels(microbatch.ids).tolist()
        for sample, repeat, label in zip(
            microbatch.ids.tolist(), microbatch.repeats.tolist(), labels, strict=True
        ):
            key = images.key(microbatch.epoch, sample, repeat)
            said = f"key {'/'.join(map(str, key))} = {chance.key(*key):016x}"
            say(
                f"  sample {sample:<8} class {label} {training.classes[label]}  {said} "
                f" {training.where(sample)}"
            )
    if arguments.show:
        _show(run, arguments.step, numbers, images, order)
    return Exit.DONE


def _same_data(run: Opened, train: str, val: str | None) -> None:
    recorded = json.loads((run.folder / "environment.json").read_text())["facts"]["data"]
    if (recorded["train"], recorded["val"]) != (train, val):
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"{run.cfg.data.root or run.cfg.data.name} is not the data that {run.folder} was trained on",
            "the same images: others have other sample ids",
            "put them back",
        )


def _show(run: Opened, step: int, numbers: range | list[int], images: Any, order: Any) -> None:
    """`images` and `order` are the loader's Images and the run's Order."""
    import torch

    from reconverge import pictures
    from reconverge.data.mix import Mix, Normalise

    cfg, drawn = run.cfg, []
    normalise = Normalise(cfg.data.mean, cfg.data.std, torch.device("cpu"), channels_last=False)
    mix = Mix(cfg.augment.erase, cfg.mix, len(run.classes))
    for number in numbers[: -(-DRAWN // cfg.microbatch)]:
        loaded = images[order.microbatch(step, number)]
        if isinstance(loaded, Stop):
            raise loaded
        batch, _ = loaded
        drawn.append(mix(normalise(batch.images), batch.labels, (cfg.seed, step, number)))
    pixels, targets = (torch.cat(parts)[:DRAWN] for parts in zip(*drawn, strict=True))
    path = run.folder / f"batch-{step:08d}.png"
    which = (
        f"microbatches {numbers[0]} to {numbers[len(drawn) - 1]}"
        if len(drawn) > 1
        else f"microbatch {numbers[0]}"
    )
    title = f"step {step}, {which}, augmented and mixed, as the model sees it"
    pictures.seen(path, pixels, targets, run.classes, cfg.data, title)
    say(f"{len(pixels)} of {len(numbers) * cfg.microbatch} images drawn: {path}")
