"""The start panel: what this run will do, in words and numbers."""

import math

from torch import nn

from reconverge.clock import Clock
from reconverge.config import batch_notice
from reconverge.data.sources import Source
from reconverge.data.transforms import resized_side
from reconverge.models import weights
from reconverge.run import Run
from reconverge.settings import Train
from reconverge.world import World


def rows(
    cfg: Train, clock: Clock, net: nn.Module, world: World, workers: int, training: Source, validation: Source, run: Run
) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    batch = f"{cfg.batch} images = {clock.microbatches} microbatches x {cfg.microbatch} on {world.size} rank"
    schedule = f"{cfg.epochs} epochs of {clock.steps_per_epoch} steps = {clock.total} steps, {clock.warmup} of them warm-up"
    if clock.end < clock.total:
        schedule += f"; stops after step {clock.end}"
    panel = {
        "model": f"{cfg.model.name}, {parameters:.2f} M parameters, stochastic depth {cfg.model.drop_path:g}",
        "recipe": f"{cfg.recipe.name}, seed {cfg.seed}",
        "data": f"{cfg.data.name}: {len(training)} training and {len(validation)} validation images of {len(training.classes)} classes"
        + (f"; {ignored} files that are no images left out" if (ignored := training.ignored + validation.ignored) else ""),
        "images": f"trained at {cfg.augment.size} px; "
        f"evaluated at {cfg.evaluate.size} px from {resized_side(cfg.evaluate)} ({cfg.evaluate.mode})",
        "batch": batch,
        "schedule": schedule,
        "learning rate": f"{cfg.optim.lr:g}, cosine to {cfg.optim.min_lr:g}; weight decay {cfg.optim.weight_decay:g}",
        "EMA": _ema(cfg.ema.decay, clock),
        "machine": f"{world.hardware()}, {cfg.precision}, {world.threads} threads, {workers} data workers",
        "promises": _promises(run),
        "run": f"{run.folder}/" + (f", resumed after step {run.step}" if run.step else ""),
    }
    if origin := run.recorded("init"):
        panel |= weights.table(origin)
        panel["head"] += f" (model.head_init_scale={cfg.model.head_init_scale:g})" if "fresh" in origin["head"] else ""
        panel["init"] += "; this run's own checkpoint has taken their place" if run.step else ""
    if notice := batch_notice(cfg):
        panel["notice"] = notice
    return panel


def _ema(decay: float | None, clock: Clock) -> str:
    if decay is None:
        return "none"
    if not 0 < decay < 1:
        return f"decay {decay:g}"
    half_life = math.log(0.5) / math.log(decay)
    return f"decay {decay:g}: half-life {half_life:.0f} steps, {half_life / clock.steps_per_epoch:.2g} epochs"


def _promises(run: Run) -> str:
    means = {"R1": "same command, same bits", "R2": "resumed, same bits", "R3": "any workers, same images"}
    kept = run.promises()
    text = " · ".join(f"{level} {meaning}" for level, meaning in means.items() if kept[level])
    given_up = [level for level in means if not kept[level]]
    return text + (f"; not {' and '.join(given_up)}: {', '.join(run.lost()) or 'deterministic=false'}" if given_up else "")
