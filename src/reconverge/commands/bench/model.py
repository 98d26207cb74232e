"""Measure the speed and memory of a model: inference and training for each batch size, until one does not
fit.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reconverge import build
from reconverge.base import chance
from reconverge.base.errors import Exit, explain
from reconverge.base.terminal import counted, say
from reconverge.config import rules
from reconverge.config.settings import Train
from reconverge.distributed.world import World, default_threads
from reconverge.models import create, drop_path, throughput
from reconverge.training import optim
from reconverge.training.passes import Passes

CLASSES = 1000


def bench(cfg: Train, batches: list[int], seconds: float, phases: list[str], json_to: Path | None) -> int:
    """Measure with the model, precision, compile, channels_last, checkpointing, threads and sizes of `cfg`.

    `batches`: batch sizes, tried in this order until one does not fit into memory. `seconds`: measuring time
    of each. Prints a Markdown table.
    """
    rules.refuse_segmenters(cfg.task, "reconverge bench model")
    world = World(cfg.device, cfg.precision, cfg.deterministic)
    world.set_threads(cfg.threads or default_threads(world.device, 0))
    sizes = {"inference": cfg.evaluate.size, "training": cfg.augment.size}
    tried = {"evaluate.size": cfg.evaluate.size, "augment.size": cfg.augment.size}
    create.refuse_sizes(create.on_meta(cfg.model, CLASSES), tried)
    say(f"{cfg.model.name} on {world.hardware()}; {_how(cfg, world)}")
    say("\n| | px | batch | images/s | ms a batch | peak memory, GB |")
    say("|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    ended: dict[str, str] = {}
    for phase in phases:
        prepared = PHASES[phase](cfg, world)
        for batch in batches:
            try:
                milliseconds, memory = _measured(prepared, batch, sizes[phase], world, seconds)
            except Exception as error:
                stop = explain(error)
                if stop is None or stop.code != Exit.OUT_OF_MEMORY:
                    raise
                ended[phase] = f"a batch of {batch} does not fit into memory"
                break
            speed = 1000 * batch / milliseconds
            row = {"phase": phase, "size": sizes[phase], "batch": batch}
            rows.append(row | {"images_per_second": speed, "ms": milliseconds, "peak_gb": memory})
            numbers = [f"{speed:.4g}", f"{milliseconds:.4g}", f"{memory:.3g}"]
            say(f"| {' | '.join([*map(str, row.values()), *numbers])} |")
        del prepared
    say("")
    known = {size: throughput.figures(cfg.model.name, size) for size in {sizes[phase]: 0 for phase in phases}}
    for phase, reason in ended.items():
        say(f"{phase}: {reason}")
    for size, figures in known.items():
        for name, value in figures.items():
            say(f"published at {size} px: {name}: {value:g}")
        if figures:
            say(f"measured here with {_conditions(cfg)}")
        for gpu, conditions in throughput.CONDITIONS.items():
            if any(name.startswith(gpu) for name in figures) and conditions != _conditions(cfg):
                say(f"published for the {gpu.partition(' ')[0]} with {conditions}")
    if json_to:
        switches = ("precision", "compile", "channels_last", "checkpointing", "deterministic")
        about = {"model": asdict(cfg.model), "hardware": world.hardware(), "torch": torch.__version__}
        about |= {name: getattr(cfg, name) for name in switches} | {"threads": world.threads}
        found = {"measured": rows, "ended": ended, "published": known}
        json_to.write_text(json.dumps(about | found, indent=1) + "\n")
        say(f"written to {json_to}")
    return Exit.DONE


def _how(cfg: Train, world: World) -> str:
    switches = [name for name in ("compile", "checkpointing") if getattr(cfg, name)]
    switches.insert(0, "channels_last" if cfg.channels_last else "images as N x C x H x W")
    switches.append(
        "deterministic kernels" if cfg.deterministic else "kernels that need not be deterministic"
    )
    threads = [counted(world.threads, "thread")] if world.device.type == "cpu" else []
    return ", ".join([f"torch {torch.__version__}", cfg.precision, *switches, *threads])


def _conditions(cfg: Train) -> str:
    """As the words of throughput.CONDITIONS."""
    names = ("deterministic", "precision", "channels_last", "compile")
    return " ".join(f"{name}={str(getattr(cfg, name)).lower()}" for name in names)


Pass = Callable[[Tensor], object]


def _inference(cfg: Train, world: World) -> Pass:
    net = world.place(create.model(cfg.model, CLASSES, cfg.seed), cfg.channels_last).eval()
    forward = world.compiled(net) if cfg.compile else net

    def infer(images: Tensor) -> Tensor:
        with torch.no_grad(), world.autocast():
            return forward(images)

    return infer


def _training(cfg: Train, world: World) -> Pass:
    """A training step as in train.py, with one microbatch: stochastic depth, forward, backward, AdamW. It
    loads no images and has no EMA.
    """
    without_ema = replace(cfg, ema=replace(cfg.ema, decay=None))
    net, masked, rates, _, optimizer, scaler, gradients = build.model(
        without_ema, world, Passes(1, cfg.microbatch, None), CLASSES
    )
    net.train()
    optim.set_learning_rate(optimizer, 0.0)  # the weights stay the same, so every step takes equally long
    skip = torch.zeros((), device=world.device)

    def train(images: Tensor) -> None:
        masks = drop_path.draw(rates, len(images), (cfg.seed, 0, 0), world.device)
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        with world.autocast():
            loss = cross_entropy(masked(images, masks).float(), labels)
        scaler.scale(loss).backward()
        gradients.add()
        gradients.reduce()
        scaler.unscale_(optimizer)
        optim.update(optimizer, skip)
        gradients.clear()
        scaler.update()

    return train


PHASES = {"inference": _inference, "training": _training}


def _measured(run: Pass, batch: int, size: int, world: World, seconds: float) -> tuple[float, float]:
    """Median milliseconds of a batch, and peak GB: memory that torch allocated on a GPU, or on a CPU the
    resident memory of the process.
    """
    images = torch.randn(batch, 3, size, size, generator=chance.generator("bench", batch)).to(world.device)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident memory (VmHWM)
    for _ in range(2):
        run(images)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        _wait(world)
        began = time.perf_counter()
        run(images)
        _wait(world)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times), _peak(world)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _peak(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
