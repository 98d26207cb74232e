"""The start panel: what this run will do, in words and numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from reconverge.base.terminal import counted
from reconverge.config import presets
from reconverge.config.settings import SEGMENT, Evaluate, Segment, Train
from reconverge.data.sources import Source
from reconverge.data.transforms import resized_side
from reconverge.distributed.world import World
from reconverge.run.first_difference import numerically
from reconverge.run.folder import Run
from reconverge.training.clock import Clock
from reconverge.weights import load


def job(
    cfg: Train, clock: Clock, net: nn.Module, groups: Sequence[Mapping[str, Any]], data: str
) -> dict[str, str]:
    """What will be trained, wherever it runs; `net` may be on the meta device.

    `groups`: those of optim.parameter_groups; `data`: the images, in words.
    """
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    epochs = f"{counted(cfg.epochs, 'epoch')} of {counted(clock.steps_per_epoch, 'step')} = "
    if cfg.schedule_steps:
        epochs = f"{clock.total / clock.steps_per_epoch:.4g} epochs of {clock.steps_per_epoch} steps = "
    schedule = f"{epochs}{counted(clock.total, 'step')}, {clock.warmup} of them warm-up"
    if clock.end < clock.total:
        schedule += f"; stops after step {clock.end}"
    repeated = f", each chosen one {cfg.augment.repeats} times an epoch" if cfg.augment.repeats > 1 else ""
    decayed = (
        sum(parameter.numel() for group in groups if group["weight_decay"] for parameter in group["params"])
        / 1e6
    )
    return {
        "model": (
            f"{'UPerNet on ' * (cfg.task == SEGMENT)}{cfg.model.name}, {parameters:.2f} M parameters,"
            f" stochastic depth {cfg.model.drop_path:g}"
        ),
        "recipe": f"{cfg.recipe.name}, seed {cfg.seed}",
        "data": data,
        "images": (
            _segmented(cfg.augment.size, cfg.segment, repeated)
            if cfg.task == SEGMENT
            else f"trained at {cfg.augment.size} px{repeated}; "
            f"evaluated at {cfg.evaluate.size} px: {_evaluated(cfg.evaluate)}"
        ),
        "batch": (
            f"{cfg.batch} images = {counted(clock.microbatches, 'microbatch', 'microbatches')} x"
            f" {cfg.microbatch}"
            + (f", in forward passes of {cfg.forward_images}" if cfg.forward_images else "")
        ),
        "schedule": schedule,
        "lr": _rate(cfg, clock),
        "weight decay": (
            f"{cfg.optim.weight_decay:g} on {decayed:.2f} M parameters, none on {parameters - decayed:.2f} M"
        ),
        **(layers(groups) if cfg.optim.layer_decay != 1 else {}),
        "EMA": _ema(cfg.ema.decay, clock),
    }


def images(cfg: Train, training: Source, validation: Source | None) -> str:
    held_out, notes = (f"{len(validation)}", validation.notes) if validation else ("no", [])
    text = (
        f"{cfg.data.name}: {len(training)} training and {held_out} validation images of"
        f" {counted(len(training.classes), 'class', 'classes')}"
    )
    return "; ".join([text, *training.notes, *notes])


def preset(cfg: Train) -> dict[str, str]:
    """What machine=NAME gave and what it costs; no row for machine=auto."""
    words = presets.in_words(cfg)
    return {"preset": words} if words else {}


def machine(cfg: Train, world: World, workers: int, decoder: str, run: Run) -> dict[str, str]:
    """Where it runs, and what that promises."""
    return {
        "machine": (
            f"{_ranks(cfg, world)}: {world.hardware()}, {cfg.precision}, {counted(world.threads, 'thread')},"
            f" {counted(workers, 'data worker')}"
        ),
        **preset(cfg),
        "decoder": decoder,
        "promises": _promises(run),
        "run": f"{run.folder}/" + (f", resumed after step {run.step}" if run.step else ""),
    }


def origin(cfg: Train, run: Run) -> dict[str, str]:
    """Where the run's first weights came from, and what became of each; nothing for a run that began from
    scratch.
    """
    loaded = run.recorded("init")
    if loaded is None:
        return {}
    rows = load.table(loaded)
    rows["head"] += (
        f" (model.head_init_scale={cfg.model.head_init_scale:g})" if "fresh" in loaded["head"] else ""
    )
    rows["init"] += "; this run's own checkpoint has taken their place" if run.step else ""
    return rows


def shortened(rows: Mapping[str, str]) -> dict[str, str]:
    """For the later runs of a sweep: the folder, where the weights came from, and the notices."""
    return {name: text for name, text in rows.items() if name.startswith(("run", "init", "notice"))}


def numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    return {f"{name} {number}": text for number, text in enumerate(texts, 1)}


def layers(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of each layer with a learning rate of its own: parameters, lr scale, the first and the last of them."""
    rows = {}
    for layer in sorted({group["layer"] for group in groups}):
        own = [group for group in groups if group["layer"] == layer]
        names = sorted((name for group in own for name in group["names"]), key=numerically)
        parameters = sum(parameter.numel() for group in own for parameter in group["params"])
        rows[f"layer {layer}"] = (
            f"lr x {own[0]['lr_scale']:.4g}, {parameters:,} parameters: {names[0]} ... {names[-1]}"
        )
    return rows


