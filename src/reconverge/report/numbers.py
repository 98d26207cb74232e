"""The numbers of a report: read from the runs' folders, and averaged over runs that differ only in seed.

Imports no torch by itself; draws nothing.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reconverge.base.errors import Exit, Stop
from reconverge.config.setting import flat
from reconverge.config.settings import CLASSIFY, Train
from reconverge.run import predictions, reader
from reconverge.run.predictions import OfClass, Predictions


class Ran(NamedTuple):
    """A run's folder as the report reads it."""

    name: str
    folder: Path
    cfg: Train
    classes: list[str]
    records: list[dict[str, Any]]  # the lines of metrics.jsonl
    status: dict[str, Any]
    environment: dict[str, Any]
    newest: "Newest | None"  # None: no evaluation of a classifier has left its outcomes.npz


class Newest(NamedTuple):
    """The predictions of the better weights, raw or EMA, at the newest evaluation: one a validation image."""

    step: int
    kind: str  # raw or ema
    fingerprint: str  # of the validation images
    predictions: Predictions


# ---- reading -----------------------------------------------------------------------------------------------


def read(paths: Sequence[Path]) -> list[Ran]:
    """The runs of these folders.

    Errors: Stop(MISSING) for what is no run or has logged nothing, DAMAGED, USAGE for one given twice.
    """
    runs: list[Ran] = []
    for path in paths:
        run = _read(path)
        if any(run.folder == other.folder for other in runs):
            raise Stop(
                Exit.USAGE,
                f"{path} twice",
                "each run once: a copy would count as another seed",
                "each run once",
            )
        runs.append(run)
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else run._replace(name=str(run.folder)) for run in runs]


def _read(path: Path) -> Ran:
    folder, cfg, classes = reader.opened(path.resolve())
    if not (folder / "metrics.jsonl").exists():
        raise Stop(
            Exit.MISSING,
            f"{folder} has no metrics.jsonl",
            "a run that has begun to train",
            "another run, or wait for its start",
        )
    status, environment = reader.status(folder), reader.environment(folder, "packages", "promises")
    path = folder / "outcomes.npz"
    there = path.exists() and cfg.task == CLASSIFY
    newest = reader.as_written(path, lambda: _newest(path, len(classes))) if there else None
    return Ran(folder.name, folder, cfg, classes, reader.metrics(folder), status, environment, newest)


def _newest(path: Path, classes: int) -> Newest:
    step, fingerprint, kinds = predictions.load(path)
    for found in kinds.values():
        if len({len(column) for column in found}) != 1 or not len(found.labels):
            raise ValueError(f"columns of {', '.join(str(len(column)) for column in found)} images")
        labels = np.concatenate([found.labels, found.predicted])
        if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"classes that are not among the {classes} of classes.txt")
    kind = max(kinds, key=lambda kind: int((kinds[kind].predicted == kinds[kind].labels).sum()))
    return Newest(step, kind, fingerprint, kinds[kind])


# ---- one run -----------------------------------------------------------------------------------------------


def series(run: Ran, key: str) -> dict[int, float]:
    """Step -> value of what metrics.jsonl says by that name, finite values alone."""
    return {
        record["step"]: record[key]
        for record in run.records
        if record.get(key) is not None and math.isfinite(record[key])
    }


def scores(run: Ran) -> tuple[int, dict[str, float]] | None:
    """Step of the newest evaluation, and its score (percent) by kind of weights; None: never evaluated."""
    evaluated = reader.scores(run.records)
    return max(evaluated.items(), default=None)


def left_out(run: Ran, step: int) -> int:
    """How many damaged images the evaluation after `step` left out."""
    return int(series(run, "left_out").get(step, 0))


def steps_per_epoch(run: Ran) -> float:
    if run.cfg.schedule_steps:
        return run.status["steps_per_epoch"]
    return run.status["total"] / run.cfg.epochs


def verdict(run: Ran) -> str:
    """How the run compares with the published number, or why there is no such comparison."""
    if not run.cfg.recipe.expected or run.cfg.recipe.noise is None:
        return f"recipe={run.cfg.recipe.name} has no published number to compare with"
    return run.status.get("comparison") or "not compared with the published number: the run has not finished"


def published_score(run: Ran) -> str | None:
    """The score that its recipe reproduces, with the noise band, percent."""
    recipe = run.cfg.recipe
    expected = recipe.expected.get(run.cfg.model.name)
    return (
        None
        if expected is None
        else f"{expected:g}" + (f" ± {recipe.noise:g}" if recipe.noise is not None else "")
    )


# ---- several runs ------------------------------------------------------------------------------------------


def groups(runs: Sequence[Ran]) -> list[list[Ran]]:
    """Runs that differ only in seed are one group; a second run with the same seed is in another group.

    Settings that may change on resume (`free`: workers, data.root, ...) do not separate runs, except `steps`;
    other images do.
    """
    found: list[tuple[str, list[Ran]]] = []
    for run in runs:
        settings = {
            key: value
            for key, value, checks in flat(run.cfg)
            if key == "steps" or not (checks["free"] or key == "seed")
        }
        same = repr((settings, run.environment["facts"].get("data"), run.classes))
        for key, group in found:
            if key == same and run.cfg.seed not in [other.cfg.seed for other in group]:
                group.append(run)
                break
        else:
            found.append((same, [run]))
    return [group for _, group in found]


