"""Measure how fast the data loader is without a model, and which part takes how long."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import torch

from reconverge import build
from reconverge.base.errors import Exit
from reconverge.base.terminal import counted, say
from reconverge.config.settings import Train
from reconverge.data import native
from reconverge.data.loader import Feed
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
    training, order, images = sets.training, sets.order, build.augmented(cfg, sets.training)
    say(
        f"{cfg.data.name}: {len(training)} images; {cfg.augment.size} px, decode {cfg.data.decode},"
        f" microbatches of {cfg.microbatch}"
    )
    say(f"decoder: {native.choose(cfg.data.native)}")

    # ---- the time of each part, one image after the other in this process ----
    ids = order.microbatch(0, 0).ids[:64].tolist()
    cropping = build.augmented(replace(cfg, augment=replace(cfg.augment, auto="none", flip=0.0)), training)
    read = _milliseconds(training.read, ids, seconds / 10)
    cropped = _milliseconds(lambda sample: cropping.sample(0, sample, 0), ids, seconds / 10)
    whole = _milliseconds(lambda sample: images.sample(0, sample, 0), ids, seconds / 10)
    together = _milliseconds(lambda _: images[order.microbatch(0, 0)], [0], 0) / cfg.microbatch
    collate = max(0.0, together - whole)
    for name, value in (
        ("read and verify", read),
        ("decode, crop, resize", cropped - read),
        ("flip and RandAugment", whole - cropped),
        ("collate", collate),
    ):
        say(f"  {name:<22} {value:7.3f} ms an image")
    say(
        f"  {'together':<22} {whole + collate:7.3f} ms: {1000 / (whole + collate):.0f} images/s in one"
        " process"
    )

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


def _milliseconds(job: Callable[[int], object], ids: list[int], seconds: float) -> float:
    """Median time of job(id): over all `ids` at least once, and for `seconds` at least."""
    spent: list[float] = []
    began = time.perf_counter()
    for number in count():
        if number >= len(ids) and time.perf_counter() - began > seconds:
            return statistics.median(spent) * 1000
        started = time.perf_counter()
        job(ids[number % len(ids)])
        spent.append(time.perf_counter() - started)
    raise AssertionError


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
