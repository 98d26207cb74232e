"""How fast a model is, and how much memory it takes: inference and training, by batch size, up to where the
memory ends.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reconverge import chance, models, optim
from reconverge.errors import Exit, explain
from reconverge.models import drop_path, throughput
from reconverge.progress import say
from reconverge.settings import Train
from reconverge.world import World, default_threads

CLASSES = 1000


def bench(cfg: Train, batches: list[int], seconds: float, phases: list[str], json_to: Path | None) -> int:
    """Measure with the model, precision, compile, channels_last, checkpointing, threads and sizes of `cfg`.

    `batches`: tried in this order, until one does not fit. `seconds`: to measure each. Says a Markdown table.
    """
    world = World(cfg.device, cfg.precision, cfg.deterministic)
    world.set_threads(cfg.threads or default_threads(world.device, 0))
    sizes = {"inference": cfg.evaluate.size, "training": cfg.augment.size}
    models.refuse_sizes(
        models.on_meta(cfg.model, CLASSES),
        {"evaluate.size": cfg.evaluate.size, "augment.size": cfg.augment.size},
    )
    say(f"{cfg.model.name} on {world.hardware()}; {_how(cfg, world)}")
    say("")
    say("| | px | batch | images/s | ms a batch | peak memory, GB |")
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
                ended[phase] = f"a batch of {batch} does not fit"
                break
            rows.append(
                {
                    "phase": phase,
                    "size": sizes[phase],
                    "batch": batch,
                    "images_per_second": 1000 * batch / milliseconds,
                    "ms": milliseconds,
                    "peak_gb": memory,
                }
            )
            say(
                f"| {phase} | {sizes[phase]} | {batch} | {1000 * batch / milliseconds:.4g} |"
                f" {milliseconds:.4g} | {memory:.3g} |"
            )
        del prepared
    say("")
    known = {
        size: throughput.published(cfg.model.name, size)
        for size in dict.fromkeys(sizes[phase] for phase in phases)
    }
    for phase, reason in ended.items():
        say(f"{phase}: {reason}")
    for size, figures in known.items():
        for name, value in figures.items():
            say(f"published at {size} px: {name}: {value:g}")
    if json_to:
        about = {
            "model": asdict(cfg.model),
            "hardware": world.hardware(),
            "torch": torch.__version__,
            "precision": cfg.precision,
            "compile": cfg.compile,
            "channels_last": cfg.channels_last,
            "checkpointing": cfg.checkpointing,
            "threads": world.threads,
        }
        json_to.write_text(
            json.dumps(about | {"measured": rows, "ended": ended, "published": known}, indent=1) + "\n"
        )
        say(f"written to {json_to}")
    return Exit.DONE


def _how(cfg: Train, world: World) -> str:
    switches = [name for name in ("compile", "channels_last", "checkpointing") if getattr(cfg, name)]
    threads = [f"{world.threads} threads"] if world.device.type == "cpu" else []
    return ", ".join([f"torch {torch.__version__}", cfg.precision, *switches, *threads])


Pass = Callable[[Tensor], object]


def _inference(cfg: Train, world: World) -> Pass:
    net = world.place(models.build(cfg.model, CLASSES, cfg.seed), cfg.channels_last).eval()
    forward = torch.compile(net) if cfg.compile else net

    def infer(images: Tensor) -> Tensor:
        with torch.no_grad(), world.autocast():
            return forward(images)

    return infer


def _training(cfg: Train, world: World) -> Pass:
    """A step as train.py has it, of one microbatch: stochastic depth, forward, backward, AdamW; no images, no
    EMA.
    """
    net = world.place(models.build(cfg.model, CLASSES, cfg.seed), cfg.channels_last).train()
    rates = drop_path.rates(net)
    if cfg.checkpointing:
        net.set_grad_checkpointing()  # type: ignore[operator]
    masked = torch.compile(drop_path.Masked(net)) if cfg.compile else drop_path.Masked(net)
    optimizer, scaler = optim.adamw(net, cfg.optim, cfg.fused), world.scaler()
    optim.set_learning_rate(optimizer, 0.0)  # the weights stay, and so do the times

    def train(images: Tensor) -> None:
        masks = drop_path.draw(rates, len(images), (cfg.seed, 0, 0), world.device)
        with world.autocast():
            loss = cross_entropy(
                masked(images, masks).float(),
                torch.zeros(len(images), dtype=torch.long, device=images.device),
            )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


PHASES = {"inference": _inference, "training": _training}


def _measured(run: Pass, batch: int, size: int, world: World, seconds: float) -> tuple[float, float]:
    """Median milliseconds of a batch, and peak GB: what torch allocated on a GPU, on a CPU what the process
    held.
    """
    images = torch.randn(batch, 3, size, size, generator=chance.generator("bench", batch)).to(world.device)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident size begins anew
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
