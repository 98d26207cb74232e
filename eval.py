"""Evaluate a trained model: python eval.py checkpoint=runs/NAME [data=... | suite=... | images=...].

The same pieces as train.py without the loop.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from reconverge import checks, config, ranks, signals
from reconverge.errors import Exit, exit_code
from reconverge.opened import Opened, is_timms, opened
from reconverge.progress import say
from reconverge.settings import Data, Eval
from reconverge.signals import told_to_stop


def main() -> int:
    signals.catch()
    cfg = config.from_command_line(Path(__file__).parent / "conf", "eval", Eval)
    checks.evaluation(cfg)
    run = None if is_timms(cfg.checkpoint) else opened(Path(cfg.checkpoint))
    one_set = cfg.suite.name == "none" and cfg.images is None
    data = checks.evaluation_data(cfg.data, run.cfg.data if run else None) if one_set else cfg.data
    with ranks.joined(cfg.world_timeout):
        return evaluated(cfg, run, data)


def evaluated(cfg: Eval, run: Opened | None, data: Data) -> int:
    from reconverge import evalsets, models, trained
    from reconverge.data import native
    from reconverge.data.mix import Normalise
    from reconverge.evaluate import Among, Result, evaluate
    from reconverge.predict import predict
    from reconverge.world import World, default_threads, default_workers

    world = World(cfg.device, cfg.precision, deterministic=True)
    workers = default_workers(world.device) if cfg.workers is None else cfg.workers
    world.set_threads(cfg.threads or default_threads(world.device, workers))
    decoder = native.choose(data.native)

    model = trained.of_run(run, Path(cfg.checkpoint)) if run else trained.of_timm(cfg.checkpoint)
    asked = {
        name: value
        for name in ("size", "crop_ratio", "mode", "interpolation", "batch")
        if (value := getattr(cfg, name)) is not None
    }
    settings = model.resized(asked)
    models.refuse_sizes(
        next(iter(model.nets.values())), {"size": settings.size}
    )  # raw and EMA: one architecture
    data = checks.normalised_as(data, model.mean, model.std)
    normalise = Normalise(data.mean, data.std, world.device, cfg.channels_last)
    nets = {name: world.place(net, cfg.channels_last) for name, net in model.nets.items()}
    folder, name = (
        (run.folder, f"{cfg.precision}-step-{model.step:08d}")
        if run
        else (Path(), f"{model.name}-{cfg.precision}")
    )
    name += "".join(
        f"-{option}-{value}" for option, value in asked.items() if option != "batch"
    )  # each way of evaluating its own file
    say(f"{model.title}; decoder: {decoder}")

    if cfg.images is not None:
        return predict(cfg.images, folder, nets, model.classes, settings, normalise, world, workers)

    found: dict[str, Any] = {}
    who, published = evalsets.published(model.name, settings)
    for images in evalsets.of_suite(cfg.suite, data) if cfg.suite.name != "none" else [data]:
        parts: list[evalsets.Part] = world.rank_0_first(partial(evalsets.parts, images, model.classes))
        how = evalsets.settings_of(images, settings, asked)
        results: dict[str, list[Result]] = {weights: [] for weights in nets}
        for part in parts:
            answering = {
                weights: net if part.among is None else Among(net, part.among)
                for weights, net in nets.items()
            }
            answers = evaluate(answering, part.source, how, normalise, world, workers, told_to_stop)
            if answers is None:
                say("stopped before the end: nothing is written")
                return Exit.PREEMPTED
            for weights, answer in answers.items():
                results[weights].append(answer)
        found[images.name] = evalsets.report(images, parts, results)
        for line in evalsets.lines(images, found[images.name], list(nets), who, published):
            say(line)

    of_model = {
        "checkpoint": model.path,
        "model": model.name,
        "step": model.step,
        "precision": cfg.precision,
        "decoder": decoder,
    }
    if cfg.suite.name == "none":
        output = folder / f"eval-{data.name}-{found[data.name]['fingerprint'][:8]}-{name}.json"
        written = of_model | {"data": data.name, "evaluate": asdict(how)} | found[data.name]
    else:
        output = folder / f"eval-{cfg.suite.name}-{name}.json"
        written = of_model | {"evaluate": asdict(settings), "sets": found}
        for line in evalsets.row(found, list(nets), who, published):
            say(line)
    if world.rank == 0:
        output.write_text(json.dumps(written, indent=1) + "\n")
    say(f"written to {output}")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))
