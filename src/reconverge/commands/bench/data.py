"""Measure how fast the data loader is without a model, and which part takes how long."""

import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from reconverge import tasks
from reconverge.base.errors import Exit
from reconverge.base.terminal import counted, say
from reconverge.config.settings import Train
from reconverge.data import native
from reconverge.data.loader import Feed
from reconverge.data.order import Microbatch
from reconverge.data.sources import Source
from reconverge.distributed.world import World, default_workers
from reconverge.training import datasets


def bench(cfg: Train, seconds: float, gpu: float) -> int:
    """Measure with the data, augmentation and workers of `cfg`.

    `seconds`: how long the loader is measured. `gpu`: images/s that one GPU trains.
    """
    world = World(cfg.device, cfg.precision, cfg.deterministic)
    workers = default_workers(world.device) if cfg.workers is None else cfg.workers
    torch.set_num_threads(1)
    sets = datasets.opened(cfg)
    training, order, images = sets.training, sets.order, tasks.of(cfg).augmented(cfg, sets.training)
    say(
        f"{cfg.data.name}: {len(training)} images; {cfg.augment.size} px, decode {cfg.data.decode},"
        f" microbatches of {cfg.microbatch}"
    )
    say(f"decoder: {native.choose(cfg.data.native)}")

    # ---- the time of each part, in this process ----
    parts = ("read and verify", "decode, crop, resize", "flip and RandAugment", "collate")
    spent = _parts(cfg, training, order.microbatch(0, 0), seconds / 3)
    for name, milliseconds in zip(parts, spent, strict=True):
        say(f"  {name:<22} {milliseconds:7.3f} ms an image")
    together = sum(spent)
    say(f"  {'together':<22} {together:7.3f} ms: {1000 / together:.0f} images/s in one process")

    # ---- the loader with its workers, as train.py uses it ----
    microbatches = order.steps(0, sys.maxsize // order.microbatches)
    feed = iter(Feed(images, microbatches, workers, world.device, cfg.copy_ahead))
    speed, latencies = _drain(feed, cfg.microbatch, seconds)
    per_worker = f", {speed / workers:.0f} for each worker" if workers else ""
    say(f"{counted(workers, 'worker')}: {speed:.0f} images/s{per_worker}")
    say(
        f"time between two microbatches: {latencies[len(latencies) // 2] * 1000:.1f} ms (median),"
        f" {latencies[len(latencies) * 99 // 100] * 1000:.1f} ms (99th percentile)"
    )
    needed = f"; workers that one such GPU needs: {math.ceil(gpu / (speed / workers))}" if workers else ""
    say(f"enough for {speed / gpu:.2g} GPUs that train {gpu:g} images/s each{needed}")
    return Exit.DONE


def _parts(cfg: Train, training: Source, microbatch: Microbatch, seconds: float) -> list[float]:
    """Milliseconds an image: reading, decoding and cropping, the other augmentations, and what joins the
    images of a microbatch.

    These are means over the images of `microbatch`, because some images, and some operations of RandAugment,
    take much longer than others: medians would not add up. There are at least two rounds after a first one
    that warms up, and as many as `seconds` allow.
    """
    cropping = tasks.of(cfg).augmented(
        replace(cfg, augment=replace(cfg.augment, auto="none", flip=0.0)), training
    )
    images, samples = tasks.of(cfg).augmented(cfg, training), microbatch.ids.tolist()
    augmented, inside = images.sample, list[float]()

    def timed(epoch: int, sample: int, repeat: int) -> tuple[np.ndarray, ...]:
        began = time.perf_counter()
        loaded = augmented(epoch, sample, repeat)
        inside.append(time.perf_counter() - began)
        return loaded

    images.sample = timed  # type: ignore[method-assign]
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < end:
        inside.clear()
        times = [time.perf_counter()]
        for sample in samples:
            training.read(sample)
        times.append(time.perf_counter())
        for sample, repeat in zip(samples, microbatch.repeats.tolist(), strict=True):
            cropping.sample(microbatch.epoch, sample, repeat)
        times.append(time.perf_counter())
        images[microbatch]
        times.append(time.perf_counter())
        read, cropped, together = (after - before for before, after in pairwise(times))
        parts = [read, cropped - read, sum(inside) - cropped, together - sum(inside)]
        rounds.append([1000 * part / len(samples) for part in parts])
    return [statistics.fmean(values) for values in zip(*rounds[1:], strict=True)]


def _drain(batches: Iterator[object], images: int, seconds: float) -> tuple[float, list[float]]:
    """Images/s of batches of `images` images each, and the sorted seconds between two batches.

    The first three batches only fill the queues, so they do not count.
    """
    for _ in range(3):
        next(batches)
    latencies: list[float] = []
    began = last = time.perf_counter()
    while last - began < seconds or len(latencies) < 10:
        next(batches)
        now = time.perf_counter()
        latencies.append(now - last)
        last = now
    return images * len(latencies) / (last - began), sorted(latencies)
