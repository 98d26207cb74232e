"""Train an image classifier: python train.py model=convnext_t recipe=in1k data=folder data.root=/path. See
README.md.

The job from top to bottom: compose, build, loop. The loop is here and nowhere else.
"""

import sys
from pathlib import Path

from reconverge import checks, config, ranks, signals, sweep
from reconverge.clock import Clock
from reconverge.errors import exit_code
from reconverge.progress import panel, say
from reconverge.run import Run
from reconverge.settings import Train
from reconverge.signals import told_to_stop


def main() -> int:
    signals.catch()
    if sweep.took("-m", "--multirun"):
        return sweep.run(sys.argv[1:])
    only_check = sweep.took("--check")
    cfg = config.from_command_line(Path(__file__).parent / "conf", "config", Train)
    checks.check(cfg)
    if only_check:
        say(f"{cfg.run}: the settings fit together; neither images nor devices were looked at")
        return 0
    with ranks.joined(cfg.world_timeout), Run(cfg) as run, ranks.losses_named():
        if summary := run.finished():
            say(f"{cfg.run} is finished: {summary}")
            return 0
        return train(cfg, run)


def train(cfg: Train, run: Run) -> int:
    # Imported here: until a configuration is accepted, nobody waits for these seconds.
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from reconverge import describe, environment, models, optim, outcomes, pictures, published
    from reconverge.data import native, order, sources, transforms
    from reconverge.data.loader import Feed, Images, Quarantine
    from reconverge.data.mix import Mix, Normalise
    from reconverge.data.stage import Stage
    from reconverge.ema import Ema
    from reconverge.evaluate import evaluate
    from reconverge.gradients import Gradients
    from reconverge.models import drop_path, weights
    from reconverge.models.batch_norm import RunningStatistics
    from reconverge.passes import Passes, block, refuse_other_passes
    from reconverge.state import State
    from reconverge.world import World, default_threads, default_workers

    # ---- build: the machine, the images, the model ----
    tree = cfg.reduce == "tree"
    mine = block(
        cfg.batch // cfg.microbatch, ranks.HERE.rank, ranks.HERE.size, tree
    )  # of the microbatches of a step
    passes = Passes(len(mine), cfg.microbatch, cfg.forward_images, tree)
    world = World(cfg.device, cfg.precision, cfg.deterministic)
    run.fact("code", world.agree("code", environment.code_hash()))
    run.fact("versions", world.agree("versions", environment.decisive_versions()))
    workers = default_workers(world.device) if cfg.workers is None else cfg.workers
    threads = cfg.threads or run.recorded("threads") or default_threads(world.device, workers)
    world.set_threads(
        min(world.gather_objects(threads))
    )  # where nobody says how many, of the host with the fewest cores
    run.fact("threads", world.threads)
    run.fact("hardware", " and ".join(sorted(set(world.gather_objects(world.hardware())))))
    run.fact("ranks", "a power of two" if tree else world.size, free=True)
    run.fact("forward_images", cfg.forward_images or cfg.microbatch, free=True)
    decoder = " and ".join(sorted(set(world.gather_objects(native.choose(cfg.data.native)))))
    fast = cfg.data.decode == "fast"  # exact has the same pixels with native/ and without
    run.fact(
        "pixels",
        world.agree("pixels", f"fast, {'native' if native.chosen() else 'torch'} first" if fast else "exact"),
    )

    training, validation = world.rank_0_first(lambda: sources.open_sources(cfg.data))
    fingerprints = {
        "train": training.fingerprint,
        "val": validation.fingerprint if validation else None,
        "order": order.VERSION,
    }
    run.fact("data", world.agree("data", fingerprints))
    clock = Clock.of(cfg, len(training))
    batch_order = order.Order.of(cfg, training)
    run.samples_of = batch_order.step_ids
    normalise = Normalise(cfg.data.mean, cfg.data.std, world.device, cfg.channels_last)
    mix = Mix(cfg.augment.erase, cfg.mix, len(training.classes))

    net = world.place(models.build(cfg.model, len(training.classes), cfg.seed), cfg.channels_last)
    models.refuse_sizes(net, {"augment.size": cfg.augment.size, "evaluate.size": cfg.evaluate.size})
    refuse_other_passes(net, cfg.microbatch, cfg.forward_images)
    rates = drop_path.rates(net)
    if cfg.checkpointing:
        net.set_grad_checkpointing()  # type: ignore[operator]
    masked = torch.compile(drop_path.Masked(net)) if cfg.compile else drop_path.Masked(net)
    ema = Ema(net, cfg.ema.decay) if cfg.ema.decay is not None else None
    optimizer = optim.adamw(net, cfg.optim, cfg.fused)
    scaler = world.scaler()
    gradients = Gradients(net, world, passes)

    # ---- where to start: the run's own newest valid checkpoint, else the weights of init=, else from scratch
    state = State(net, ema, optimizer, scaler)
    start, skipped = state.restore(run.checkpoints)
    for reason in skipped:
        say(f"skipped a damaged checkpoint: {reason}")
    if start == 0 and (init := cfg.init) is not None:
        run.fact(
            "init",
            ranks.from_rank_0(
                lambda: weights.load(net, init, cfg.init_strict, cfg.init_head, training.classes)
            ),
        )
    world.broadcast(tensor for model in state.models().values() for tensor in model.state_dict().values())
    if start == 0 and ema is not None:
        ema.model.load_state_dict(net.state_dict())
    statistics = RunningStatistics(net)  # as restored or loaded
    run.start(
        start, clock, training.classes, training.notes + (validation.notes if validation else []), decoder
    )
    job = describe.job(cfg, clock, net, optimizer.param_groups, describe.images(cfg, training, validation))
    machine = describe.machine(cfg, world, workers, decoder, run)
    panel(
        cfg.run, job | describe.origin(cfg, run) | machine | describe.numbered("notice", config.notices(cfg))
    )

    augmented = Images(
        training,
        transforms.training(cfg.augment, cfg.data.mean, cfg.data.decode),
        cfg.seed,
        cfg.data.on_bad_image,
    )
    microbatches = batch_order.steps(start, clock.end, world.rank, world.size)
    if cfg.data.stage is not None:
        stage = Stage(
            training,
            batch_order.windows,
            Path(cfg.data.stage).expanduser() / cfg.run,
            cfg.data.stage_gb,
            world.local_rank == 0,
        )
        microbatches = run.closing.enter_context(stage).follow(microbatches)
    quarantine = Quarantine(run.folder / "quarantine.jsonl", cfg.data.max_substitutes)
    feed = Feed(augmented, microbatches, workers, world.device, cfg.copy_ahead, quarantine)
    run.watch(world, feed)
    batches = iter(feed)

    def measure(step: int) -> None:
        """Evaluate both sets of weights after `step`: metrics.jsonl, curves.png, predictions.png."""
        assert validation is not None, "without validation images evaluate_every is never"
        net.eval()
        results = evaluate(
            state.models(), validation, cfg.evaluate, normalise, world, workers, stop=told_to_stop
        )
        net.train()
        if results is not None:
            numbers = ("top1", "top5", "loss", "ece")
            run.log(
                step,
                **{
                    f"{name}_{key}": getattr(result, key)
                    for name, result in results.items()
                    for key in numbers
                },
            )
            if run.writes:
                outcomes.save(run.folder / "outcomes.npz", step, validation, results)
                pictures.curves(run.folder / "curves.png", run.records(), clock.steps_per_epoch)
                pictures.predictions(run.folder / "predictions.png", validation, cfg.evaluate, results)

    if tracer := world.tracer(cfg.debug.profile, run.folder / "trace.json"):
        run.closing.enter_context(tracer)
    net.train()
    if start > 0 and clock.due(clock.evaluate_every, min(start, clock.end)) and not run.evaluated(start):
        measure(start)  # a signal came between the step and its evaluation, or steps= is now below it
    if world.any(told_to_stop()):
        return run.preempted()

    # ---- the loop ----
    for step in range(start, clock.end):
        rate = optim.learning_rate(cfg.optim, step, clock)
        optim.set_learning_rate(optimizer, rate)
        losses: list[torch.Tensor] = []
        digests: list[int] = []

        for microbatch in mine:
            images, labels, digest = next(batches)  # uint8, already on the device
            digests.append(digest)
            key = (cfg.seed, step, microbatch)
            images, targets = mix(normalise(images), labels, key)
            masks = drop_path.draw(rates, len(images), key, world.device)
            if step == microbatch == 0:
                pictures.first_batch(
                    run.folder / "first_batch.png", images, targets, training.classes, cfg.data
                )
            for x, y, drops in passes(
                images, targets, masks
            ):  # one forward pass, unless forward_images says otherwise
                with world.autocast():
                    loss = cross_entropy(masked(x, drops).float(), y, reduction="sum") / cfg.batch
                if not losses:
                    statistics.note()  # BatchNorm's follow microbatch 0 alone, which is the first of rank 0
                scaler.scale(loss).backward()
                gradients.add()
                losses.append(loss.detach())

        gradients.reduce()
        scaler.unscale_(optimizer)
        norm = get_total_norm(
            [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        )
        if cfg.optim.clip is not None:
            clip_grads_with_norm_(net.parameters(), cfg.optim.clip, norm)
        skip = (
            ~norm.isfinite()
        ).float()  # on the device: a gradient that is not finite never reaches the weights
        optim.update(optimizer, skip)
        gradients.clear()
        statistics.settle(skip)
        scaler.update()
        if ema is not None:
            ema.update(net, skip)
        run.step_done(step + 1, losses, norm, rate, digests)
        if tracer:
            tracer.step()

        with run.clock_stopped():
            stopping = world.any(told_to_stop())
            if clock.due(clock.evaluate_every, step + 1) and not stopping:
                run.flush()
                measure(step + 1)
                stopping = world.any(
                    told_to_stop()
                )  # a signal cuts the evaluation short: it comes again on resume
            if clock.due(clock.save_every, step + 1) or step + 1 in run.best_steps().values() or stopping:
                run.flush()  # stops here, before anything is saved, if a step was not finite
                run.still_mine()
                if run.writes:
                    state.save(run.checkpoints, step + 1, cfg.keep, run.best_steps().values())
        if stopping:
            return run.preempted()

    return run.done(published.comparison(cfg, clock, run.step, training, validation, run.top1()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
