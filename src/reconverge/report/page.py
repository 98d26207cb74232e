"""The report as a page: what report.html is filled with.

Names of classes, runs and files may be any text; the template escapes them.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import torch

from reconverge.base import imagenet
from reconverge.base.errors import Stop
from reconverge.base.terminal import mean_and_std
from reconverge.config.settings import SCORES, Data
from reconverge.data import sources, transforms
from reconverge.data.image import Undecodable
from reconverge.report import charts, numbers, pictures
from reconverge.report.numbers import Newest, Ran
from reconverge.run import reader
from reconverge.training.evaluate import calibration_error

# Shown at most: images of each kind (full rows of 6, 4 or 3), classes, pairs of classes; and the most classes
# that have a confusion matrix.
IMAGES, CLASSES, PAIRS, MATRIX = 12, 30, 20, 30

# After the training loss: title, name in metrics.jsonl of the raw weights' or the only value, of the EMA
# weights', factor.
CHARTS: list[tuple[str, str, str | None, float]] = [
    ("validation loss", "raw_loss", "ema_loss", 1),
    ("learning rate", "lr", None, 1),
    ("gradient norm", "grad_norm", None, 1),
    ("images/s", "images_per_second", None, 1),
    ("data-wait, % of the time", "data_wait", None, 100),
]
PROMISES = {"R1": "re-run", "R2": "resume", "R3": "data-elastic", "R4": "weight-elastic"}


def html(runs: Sequence[Ran]) -> str:
    """The whole page, of one run or several. The validation images are read, where they are still there."""
    groups = numbers.groups(runs)
    # What the training loss is of, where it is the same in all runs.
    trained_on = {pictures.trained_on(run.cfg) for run in runs}
    loss = "training loss" + (trained_on.pop() if len(trained_on) == 1 else "")
    # top-1 or mIoU, for the tasks of these runs
    known = dict.fromkeys(SCORES[run.cfg.task] for run in runs)
    scores = [(f"{name}, %", f"raw_{key}", f"ema_{key}", 1.0) for key, name in known]
    drawn = {
        title: charts.curves(groups, title, raw, ema, scale)
        for title, raw, ema, scale in [(loss, "loss", None, 1), CHARTS[0], *scores, *CHARTS[1:]]
    }
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    rows = [numbers.row(group) for group in groups]
    return template.render(
        runs=[_run(run, f"run{number}") for number, run in enumerate(runs)],
        groups=list(zip(charts.colours(len(groups)), rows, strict=True)),
        with_ema=any(row.scores["ema"] for row in rows),
        with_published=any(row.published for row in rows),
        charts=[(title, chart) for title, chart in drawn.items() if chart],
        not_drawn=[title for title, chart in drawn.items() if not chart],
        differing=numbers.differing(runs),
        points=charts.POINTS,
        thinned=any(len(run.records) > charts.POINTS for run in runs),
        score=" or ".join(name for _, name in known),
        heading=" or ".join(name for _, name in known).replace("top-1", "Top-1"),
        percent=mean_and_std,
        shown=_shown,
    )


def _run(run: Ran, anchor: str) -> dict[str, Any]:
    evaluated, best = numbers.scores(run), reader.best(run.records)
    return {
        "name": run.name,
        "anchor": anchor,
        "status": run.status,
        "score": SCORES[run.cfg.task][1],
        "evaluated": evaluated
        and {
            "scores": evaluated[1],
            "after": _after(run, evaluated[0]),
            "left_out": numbers.left_out(run, evaluated[0]),
        },
        "best": best and _best(run, best),
        "verdict": numbers.verdict(run),
        "about": (
            f"{run.cfg.model.name}, recipe={run.cfg.recipe.name}, data={run.cfg.data.name}, seed"
            f" {run.cfg.seed}"
        ),
        "first_batch": charts.picture(run.folder / "first_batch.png"),
        "newest": run.newest and _newest(run, run.newest, anchor),
        "settings": numbers.settings(run),
        "environment": _environment(run.environment),
    }


def _after(run: Ran, step: int) -> str:
    return f"step {step} (epoch {round(step / numbers.steps_per_epoch(run), 2):g})"


def _best(run: Ran, best: reader.Best) -> dict[str, Any]:
    checkpoint = reader.checkpoint_of(run.folder / "checkpoints", best.step)
    return {
        "score": best.score,
        "weights": "EMA" if best.kind == "ema" else best.kind,
        "after": _after(run, best.step),
        "checkpoint": f"checkpoints/{checkpoint.name}" if checkpoint.exists() else None,
    }


def _shown(value: Any) -> str:
    """A setting's value as YAML and the command line have it."""
    return value if isinstance(value, str) else json.dumps(value)