class Curve(NamedTuple):
    epochs: np.ndarray  # of the steps that every run of the group has logged
    mean: np.ndarray
    std: np.ndarray | None  # sample standard deviation over the runs; None of one run


def curve(group: Sequence[Ran], key: str) -> Curve | None:
    """Of the runs of a group that have logged such values; None if none has."""
    found = [values for run in group if (values := series(run, key))]
    if not found:
        return None
    steps = sorted(set.intersection(*map(set, found)))
    table = np.array([[values[step] for step in steps] for values in found]).reshape(len(found), len(steps))
    return Curve(
        np.array(steps) / steps_per_epoch(group[0]),
        table.mean(0),
        table.std(0, ddof=1) if len(found) > 1 else None,
    )


class Row(NamedTuple):
    """The results of a group."""

    runs: list[str]
    step: int | None  # of the newest evaluation of the run that has come furthest; None: never evaluated
    # raw and EMA: score after that step of each run that was evaluated there, percent
    scores: dict[str, list[float]]
    best: list[reader.Best]  # of each run that was evaluated
    left_out: list[int]  # damaged images that the evaluation after that step left out, of each such run
    published: str | None
    speed: list[float]  # images/s of each run: the median of its intervals
    data_wait: list[float]  # percent of the time, likewise

    @property
    def counted(self) -> str:
        """How many runs its score is the mean of, and of how many."""
        there = len(self.scores["raw"])
        return f"{there}" if there == len(self.runs) else f"{there} of {len(self.runs)}"


def row(group: Sequence[Ran]) -> Row:
    evaluated = [found for run in group if (found := scores(run))]
    step = max((step for step, _ in evaluated), default=None)
    there = [values for at, values in evaluated if at == step]
    without = [left_out(run, found[0]) for run in group if (found := scores(run)) and found[0] == step]
    percents = {kind: [values[kind] for values in there if kind in values] for kind in ("raw", "ema")}
    speed, data_wait = (
        [scale * float(np.median(list(values.values()))) for run in group if (values := series(run, key))]
        for key, scale in (("images_per_second", 1), ("data_wait", 100))
    )
    names, highest = [run.name for run in group], [one for run in group if (one := reader.best(run.records))]
    return Row(names, step, percents, highest, without, published_score(group[0]), speed, data_wait)


def differing(runs: Sequence[Ran]) -> list[tuple[str, list[Any]]]:
    """The settings in which the runs differ, except `run`: name, value in each run."""
    tables = [{key: value for key, value, _ in _flat(run)} for run in runs]
    rows = [(key, [table[key] for table in tables]) for key in tables[0] if key != "run"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def settings(run: Ran) -> list[tuple[str, list[tuple[str, Any, str]]]]:
    """All settings by section, those of no section first: name, value, what it means."""
    sections: dict[str, list[tuple[str, Any, str]]] = {}
    for key, value, checks in _flat(run):
        sections.setdefault(key.rpartition(".")[0], []).append((key, value, checks["help"]))
    return list(sections.items())


def _flat(run: Ran) -> list[tuple[str, Any, Any]]:
    """All settings but the recipe's tables by model: what they give this model stands in other settings."""
    return [entry for entry in flat(run.cfg) if not isinstance(entry[1], dict)]


# ---- the predictions of each image -------------------------------------------------------------------------


def worst_classes(found: Predictions) -> list[OfClass]:
    """Each class that has images, the worst first."""
    classes = predictions.per_class(found.labels, found.predicted)
    return sorted(classes, key=lambda of: (of.accuracy, of.label))


def confusions(found: Predictions) -> list[tuple[int, int, int]]:
    """True class, the other one that was predicted, how often: the most frequent first."""
    wrong = found.labels != found.predicted
    pairs, counts = np.unique(
        np.stack([found.labels[wrong], found.predicted[wrong]]), axis=1, return_counts=True
    )
    return sorted(zip(*pairs.tolist(), counts.tolist(), strict=True), key=lambda pair: (-pair[2], *pair[:2]))


def confusion_matrix(found: Predictions, classes: int) -> np.ndarray:
    """Images (classes, classes): a row for the true class, a column for the predicted one."""
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # takes seconds

    predicted, labels = torch.from_numpy(found.predicted), torch.from_numpy(found.labels)
    return multiclass_confusion_matrix(predicted, labels, classes, validate_args=False).numpy()


class Bin(NamedTuple):
    images: int
    confidence: float  # mean
    accuracy: float


def reliability(found: Predictions, bins: int = 15) -> list[Bin]:
    """Images whose confidence is alike, in `bins` equal steps from 0 to 1; those of exactly 1 by themselves,
    as torchmetrics has it.
    """
    places = np.searchsorted(np.linspace(0, 1, bins + 1), found.confidence, side="right") - 1
    hits = found.labels == found.predicted
    masks = [places == place for place in np.unique(places)]
    return [
        Bin(int(mask.sum()), float(found.confidence[mask].mean()), float(hits[mask].mean())) for mask in masks
    ]


def extremes(found: Predictions, most: int) -> tuple[list[int], list[int]]:
    """Up to `most` images of the lowest and of the highest loss, each the furthest first; no image is in
    both, unless there is but one.
    """
    order = np.argsort(found.losses, kind="stable").tolist()
    count = max(1, min(most, len(order) // 2))
    return order[:count], order[::-1][:count]
