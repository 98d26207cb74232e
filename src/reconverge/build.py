"""Builds what train.py needs before its loop, in this order: the machine, the model, its weights, the feed.

Each part checks its settings first. The run's folder is changed only after that.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from reconverge import tasks
from reconverge.base import environment, launcher, terminal
from reconverge.config import presets, published
from reconverge.config.settings import Train
from reconverge.data import native
from reconverge.data.early import Early
from reconverge.data.loader import Batch, Feed, Quarantine
from reconverge.data.stage import Stage
from reconverge.distributed import libraries, ranks
from reconverge.distributed.world import World, default_threads, default_workers
from reconverge.milestones import Milestones
from reconverge.models import drop_path
from reconverge.report import panel
from reconverge.run.folder import Run
from reconverge.run.log import Log
from reconverge.run.state import State
from reconverge.tasks import Task
from reconverge.training import batch_norm, optim
from reconverge.training.batch_norm import RunningStatistics
from reconverge.training.datasets import Datasets
from reconverge.training.ema import Ema
from reconverge.training.gradients import Gradients
from reconverge.training.passes import Passes, refuse_other_passes
from reconverge.weights import load


class Machine(NamedTuple):
    world: World
    mine: range  # the microbatches of a step that this rank takes
    passes: Passes
    workers: int  # data worker processes
    decoder: str  # the libraries that decode images, as a text


class Model(NamedTuple):
    """The model with its raw weights, and the EMA, optimizer and gradients that belong to it."""

    net: nn.Module
    masked: Callable[..., Any]  # images, stochastic depth masks, ... -> what the loss needs; maybe compiled
    rates: list[float]  # stochastic depth rate of each block
    ema: Ema | None
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    gradients: Gradients

    def state(self) -> State:
        return State(self.net, self.ema, self.optimizer, self.scaler)


class Training(NamedTuple):
    """What the loop needs."""

    machine: Machine
    batches: Iterator[Batch]  # one microbatch at a time: uint8 images, on the device
    model: Model
    task: Task
    statistics: RunningStatistics
    start: int  # steps that are already done; 0 for a new run
    log: Log
    milestones: Milestones


def training(cfg: Train, run: Run, data: Datasets) -> Training:
    """Errors: Stop."""
    machine = _machine(cfg, run)
    world, classes = machine.world, data.training.classes
    run.fact("data", world.agree("data", data.fingerprints()))
    made = model(cfg, world, machine.passes, len(classes))
    start = _start(cfg, run, world, made, classes)
    stage = _stage(cfg, run, world, data) if cfg.data.stage is not None else None
    run.begin(start, data.clock, classes, data.notes(), machine.decoder)
    _introduce(cfg, run, machine, made, data)
    feed = _feed(cfg, run, machine, data, start, stage)
    log = Log(cfg, run, data.clock, world, feed, data.order.step_ids)
    task = tasks.of(cfg)(cfg, data, made.masked, made.rates, world, machine.workers)
    if (
        data.validation is not None
        and data.clock.evaluate_every is not None
        and start < data.clock.steps_per_epoch
    ):
        feed.early = Early(data.validation, cfg.data.on_bad_image, world.rank)
        run.closing.callback(feed.early.close)
    if tracer := world.tracer(cfg.debug.profile, run.folder / "trace.json"):
        run.closing.enter_context(tracer)
    milestones = Milestones(cfg, run, log, data.clock, world, made.state(), task, tracer)
    made.net.train()
    return Training(machine, iter(feed), made, task, RunningStatistics(made.net), start, log, milestones)


def model(cfg: Train, world: World, passes: Passes, classes: int) -> Model:
    """The model with initial weights, on the device. Errors: Stop(USAGE)."""
    net = world.place(tasks.of(cfg).network(cfg, classes), cfg.channels_last)
    refuse_other_passes(net, cfg.microbatch, cfg.forward_images)
    if cfg.checkpointing:
        net.set_grad_checkpointing()  # type: ignore[operator]
    masked = drop_path.Masked(net)
    if cfg.compile:
        masked = world.compiled(masked)
    ema = Ema(net, cfg.ema.decay) if cfg.ema.decay is not None else None
    optimizer = optim.adamw(net, cfg.optim, cfg.fused)
    gradients = Gradients(net, world, passes)
    return Model(net, masked, drop_path.rates(net), ema, optimizer, world.scaler(), gradients)


def _machine(cfg: Train, run: Run) -> Machine:
    """Ranks, device, threads, decoder. Those that decide the bits are recorded, and may not change later."""
    tree = cfg.reduce == "tree"
    mine = ranks.block(
        cfg.batch // cfg.microbatch, launcher.HERE.rank, launcher.HERE.size, tree, cfg.microbatch
    )
    passes = Passes(len(mine), cfg.microbatch, cfg.forward_images, tree)
    presets.refuse_without_gpu(cfg, torch.cuda.is_available())
    world = World(cfg.device, cfg.precision, cfg.deterministic)
    run.fact("code", world.agree("code", environment.code_hash()))
    run.fact("versions", world.agree("versions", environment.decisive_versions()))
    run.fact("libraries", world.agree("libraries", libraries.decisive(world.device)))
    workers = default_workers(world.device) if cfg.workers is None else cfg.workers
    threads = cfg.threads or run.recorded("threads") or default_threads(world.device, workers)
    world.set_threads(min(world.gather_objects(threads)))  # equal on all ranks: the fewest of any host
    run.fact("threads", world.threads)
    run.fact("hardware", world.all_of(world.hardware()))
    layout = world.layout()
    if run.recorded("ranks") == world.size:  # recorded when the hosts were not
        layout = world.size
    run.fact("ranks", "a power of two" if tree else layout, free=True)
    run.fact("forward_images", cfg.forward_images or cfg.microbatch, free=True)
    decoder = world.all_of(native.choose(cfg.data.native))
    # Exact decoding gives the same pixels with and without native/.
    first = "native" if native.chosen() else "torch"
    pixels = f"fast, {first} first" if cfg.data.decode == "fast" else "exact"
    run.fact("pixels", world.agree("pixels", pixels))
    return Machine(world, mine, passes, workers, decoder)


def _start(cfg: Train, run: Run, world: World, made: Model, classes: list[str]) -> int:
    """Load the first of these that exists: the run's newest valid checkpoint, the weights of init=. Otherwise
    keep the random initial weights. Returns the number of steps that are done.
    """
    state = made.state()
    start, skipped = state.restore(run.checkpoints)
    for reason in skipped:
        terminal.say(f"skipped a damaged checkpoint: {reason}")  # selftest looks for this text
    if start == 0 and (init := cfg.init) is not None:
        loaded = ranks.from_rank_0(lambda: load.load(made.net, init, cfg.init_strict, cfg.init_head, classes))
        run.fact("init", loaded)
    world.broadcast(tensor for one in state.models().values() for tensor in one.state_dict().values())
    if start == 0 and made.ema is not None:
        made.ema.model.load_state_dict(made.net.state_dict())
    return start


def _introduce(cfg: Train, run: Run, machine: Machine, made: Model, data: Datasets) -> None:
    """Print the start panel, which the later runs of a sweep shorten."""
    images = panel.images(cfg, data.training, data.validation)
    rows = panel.job(cfg, data.clock, made.net, made.optimizer.param_groups, images)
    rows |= panel.origin(cfg, run)
    rows |= panel.machine(cfg, machine.world, machine.workers, machine.decoder, run)
    notices = published.notices(cfg, run.overrides, batch_norm.has(made.net))
    notices += (run.recorded("init") or {}).get("notices", []) if run.step == 0 else []
    rows |= panel.numbered("notice", notices)
    terminal.panel(cfg.run, panel.shortened(rows) if launcher.brief() else rows)


def _stage(cfg: Train, run: Run, world: World, data: Datasets) -> Stage:
    """The local copies of shards (data.stage)."""
    folder, copies = Path(str(cfg.data.stage)).expanduser() / cfg.run, world.local_rank == 0
    owner = str(run.folder.resolve())
    stage = Stage(data.training, data.order.windows, folder, cfg.data.stage_gb, copies, owner)
    return run.closing.enter_context(stage)


def _feed(cfg: Train, run: Run, machine: Machine, data: Datasets, start: int, stage: Stage | None) -> Feed:
    """Loads the microbatches of this rank, for all steps after step `start`."""
    world, order = machine.world, data.order
    microbatches = order.steps(start, data.clock.end, world.rank, world.size)
    if stage is not None:
        microbatches = stage.follow(microbatches)
    quarantine = Quarantine(run.folder / "quarantine.jsonl", cfg.data.max_substitutes)
    images = tasks.of(cfg).augmented(cfg, data.training)
    return Feed(images, microbatches, machine.workers, world.device, cfg.copy_ahead, quarantine)