def _newest(run: Ran, newest: Newest, anchor: str) -> dict[str, Any]:
    found, names = newest.predictions, imagenet.described(run.classes)
    bins, right = numbers.reliability(found), torch.from_numpy(found.labels == found.predicted)
    classes, pairs = numbers.worst_classes(found), numbers.confusions(found)
    images, why_not = _images(run, newest, [entry["name"] for entry in names])
    sizes = {of.label: of.images for of in classes}
    matrix, width = None, 0.0
    if len(names) <= MATRIX:
        counts = numbers.confusion_matrix(found, len(names))
        matrix, width = charts.confusions(counts, [entry["name"] for entry in names], f"{anchor}-confusions")
    return {
        "after": _after(run, newest.step),
        "kind": "EMA" if newest.kind == "ema" else newest.kind,
        "images": images,
        "why_not": why_not,
        "classes": [(names[of.label], of.images, 100 * of.accuracy) for of in classes[:CLASSES]],
        "of_classes": len(classes),
        "confusions": [
            (names[true], names[predicted], count, 100 * count / sizes[true])
            for true, predicted, count in pairs[:PAIRS]
        ],
        "of_confusions": len(pairs),
        "matrix": matrix,
        "matrix_width": width,
        "reliability": charts.reliability(bins, found.confidence, f"{anchor}-reliability"),
        "ece": calibration_error(torch.from_numpy(found.confidence), right),
        "count": len(found.labels),
    }


def _images(run: Ran, newest: Newest, names: list[str]) -> tuple[list[tuple[str, list[dict[str, Any]]]], str]:
    """The best and the worst predictions as the model saw them, or none of them and why."""
    found, transform = newest.predictions, transforms.evaluation(run.cfg.evaluate)
    try:
        own = replace(run.cfg.data, cache=Data.cache)  # a run of somebody names no folder to write to
        source = sources.open_validation(own, run.classes)
        if source.fingerprint != newest.fingerprint:
            return [], "the validation images have changed since the evaluation"
        if len(source) != len(found.labels):
            return [], f"{len(source) - len(found.labels)} damaged images were left out of the evaluation"

        def shown(sample: int) -> dict[str, Any]:
            return {
                "address": charts.thumbnail(transform(source.read(sample))),
                "where": source.where(sample),
                "file": pictures.file_name(source.where(sample)),
                "true": names[found.labels[sample]],
                "predicted": names[found.predicted[sample]],
                "confidence": 100 * found.confidence[sample],
                "loss": found.losses[sample],
                "right": bool(found.labels[sample] == found.predicted[sample]),
            }

        best, worst = numbers.extremes(found, IMAGES)
        return [
            ("Images with the lowest loss", [shown(sample) for sample in best]),
            ("Images with the highest loss", [shown(sample) for sample in worst]),
        ], ""
    except Stop as stop:
        return [], stop.args[1]
    except (OSError, Undecodable) as error:
        return [], str(error)


def _environment(said: dict[str, Any]) -> list[tuple[str, str]]:
    """environment.json in a few rows."""
    facts, starts, git = said["facts"], said["starts"], said.get("git")
    changed = (
        f", with uncommitted changes (sha256 of git diff: {git['diff'][:12]}...)"
        if git and git["diff"]
        else ""
    )
    given = {
        of: ", ".join(
            f"{level} {name}" for level, name in PROMISES.items() if said["promises"].get(level) is of
        )
        for of in (True, False)
    }
    rows = [("command", starts[-1]["command"])]
    for start in starts:
        where = f"{start.get('host')}, {start.get('processor')}, ranks: {start.get('ranks')}"
        rows.append((f"started after step {start['after_step']}", f"{start['time']} on {where}"))
    rows += [(name, str(facts[name])) for name in ("hardware", "threads", "pixels") if name in facts]
    rows.append(("git", git["commit"] + changed if git else "not a git checkout"))
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in said["packages"].items())))
    rows.append(("promises", given[True] + (f"; not {given[False]}" if given[False] else "")))
    for lost in said["lost"]:
        rows.append(
            (
                "promise lost",
                f"{lost['promise']} at {lost['time']}, {lost['because']}: {lost['from']} -> {lost['to']}",
            )
        )
    rows += [("data", note) for note in said.get("data_notes", [])]
    return rows
