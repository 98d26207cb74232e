"""Train a model: python train.py model=convnext_t recipe=in1k data=folder data.root=/path.

See README.md. The job from top to bottom: compose, build, loop. The loop is here and nowhere else.
"""

import sys
from pathlib import Path

from reconverge.base import launcher, signals
from reconverge.base.errors import Exit, exit_code
from reconverge.base.imports import without
from reconverge.base.terminal import say
from reconverge.commands import sweep
from reconverge.config import compose, published, rules
from reconverge.config.settings import Train
from reconverge.distributed import ranks
from reconverge.run.folder import Run
from reconverge.training import datasets
from reconverge.training.datasets import Datasets


def main() -> int:
    signals.catch()
    flags = {"-m", "--multirun", "--check"}.intersection(sys.argv[1:])
    overrides = [argument for argument in sys.argv[1:] if argument not in flags]
    if flags & {"-m", "--multirun"}:
        return sweep.run(overrides)
    cfg = compose.composed(Path(__file__).parent / "conf", "config", Train, overrides)
    rules.check(cfg)
    if "--check" in flags:
        say(f"{cfg.run}: the settings fit together; neither images nor devices were looked at")
        return Exit.DONE
    with (
        ranks.joined(cfg.world_timeout, cfg.deterministic),
        Run(cfg, overrides) as run,
        ranks.losses_named(),
        ranks.faults_named(lambda: run.step),
    ):
        if summary := run.finished():
            again = f"run=NAME starts a new run; remove {run.folder} to repeat this one"
            say(f"{cfg.run} is finished: {summary}\n{again}")
            return Exit.DONE
        return train(cfg, run, datasets.opened(cfg))


def train(cfg: Train, run: Run, data: Datasets) -> int:
    # Imported here: until configuration and data are accepted, nobody waits for these seconds.
    import torch
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    with without("wandb"):  # timm imports it where it is installed: half a second
        from reconverge import build
    from reconverge.training import optim

    machine, batches, model, task, statistics, start, log, milestones = build.training(cfg, run, data)
    world, clock, passes = machine.world, data.clock, machine.passes
    optimizer, scaler, gradients = model.optimizer, model.scaler, model.gradients
    floats = optim.floats(model.net)  # looked at after each update

    if milestones.before(start):
        return log.preempted()

    for step in range(start, clock.end):
        rate = optim.learning_rate(cfg.optim, step, clock)
        optim.set_learning_rate(optimizer, rate)
        losses: list[torch.Tensor] = []
        digests: list[int] = []

        for microbatch in machine.mine:
            batch = next(batches)  # uint8, already on the device
            digests.append(batch.digest)
            inputs = task.inputs(batch, (cfg.seed, step, microbatch))  # with every random draw
            if step == microbatch == 0:
                task.draw_inputs(run.folder, *inputs)
            for part in passes(*inputs):  # one forward pass, unless forward_images says otherwise
                with world.autocast():
                    loss = task.loss(*part)  # the sum over all parts of all ranks is the loss of the step
                if not losses:
                    statistics.note()  # BatchNorm's follow microbatch 0 alone, which is the first of rank 0
                scaler.scale(loss).backward()
                gradients.add()
                losses.append(loss.detach())

        gradients.reduce()
        scaler.unscale_(optimizer)
        norm = get_total_norm(gradients.views)
        if cfg.optim.clip is not None:
            clip_grads_with_norm_(gradients.parameters, cfg.optim.clip, norm)
        skip = (~norm.isfinite()).float()  # on the device: what is not finite never reaches the weights
        optim.update(optimizer, skip)
        gradients.clear()
        statistics.settle(skip)
        scaler.update()
        if model.ema is not None:
            model.ema.update(skip)
        log.step_done(step + 1, losses, optim.checked(floats, norm), rate, digests)

        if milestones.after(step + 1):
            return log.preempted()

    scores, sets = log.scores(), (data.training, data.validation)
    return log.done(published.comparison(cfg, clock.total, run.step, *sets, scores))


if __name__ == "__main__":
    launcher.leave(exit_code(main))
