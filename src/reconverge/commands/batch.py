"""Print, and with --show draw, exactly the images of one step of a run, with the keys of their augmentation
and mixing.
"""

import argparse
from pathlib import Path
from typing import Any

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.data import native
from reconverge.run import reader
from reconverge.run.reader import Opened
from reconverge.training import datasets
from reconverge.training.datasets import Datasets

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


def main(arguments: argparse.Namespace) -> int:
    run = reader.opened(arguments.run)
    cfg, data = run.cfg, datasets.opened(run.cfg)
    _refuse_other_data(run, data)
    training, clock, order = data.training, data.clock, data.order
    for name, value, end in (
        ("step", arguments.step, clock.total),
        ("microbatch", arguments.microbatch or 0, clock.microbatches),
    ):
        if not 0 <= value < end:
            raise Stop(
                Exit.USAGE, f"--{name} {value}", f"0 to {end - 1}", f"--{name} {min(max(value, 0), end - 1)}"
            )

    from reconverge import build

    native.choose(cfg.data.native)
    numbers = range(clock.microbatches) if arguments.microbatch is None else [arguments.microbatch]
    images = build.augmented(cfg, training)
    for number in numbers:
        microbatch = order.microbatch(arguments.step, number)
        mixing = "/".join(map(str, (cfg.seed, "mix", arguments.step, number)))
        say(
            f"step {arguments.step}, epoch {microbatch.epoch}, microbatch {number} of {clock.microbatches};"
            f" mixing key {mixing}"
        )
        labels = training.labels(microbatch.ids).tolist()
        samples = zip(microbatch.ids.tolist(), microbatch.repeats.tolist(), labels, strict=True)
        for sample, repeat, label in samples:
            key = images.key(microbatch.epoch, sample, repeat)
            said = f"key {'/'.join(map(str, key))} = {chance.key(*key):016x}"
            name = training.classes[label]
            say(f"  sample {sample:<8} class {label} {name}  {said}  {training.where(sample)}")
    if arguments.show:
        _show(run, arguments.step, numbers, images, order)
    return Exit.DONE


def _refuse_other_data(run: Opened, data: Datasets) -> None:
    recorded, now = reader.environment(run.folder)["facts"]["data"], data.fingerprints()
    if any(recorded[split] != now[split] for split in ("train", "val")):
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"{run.cfg.data.root or run.cfg.data.name} is not the data that {run.folder} was trained on",
            "the same images: others have other sample ids",
            "put them back",
        )


def _show(run: Opened, step: int, numbers: range | list[int], images: Any, order: Any) -> None:
    """`images` and `order` are the loader's Images and the run's Order."""
    import torch

    from reconverge.data.mix import Mix, Normalise
    from reconverge.report import pictures

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
    last = f" to {numbers[len(drawn) - 1]}" if len(drawn) > 1 else ""
    which = f"microbatch{'es' * bool(last)} {numbers[0]}{last}"
    title = f"{pictures.short(run.folder.name, 60)}: step {step}, {which}"
    pictures.seen(path, pixels, targets, run.classes, cfg.data, cfg.mix, title)
    say(f"{len(pixels)} of {len(numbers) * cfg.microbatch} images drawn: {path}")
