"""Train an image classifier: python train.py model=convnext_t recipe=in1k data=folder data.root=/path. See README.md.

The job from top to bottom: compose, build, loop. The loop is here and nowhere else.
"""

import sys
from pathlib import Path

from reconverge import config
from reconverge.clock import Clock
from reconverge.errors import exit_code
from reconverge.progress import panel, say
from reconverge.run import Run, catch_signals, told_to_stop
from reconverge.settings import Train


def main() -> int:
    catch_signals()
    cfg = config.from_command_line(Path(__file__).parent / "conf", "config", Train)
    config.check(cfg)
    with Run(cfg) as run:
        if summary := run.finished():
            say(f"{cfg.run} is finished: {summary}")
            return 0
        return train(cfg, run)


def train(cfg: Train, run: Run) -> int:
    # Imported here: until a configuration is accepted, nobody waits for these seconds.
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from reconverge import describe, environment, models, optim, pictures, published
    from reconverge.data import order, sources, transforms
    from reconverge.data.loader import Feed, Images, Quarantine
    from reconverge.data.mix import Mix, Normalise
    from reconverge.data.stage import Stage
    from reconverge.ema import Ema
    from reconverge.evaluate import evaluate
    from reconverge.models import drop_path, weights
    from reconverge.models.batch_norm import RunningStatistics
    from reconverge.state import State
    from reconverge.world import World, default_threads, default_workers

    # ---- build: the machine, the images, the model ----
    run.fact("code", environment.code_hash())
    run.fact("versions", environment.decisive_versions())
    world = World(cfg.device, cfg.precision, cfg.deterministic)
    workers = default_workers(world.device) if cfg.workers is None else cfg.workers
    world.set_threads(cfg.threads or run.recorded("threads") or default_threads(world.device, workers))
    run.fact("threads", world.threads)
    run.fact("hardware", world.hardware())

    training, validation = sources.open_sources(cfg.data)
    run.fact("data", {"train": training.fingerprint, "val": validation.fingerprint if validation else None, "order": order.VERSION})
    clock = Clock.of(cfg, len(training))
    batch_order = order.Order.of(cfg, training)
    run.samples_of = batch_order.step_ids
    normalise = Normalise(cfg.data.mean, cfg.data.std, world.device, cfg.channels_last)
    mix = Mix(cfg.augment.erase, cfg.mix, len(training.classes))

    net = world.place(models.build(cfg.model, len(training.classes), cfg.seed), cfg.channels_last)
    rates = drop_path.rates(net)
    if cfg.checkpointing:
        net.set_grad_checkpointing()  # type: ignore[operator]
    masked = torch.compile(drop_path.Masked(net)) if cfg.compile else drop_path.Masked(net)
    ema = Ema(net, cfg.ema.decay) if cfg.ema.decay is not None else None
    optimizer = optim.adamw(net, cfg.optim, cfg.fused)
    scaler = world.scaler()

    # ---- where to start: the run's own newest valid checkpoint, else the weights of init=, else from scratch ----
    state = State(net, ema, optimizer, scaler)
    start, skipped = state.restore(run.checkpoints)
    for reason in skipped:
        say(f"skipped a damaged checkpoint: {reason}")
    if start == 0 and cfg.init is not None:
        run.fact("init", weights.load(net, cfg.init, cfg.init_strict, cfg.init_head, training.classes))
        if ema is not None:
            ema.model.load_state_dict(net.state_dict())
    statistics = RunningStatistics(net)  # as restored or loaded
    run.start(start, clock, training.classes, training.notes + (validation.notes if validation else []))
    job = describe.job(cfg, clock, net, optimizer.param_groups, describe.images(cfg, training, validation))
    machine = describe.machine(cfg, world, workers, run)
    panel(cfg.run, job | describe.origin(cfg, run) | machine | describe.numbered("notice", config.notices(cfg)))

    augmented = Images(training, transforms.training(cfg.augment, cfg.data.mean, cfg.data.decode), cfg.seed, cfg.data.on_bad_image)
    microbatches = batch_order.steps(start, clock.end, world.rank, world.size)
    if cfg.data.stage is not None:
        stage = Stage(training, batch_order.windows, Path(cfg.data.stage).expanduser() / cfg.run, cfg.data.stage_gb)
        microbatches = run.closing.enter_context(stage).follow(microbatches)
    quarantine = Quarantine(run.folder / "quarantine.jsonl", cfg.data.max_substitutes)
    feed = Feed(augmented, microbatches, workers, world.device, cfg.copy_ahead, quarantine)
    batches = iter(feed)

    def measure(step: int) -> None:
        """Evaluate both sets of weights after `step`: metrics.jsonl, curves.png, predictions.png."""
        assert validation is not None, "without validation images evaluate_every is never"
        net.eval()
        results = evaluate(state.models(), validation, cfg.evaluate, normalise, world, workers, stop=told_to_stop)
        net.train()
        if results is not None:
            run.log(step, **{f"{name}_{key}": getattr(result, key) for name, result in results.items() for key in ("top1", "top5", "loss")})
            pictures.curves(run.folder / "curves.png", run.records(), clock.steps_per_epoch)
            pictures.predictions(run.folder / "predictions.png", validation, cfg.evaluate, results)

    if tracer := world.tracer(cfg.debug.profile, run.folder / "trace.json"):
        run.closing.enter_context(tracer)
    net.train()
    if start > 0 and clock.due(clock.evaluate_every, min(start, clock.end)) and not run.evaluated(start):
        measure(start)  # a signal came between the step and its evaluation, or steps= is now below it
    if told_to_stop():
        return run.preempted()

    # ---- the loop ----
    for step in range(start, clock.end):
        rate = optim.learning_rate(cfg.optim, step, clock)
        optim.set_learning_rate(optimizer, rate)
        step_loss = torch.zeros((), device=world.device)

        for microbatch in range(clock.microbatches):
            images, labels = next(batches)  # uint8, already on the device
            key = (cfg.seed, step, microbatch)
            images, targets = mix(normalise(images), labels, key)
            masks = drop_path.draw(rates, len(images), key, world.device)
            if step == microbatch == 0:
                pictures.first_batch(run.folder / "first_batch.png", images, targets, training.classes, cfg.data)
            with world.autocast():
                loss = cross_entropy(masked(images, masks).float(), targets) / clock.microbatches
            if microbatch == 0:
                statistics.note()  # BatchNorm's follow this microbatch alone
            scaler.scale(loss).backward()
            step_loss += loss.detach()

        scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if cfg.optim.clip is not None:
            clip_grads_with_norm_(net.parameters(), cfg.optim.clip, norm)
        skip = (~norm.isfinite()).float()  # on the device: a gradient that is not finite never reaches the weights
        optim.update(optimizer, skip)
        statistics.settle(skip)
        scaler.update()
        if ema is not None:
            ema.update(net, skip)
        run.step_done(step + 1, loss=step_loss, grad_norm=norm, lr=rate, waited=feed.waited)
        if tracer:
            tracer.step()

        with run.clock_stopped():
            if clock.due(clock.evaluate_every, step + 1) and not told_to_stop():
                run.flush(feed.waited)
                measure(step + 1)
            stopping = told_to_stop()  # also where a signal cut the evaluation short: it comes again on resume
            if clock.due(clock.save_every, step + 1) or run.best_step() == step + 1 or stopping:
                run.flush(feed.waited)  # stops here, before anything is saved, if a step was not finite
                run.lock.check()
                state.save(run.checkpoints, step + 1, cfg.keep, run.best_step())
        if stopping:
            return run.preempted()

    return run.done(published.comparison(cfg, clock, run.step, training, validation, run.top1()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
