"""Evaluate a run: python eval.py checkpoint=runs/NAME [data=...]. The same pieces as train.py without the loop."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from reconverge import checks, config, ranks, signals
from reconverge.errors import Exit, exit_code
from reconverge.progress import say
from reconverge.run import Opened, opened
from reconverge.settings import Data, Eval
from reconverge.signals import told_to_stop


def main() -> int:
    signals.catch()
    cfg = config.from_command_line(Path(__file__).parent / "conf", "eval", Eval)
    run = opened(Path(cfg.checkpoint))
    data = checks.evaluation_data(cfg.data, run.cfg.data)
    with ranks.joined(cfg.world_timeout):
        return evaluated(cfg, run, data)


def evaluated(cfg: Eval, run: Opened, data: Data) -> int:
    from reconverge import checkpoint, models
    from reconverge.data import native, sources
    from reconverge.data.mix import Normalise
    from reconverge.evaluate import evaluate
    from reconverge.world import World, default_threads, default_workers

    world = World(cfg.device, cfg.precision, deterministic=True)
    workers = default_workers(world.device) if cfg.workers is None else cfg.workers
    world.set_threads(cfg.threads or default_threads(world.device, workers))
    decoder = native.choose(data.native)

    path, skipped = ranks.from_rank_0(lambda: checkpoint.choose(Path(cfg.checkpoint)))
    for reason in skipped:
        say(f"skipped a damaged checkpoint: {reason}")
    validation = world.rank_0_first(lambda: sources.open_validation(data, run.classes))
    tensors, numbers = checkpoint.load(path)
    nets = {}
    for name, weights in (("raw", "model"), ("ema", "ema")):
        if weights in tensors:
            net = models.build(run.cfg.model, len(run.classes), run.cfg.seed)
            net.load_state_dict(tensors[weights])
            nets[name] = world.place(net, cfg.channels_last).eval()

    settings = replace(run.cfg.evaluate, batch=cfg.batch or run.cfg.evaluate.batch)
    normalise = Normalise(data.mean, data.std, world.device, cfg.channels_last)
    results = evaluate(nets, validation, settings, normalise, world, workers, told_to_stop)
    if results is None:
        say("stopped before the end: nothing is written")
        return Exit.PREEMPTED

    say(f"decoder: {decoder}")
    say(f"{path}: step {numbers['step']}, {len(validation)} images of {data.name}")
    report = {
        "checkpoint": str(path),
        "step": numbers["step"],
        "data": data.name,
        "fingerprint": validation.fingerprint,
        "precision": cfg.precision,
        "decoder": decoder,
    }
    for name, result in results.items():
        say(f"{name:<4} top-1 {result.top1:.3f} %  top-5 {result.top5:.3f} %  loss {result.loss:.4f}  calibration error {result.ece:.2f} %")
        report[name] = {key: getattr(result, key) for key in ("top1", "top5", "loss", "ece", "images")}
    output = run.folder / f"eval-{data.name}-{validation.fingerprint[:8]}-{cfg.precision}-step-{numbers['step']:08d}.json"
    if world.rank == 0:
        output.write_text(json.dumps(report, indent=1) + "\n")
    say(f"written to {output}")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))
