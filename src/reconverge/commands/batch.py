"""List exactly the images of one training step of a run, with the random keys of their augmentation and
mixing. --show also draws them.
"""

import argparse
from pathlib import Path
from typing import Any

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.config import rules
from reconverge.data import native
from reconverge.run import reader
from reconverge.run.reader import Opened
from reconverge.training import datasets
from reconverge.training.datasets import Datasets

DRAWN = 256  # images in one picture at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    parser.add_argument(
        "--step",
        type=int,
        required=True,
        metavar="N",
        help="number of the step, as in the log and metrics.jsonl; the first step is 1",
    )
    parser.add_argument(
        "--microbatch",
        type=int,
        metavar="M",
        help="only this microbatch of the step, counted from 0 (default: all of them)",
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help=f"draw the images as the model sees them, {DRAWN} at most, into RUN/batch-STEP.png",
    )


def main(arguments: argparse.Namespace) -> int:
    run = reader.opened(arguments.run)
    rules.refuse_segmenters(run.cfg.task, "reconverge batch")
    cfg, data = run.cfg, datasets.opened(run.cfg)
    _refuse_other_data(run, data)
    training, clock, order = data.training, data.clock, data.order
    for name, value, first, last, counted in (
        ("step", arguments.step, 1, clock.total, "steps are counted from 1, as in the log"),
        ("microbatch", arguments.microbatch or 0, 0, clock.microbatches - 1, "counted from 0"),
    ):
        if not first <= value <= last:
            allowed = f"{first} to {last}; {counted}"
            raise Stop(Exit.USAGE, f"--{name} {value}", allowed, f"--{name} {min(max(value, first), last)}")

    from reconverge import tasks

    step = arguments.step - 1  # random keys and the order count steps from 0

    native.choose(cfg.data.native)
    numbers = range(clock.microbatches) if arguments.microbatch is None else [arguments.microbatch]
    images = tasks.of(cfg).augmented(cfg, training)
    for number in numbers:
        microbatch = order.microbatch(step, number)
        mixing = "/".join(map(str, (cfg.seed, "mix", step, number)))
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
        _show(run, step, numbers, images, order)
    return Exit.DONE


def _refuse_other_data(run: Opened, data: Datasets) -> None:
    recorded, now = reader.environment(run.folder)["facts"]["data"], data.fingerprints()
    if any(recorded[split] != now[split] for split in ("train", "val")):
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"the images in {run.cfg.data.root or run.cfg.data.name} are not those that {run.folder} was"
            " trained on",
            "the same images as in training; with other images, the sample ids mean different images",
            "restore the images that the run was trained on",
        )


def _show(run: Opened, step: int, numbers: range | list[int], images: Any, order: Any) -> None:
    """Draw the microbatches `numbers` of `step` (from 0). `images`: loader.Images; `order`: order.Order."""
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
        (labels,) = batch.targets
        drawn.append(mix(normalise(batch.images), labels, (cfg.seed, step, number), batch.noise))
    pixels, targets = (torch.cat(parts)[:DRAWN] for parts in zip(*drawn, strict=True))
    path = run.folder / f"batch-{step + 1:08d}.png"
    last = f" to {numbers[len(drawn) - 1]}" if len(drawn) > 1 else ""
    which = f"microbatch{'es' * bool(last)} {numbers[0]}{last}"
    title = f"{pictures.short(run.folder.name, 60)}: step {step + 1}, {which}"
    pictures.seen(path, pixels, targets, run.classes, cfg.data, cfg.mix, title)
    say(f"drew {len(pixels)} of {len(numbers) * cfg.microbatch} images: {path}")
