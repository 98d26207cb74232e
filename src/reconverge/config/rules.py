"""What a setting allows, and what the parts of a configuration must agree on. Imports no torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import counted
from reconverge.config.messages import another, closest
from reconverge.config.setting import flat, help_of
from reconverge.config.settings import SEGMENT, Data, Eval, Segment, Train


def check(cfg: Train) -> None:
    """Refuse combinations that cannot be trained. Errors: Stop(USAGE)."""
    for rule in (_task, _batch, _images, _optimizer, _start):
        rule(cfg)
    check_data(cfg.data)
    if cfg.data.val is None and cfg.evaluate_every != "never":
        raise Stop(
            Exit.USAGE,
            f"data.val=null with evaluate_every={cfg.evaluate_every}",
            "never: there is nothing to evaluate on",
            "evaluate_every=never, or data.val=FOLDER",
        )
    if cfg.data.kind in ("trained", "evaluation"):
        raise Stop(
            Exit.USAGE,
            f"data={cfg.data.name} data.kind={cfg.data.kind}",
            "images to train on: this one is for eval.py only",
            "data=digits or data=folder data.root=...",
        )
    if cfg.precision == "tf32" and cfg.device == "cpu":
        raise Stop(
            Exit.USAGE, "precision=tf32 with device=cpu", "fp32, bf16, fp16 on a CPU", "precision=fp32"
        )


def _task(cfg: Train) -> None:
    if cfg.recipe.task != cfg.task:
        raise Stop(
            Exit.USAGE,
            f"recipe={cfg.recipe.name} with task={cfg.task}",
            f"a recipe for task={cfg.task}; this one is for task={cfg.recipe.task}",
            f"task={cfg.recipe.task}, or another recipe=",
        )
    for key, value, checks in flat(cfg):
        if checks["task"] not in ("", cfg.task) and value != checks["default"]:
            raise Stop(
                Exit.USAGE,
                f"{key}={value} with task={cfg.task}",
                f"settings that task={cfg.task} reads; {key} belongs to task={checks['task']}",
                f"leave {key} out",
            )
    if cfg.task == SEGMENT:
        check_segment(cfg.segment)


def refuse_segmenters(task: str, what: str) -> None:
    """For what only knows classifiers. Errors: Stop(USAGE)."""
    if task == SEGMENT:
        raise Stop(
            Exit.USAGE,
            f"{what} with task=segment",
            f"task=classify: {what} does not know segmenters yet",
            "what the run itself writes: metrics.jsonl, predictions.png, outcomes.npz (evaluate_every=)",
        )


def check_segment(segment: Segment) -> None:
    """Errors: Stop(USAGE)."""
    for key, pair, fitting in (
        ("resize", segment.resize, "[2048,512]"),
        ("scale", sorted(segment.scale, reverse=True), "[0.5,2.0]"),
    ):
        if len(pair) != 2 or not 0 < pair[1] <= pair[0]:
            raise Stop(
                Exit.USAGE,
                f"segment.{key}={getattr(segment, key)}",
                f"two numbers above 0: {help_of(Train, f'segment.{key}')}",
                f"segment.{key}={fitting}",
            )
    if not segment.scales or not all(0.1 <= scale <= 10 for scale in segment.scales):
        raise Stop(
            Exit.USAGE,
            f"segment.scales={segment.scales}",
            "one number or more, from 0.1 to 10",
            "segment.scales=[0.5,0.75,1.0,1.25,1.5,1.75], as in Table 4",
        )
    if bool(segment.window) != bool(segment.stride) or segment.stride > segment.window:
        raise Stop(
            Exit.USAGE,
            f"segment.window={segment.window} with segment.stride={segment.stride}",
            "a stride of at least 1 pixel and at most the window, so that every pixel is looked at; or 0 for"
            " both, the whole image at once",
            f"segment.stride={max(1, segment.window * 2 // 3)}" if segment.window else "segment.stride=0",
        )


def _batch(cfg: Train) -> None:
    if cfg.microbatch % 2 or cfg.batch % cfg.microbatch:
        fitting = [size for size in range(2, cfg.batch + 1, 2) if cfg.batch % size == 0]
        nearest = min(fitting, key=lambda size: abs(size - cfg.microbatch), default=None)
        if nearest is None:
            raise Stop(
                Exit.USAGE,
                f"batch={cfg.batch}",
                "an even batch: Mixup pairs the images of a microbatch",
                f"batch={cfg.batch + 1}",
            )
        raise Stop(
            Exit.USAGE,
            f"microbatch={cfg.microbatch} with batch={cfg.batch}",
            f"even numbers that divide the batch: {', '.join(map(str, fitting))}",
            f"microbatch={nearest}",
        )
    if cfg.forward_images and cfg.forward_images % cfg.microbatch and cfg.microbatch % cfg.forward_images:
        fitting = [size for size in range(1, cfg.microbatch + 1) if cfg.microbatch % size == 0]
        raise Stop(
            Exit.USAGE,
            f"forward_images={cfg.forward_images} with microbatch={cfg.microbatch}",
            f"what divides a microbatch ({', '.join(map(str, fitting))}), or multiples of it",
            f"forward_images={min(fitting, key=lambda size: abs(size - int(cfg.forward_images or 0)))}",
        )
    microbatches = cfg.batch // cfg.microbatch
    if cfg.augment.repeats > microbatches:
        raise Stop(
            Exit.USAGE,
            f"augment.repeats={cfg.augment.repeats} with"
            f" {counted(microbatches, 'microbatch', 'microbatches')} a step",
            "at most as many repeats as microbatches: each repeat of an image lies in another one",
            f"a smaller microbatch=, or augment.repeats={microbatches}",
        )


def _images(cfg: Train) -> None:
    evaluated = {} if cfg.task == SEGMENT else {"evaluate.size": cfg.evaluate.size}
    for key, size in ({"augment.size": cfg.augment.size} | evaluated).items():
        if cfg.model.image_size not in (None, size):
            raise Stop(
                Exit.USAGE,
                f"{key}={size} with model={cfg.model.name} for images of {cfg.model.image_size} px",
                "the size that it is built for, in training and evaluation",
                f"augment.size={cfg.model.image_size} evaluate.size={cfg.model.image_size}",
            )
    for key, pair, low, high in (
        ("augment.scale", cfg.augment.scale, 0.0, 1.0),
        ("augment.ratio", cfg.augment.ratio, 0.0, float("inf")),
    ):
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            raise Stop(
                Exit.USAGE,
                f"{key}={pair}",
                f"[smallest, largest], above {low}, at most {high}",
                f"{key}=[{max(low, 0.08)},1.0]",
            )


def _optimizer(cfg: Train) -> None:
    warmup, length = cfg.optim.warmup_steps, cfg.schedule_steps
    if warmup is not None and length is not None and warmup >= length:
        raise Stop(
            Exit.USAGE,
            f"optim.warmup_steps={warmup} with schedule_steps={length}",
            "a warm-up shorter than the schedule",
            f"optim.warmup_steps={length // 15}",
        )
    if warmup is None and length is None and cfg.optim.warmup_epochs >= cfg.epochs:
        raise Stop(
            Exit.USAGE,
            f"optim.warmup_epochs={cfg.optim.warmup_epochs} with epochs={cfg.epochs}",
            "a warm-up shorter than the schedule",
            f"optim.warmup_epochs={cfg.epochs // 15} or more epochs",
        )
    if len(cfg.optim.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optim.betas):
        raise Stop(
            Exit.USAGE,
            f"optim.betas={cfg.optim.betas}",
            "two numbers from 0 up to, but not, 1",
            "optim.betas=[0.9,0.999]",
        )


def _start(cfg: Train) -> None:
    """The first one and later ones."""
    if cfg.init is None:
        for key, unread in (("init_head", cfg.init_head != "auto"), ("init_strict", not cfg.init_strict)):
            if unread:
                raise Stop(
                    Exit.USAGE,
                    f"{key}={getattr(cfg, key)} without init",
                    help_of(Train, "init"),
                    f"init=..., or {key} as it was",
                )
    known = {key for key, *_ in flat(cfg)} | {"code", "versions", "libraries", "data", "hardware", "pixels"}
    for name in cfg.resume_allow:
        if name not in known:
            raise Stop(
                Exit.USAGE,
                f"resume_allow={name}",
                "a setting, or code, data, versions, libraries, hardware, pixels",
                f"resume_allow=[{closest(name, known) or 'NAME'}]",
            )


def check_data(data: Data) -> None:
    for key, triple in (("data.mean", data.mean), ("data.std", data.std)):
        if len(triple) != 3 or (key == "data.std" and not all(value > 0 for value in triple)):
            raise Stop(
                Exit.USAGE,
                f"{key}={triple}",
                "three numbers, for R, G, B in 0..1; deviations above 0",
                f"{key}=[0.5,0.5,0.5]",
            )
    if data.kind in ("folder", "shards", "maps", "ade20k", "evaluation") and not data.root:
        raise Stop(
            Exit.USAGE, f"data={data.name} without data.root", help_of(Train, "data.root"), "data.root=/path"
        )
    if data.window != "all" and data.kind != "shards":
        raise Stop(
            Exit.USAGE,
            f"data.window={data.window} with data={data.name}",
            "windows of shards",
            "data.window=all, or reconverge prepare",
        )
    if data.stage is not None and data.window == "all":
        raise Stop(
            Exit.USAGE,
            "data.stage with data.window=all",
            "windows: what comes next must be a few shards to be copied ahead",
            "data.window=8, say, or data.stage=null",
        )


def evaluation_data(given: Data, trained: Data | None, overrides: Sequence[str]) -> Data:
    """The data that eval.py reads: that of the run with what the command line changes, or another.

    `trained`: None where the model is not of a run. Errors: Stop(USAGE).
    """
    if given.kind == "trained":
        if trained is None:
            raise Stop(
                Exit.USAGE,
                "a checkpoint of no run without data=",
                "a data set: only a run knows its own",
                "data=imagenet1k data.root=...",
            )
        # A run of somebody names no folder to write to: the cache is that of this command.
        changed = {name: getattr(given, name) for name in named("data", overrides)}
        return replace(trained, **changed | {"cache": given.cache})
    check_data(given)
    return given


def normalised_as(given: Data, mean: list[float], std: list[float], overrides: Sequence[str]) -> Data:
    """The same with the mean and deviation of a model, where the command line names no others."""
    kept = named("data", overrides)
    return replace(
        given, mean=given.mean if "mean" in kept else mean, std=given.std if "std" in kept else std
    )


def named(section: str, overrides: Sequence[str]) -> set[str]:
    """The settings of a section that the command line names."""
    keys = [override.partition("=")[0] for override in overrides]
    return {key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")}


def evaluation(cfg: Eval) -> None:
    """Refuse what eval.py cannot do together. Errors: Stop(USAGE)."""
    asked = [f"data={cfg.data.name}"] * (cfg.data.kind != "trained") + [f"suite={cfg.suite.name}"] * (
        cfg.suite.name != "none"
    )
    asked += [f"images={cfg.images}"] * (cfg.images is not None)
    if len(asked) > 1:
        raise Stop(
            Exit.USAGE, " ".join(asked), "one of data=, suite= and images=", f"drop {' and '.join(asked[1:])}"
        )
    if cfg.suite.name != "none" and not cfg.suite.root:
        raise Stop(
            Exit.USAGE,
            f"suite={cfg.suite.name} without suite.root",
            help_of(Eval, "suite.root"),
            "suite.root=/path",
        )
    paths = [cfg.images] if isinstance(cfg.images, str) else cfg.images
    if paths is not None and not (
        isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths)
    ):
        raise Stop(
            Exit.USAGE,
            f"images={cfg.images}",
            help_of(Eval, "images"),
            "images=FOLDER, or images=[a.jpg,b.jpg]",
        )


def check_value(key: str, value: Any, checks: Any) -> None:
    """Hold a setting against its choices, bounds and pattern; inf and nan are never allowed.

    Errors: Stop(USAGE).
    """
    if value is None:
        return
    if not _finite(value):
        raise Stop(
            Exit.USAGE,
            f"{key}={value}",
            f"{key}: finite numbers ({checks['help']})",
            f"another {key}",
        )
    if checks["choices"] and value not in checks["choices"]:
        raise Stop(
            Exit.USAGE,
            f"{key}={value}",
            f"{key}: {', '.join(map(str, checks['choices']))}",
            another(key, value, checks),
        )
    low, high = checks["low"], checks["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = " and ".join(
            [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        )
        raise Stop(
            Exit.USAGE,
            f"{key}={value}",
            f"{key}: {bounds} ({checks['help']})",
            f"{key}={low if low is not None and value < low else high}",
        )
    if checks["pattern"] and not re.fullmatch(checks["pattern"], str(value)):
        raise Stop(
            Exit.USAGE,
            f"{key}={value}",
            f"{key}: {checks['help']}; it matches {checks['pattern']}",
            another(key, value, checks),
        )


def _finite(value: Any) -> bool:
    """Whether no number in a value, a list or a table is inf or nan."""
    if isinstance(value, dict):
        return all(map(_finite, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
