"""The report as a page: what report.html is filled with.

Names of classes, runs and files are anybody's text, which the template escapes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from reconverge.base import imagenet
from reconverge.base.errors import Stop
from reconverge.base.terminal import mean_and_std
from reconverge.data import sources, transforms
from reconverge.data.image import Undecodable
from reconverge.report import charts, numbers
from reconverge.report.numbers import Newest, Ran
from reconverge.training.evaluate import calibration_error

IMAGES, CLASSES, PAIRS = 12, 30, 20  # shown at most: images of each kind, classes, pairs of classes

# Title, name in metrics.jsonl of the raw weights' or the only value, of the EMA weights', factor.
CHARTS: list[tuple[str, str, str | None, float]] = [
    ("training loss (mixed, smoothed)", "loss", None, 1),
    ("validation loss", "raw_loss", "ema_loss", 1),
    ("top-1, %", "raw_top1", "ema_top1", 1),
    ("learning rate", "lr", None, 1),
    ("gradient norm", "grad_norm", None, 1),
    ("images/s", "images_per_second", None, 1),
    ("data-wait, % of the time", "data_wait", None, 100),
]
PROMISES = {"R1": "re-run", "R2": "resume", "R3": "data-elastic", "R4": "weight-elastic"}


def html(runs: Sequence[Ran]) -> str:
    """The whole page, of one run or several. The validation images are read, where they are still there."""
    groups = numbers.groups(runs)
    drawn = {title: charts.curves(groups, title, raw, ema, scale) for title, raw, ema, scale in CHARTS}
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    return template.render(
        runs=[_run(run, f"run{number}") for number, run in enumerate(runs)],
        groups=list(zip(charts.colours(len(groups)), map(numbers.row, groups), strict=True)),
        charts=[(title, chart) for title, chart in drawn.items() if chart],
        not_drawn=[title for title, chart in drawn.items() if not chart],
        differing=numbers.differing(runs),
        points=charts.POINTS,
        percent=mean_and_std,
    )


def _run(run: Ran, anchor: str) -> dict[str, Any]:
    evaluated = numbers.top1(run)
    return {
        "name": run.name,
        "anchor": anchor,
        "status": run.status,
        "evaluated": evaluated and {"step": evaluated[0], "top1": evaluated[1]},
        "verdict": numbers.verdict(run),
        "about": (
            f"{run.cfg.model.name}, recipe={run.cfg.recipe.name}, data={run.cfg.data.name}, seed"
            f" {run.cfg.seed}"
        ),
        "first_batch": charts.picture(run.folder / "first_batch.png"),
        "newest": run.newest and _newest(run, run.newest, anchor),
        "environment": _environment(run.environment),
    }


def _newest(run: Ran, newest: Newest, anchor: str) -> dict[str, Any]:
    found, names = newest.predictions, imagenet.described(run.classes)
    bins, right = numbers.reliability(found), torch.from_numpy(found.labels == found.predicted)
    classes, pairs = numbers.worst_classes(found), numbers.confusions(found)
    images, why_not = _images(run, newest, [entry["name"] for entry in names])
    sizes = {of.label: of.images for of in classes}
    return {
        "step": newest.step,
        "kind": "EMA" if newest.kind == "ema" else newest.kind,
        "images": images,
        "why_not": why_not,
        "classes": [(names[of.label], of.images, 100 * of.accuracy) for of in classes[:CLASSES]],
        "of_classes": len(classes),
        "confusions": [
            (names[true], names[said], count, 100 * count / sizes[true])
            for true, said, count in pairs[:PAIRS]
        ],
        "of_confusions": len(pairs),
        "reliability": charts.reliability(bins, f"{anchor}-reliability"),
        "ece": calibration_error(torch.from_numpy(found.confidence), right),
        "count": len(found.labels),
    }


def _images(run: Ran, newest: Newest, names: list[str]) -> tuple[list[tuple[str, list[dict[str, Any]]]], str]:
    """The best and the worst predictions as the model saw them, or none of them and why."""
    found, transform = newest.predictions, transforms.evaluation(run.cfg.evaluate)
    try:
        source = sources.open_validation(run.cfg.data, run.classes)
        if source.fingerprint != newest.fingerprint:
            return [], "the validation images are others now than those of the evaluation"
        if len(source) != len(found.labels):
            return [], f"{len(source) - len(found.labels)} damaged images were left out of the evaluation"

        def shown(sample: int) -> dict[str, Any]:
            return {
                "address": charts.thumbnail(transform(source.read(sample))),
                "where": source.where(sample),
                "true": names[found.labels[sample]],
                "said": names[found.predicted[sample]],
                "confidence": 100 * found.confidence[sample],
                "loss": found.losses[sample],
                "right": bool(found.labels[sample] == found.predicted[sample]),
            }

        best, worst = numbers.extremes(found, IMAGES)
        return [
            ("lowest loss", [shown(sample) for sample in best]),
            ("highest loss", [shown(sample) for sample in worst]),
        ], ""
    except Stop as stop:
        return [], stop.args[1]
    except (OSError, Undecodable) as error:
        return [], str(error)


def _environment(said: dict[str, Any]) -> list[tuple[str, str]]:
    """environment.json in a few rows."""
    facts, starts, git = said["facts"], said["starts"], said.get("git")
    changed = (
        f", changed since (sha256 of the difference: {git['diff'][:12]}...)" if git and git["diff"] else ""
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
    rows.append(("git", git["commit"] + changed if git else "not a checkout"))
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