def _rate(cfg: Train, clock: Clock) -> str:
    optim = cfg.optim
    rule = f" ({optim.lr:g} x batch {cfg.batch} / {optim.lr_batch})" if optim.lr_batch else ""
    if optim.schedule == "poly":
        lr, last = optim.lr * clock.lr_factor, optim.min_lr * clock.lr_factor
        return f"peak {lr:g}{rule}, linear decay to {last:g}, formula of mmsegmentation"
    code = {"convnext": "ConvNeXt", "deit": "DeiT", "swin": "Swin"}[optim.schedule]
    return (
        f"peak {optim.lr * clock.lr_factor:g}{rule}, cosine decay to {optim.min_lr * clock.lr_factor:g},"
        f" formula of the {code} code"
    )


def _segmented(crop: int, segment: Segment, repeated: str) -> str:
    """How images with label maps are looked at."""
    longest, shortest = segment.resize
    low, high = segment.scale
    seen = f"windows of {segment.window} px" if segment.window else "whole"
    if len(segment.scales) > 1 or segment.flip:
        seen += f", in {counted(len(segment.scales), 'size')}{', also mirrored' * segment.flip}"
    return (
        f"resized to {longest} x {shortest} px; trained on crops of {crop} px{repeated}, at {low:g} to"
        f" {high:g} times this size; evaluated {seen}"
    )


def _evaluated(evaluate: Evaluate) -> str:
    side = resized_side(evaluate)
    if evaluate.mode == "squash":
        crop = "centre crop after resizing" if side != evaluate.size else "resized"
        return f"{crop} to {side} x {side} px, whatever the shape of the image"
    return f"centre crop after resizing the shorter side to {side} px"


def _ema(decay: float | None, clock: Clock) -> str:
    if decay is None:
        return "none"
    if not 0 < decay < 1:
        return f"decay {decay:g}"
    half_life = math.log(0.5) / math.log(decay)
    return (
        f"decay {decay:g}: half-life {counted(round(half_life), 'step')},"
        f" {half_life / clock.steps_per_epoch:.2g} epochs"
    )


def _ranks(cfg: Train, world: World) -> str:
    if world.size == 1:
        return "1 rank"
    return f"{world.size} ranks by {world.launcher}, gradients added by {cfg.reduce}, on each"


def _promises(run: Run) -> str:
    means = {
        "R1": "same command: same bits",
        "R2": "resumed: same bits",
        "R3": "any number of ranks and workers: same images",
        "R4": "any number of ranks: same bits",
    }
    kept = run.promises()
    text = " · ".join(f"{level} {meaning}" for level, meaning in means.items() if kept[level])
    given_up = [level for level in ("R1", "R2", "R3") if not kept[level]]
    return text + (
        f"; not {' and '.join(given_up)}: {', '.join(run.lost()) or 'deterministic=false'}"
        if given_up
        else ""
    )
