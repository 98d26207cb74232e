"""Evaluate a trained model: python eval.py checkpoint=runs/NAME [data=... | suite=... | images=...].

The same pieces as train.py without the loop.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from reconverge.base import launcher, signals
from reconverge.base.errors import Exit, exit_code
from reconverge.base.imports import without
from reconverge.base.terminal import say
from reconverge.config import compose, rules
from reconverge.config.settings import Data, Eval
from reconverge.distributed import ranks
from reconverge.run import reader
from reconverge.run.reader import Opened

ASKED = ("size", "crop_ratio", "mode", "interpolation", "batch")  # how the images of a model may be looked at


def main() -> int:
    signals.catch()
    overrides = sys.argv[1:]
    cfg = compose.composed(Path(__file__).parent / "conf", "eval", Eval, overrides)
    rules.evaluation(cfg)
    run = None if reader.is_timms(cfg.checkpoint) else reader.opened(Path(cfg.checkpoint))
    if run is not None:
        rules.refuse_segmenters(run.cfg.task, "eval.py")
    data = cfg.data
    if cfg.suite.name == "none" and cfg.images is None:
        data = rules.evaluation_data(data, run.cfg.data if run else None, overrides)
    with ranks.joined(cfg.world_timeout, deterministic=True):
        return evaluate(cfg, run, data, overrides)


def evaluate(cfg: Eval, run: Opened | None, data: Data, overrides: Sequence[str]) -> int:
    with without("wandb"):  # timm imports it where it is installed: half a second
        from reconverge.evaluation import model, sets
    from reconverge.data import native
    from reconverge.data.mix import Normalise
    from reconverge.distributed.world import World, default_threads, default_workers
    from reconverge.evaluation.predict import predict
    from reconverge.evaluation.results import Findings
    from reconverge.training.evaluate import Evaluator

    world = World(cfg.device, cfg.precision, deterministic=True)
    workers = default_workers(world.device) if cfg.workers is None else cfg.workers
    world.set_threads(cfg.threads or default_threads(world.device, workers))
    decoder = native.choose(data.native)

    trained = model.of_run(run, Path(cfg.checkpoint)) if run else model.of_timm(cfg.checkpoint)
    asked = {name: value for name in ASKED if (value := getattr(cfg, name)) is not None}
    settings = trained.resized(asked)
    data = rules.normalised_as(data, trained.mean, trained.std, overrides)
    normalise = Normalise(data.mean, data.std, world.device, cfg.channels_last)
    evaluator = Evaluator(settings, normalise, world, workers, data.on_bad_image)
    for net in trained.nets.values():
        world.place(net, cfg.channels_last)
    folder = run.folder if run else Path()
    say(f"{trained.title}; decoder: {decoder}")

    if cfg.images is not None:
        return predict(cfg.images, folder, trained.nets, trained.classes, evaluator)
    findings = Findings(trained, folder, evaluator, asked, cfg.precision, decoder)
    for images in sets.chosen(cfg.suite, data):
        if not findings.evaluate(images):
            say("stopped before the end: nothing is written")
            return Exit.PREEMPTED
    findings.write(cfg.suite.name, writes=world.rank == 0)
    return Exit.DONE


if __name__ == "__main__":
    launcher.leave(exit_code(main))
