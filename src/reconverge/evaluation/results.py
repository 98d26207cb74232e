"""Prints the results of an evaluation beside the published numbers, and writes them as JSON."""

import json
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from reconverge.base.files import write_whole
from reconverge.base.terminal import say, table
from reconverge.config.settings import Data
from reconverge.distributed import ranks
from reconverge.evaluation import sets
from reconverge.evaluation.figures import published_accuracy
from reconverge.evaluation.model import Trained
from reconverge.evaluation.sets import Part
from reconverge.run.predictions import per_class
from reconverge.training.evaluate import Among, Evaluator, Result

UNITS = {"real": "ReaL", "mce": "mCE", "mean_error": "mean error", "top1": "top-1", "top5": "top-5"}


class Findings:
    """The results of one model on one or several sets."""

    def __init__(
        self,
        model: Trained,
        folder: Path,
        evaluator: Evaluator,
        asked: dict[str, Any],
        precision: str,
        decoder: str,
    ):
        """`folder`: where the JSON files are written. `asked`: preprocessing settings of the command line.
        `precision` and `decoder` are written with the results.
        """
        self._model, self._folder, self._evaluator, self._asked = model, folder, evaluator, asked
        self._how = evaluator.settings  # of the latest set
        self._about = {
            "checkpoint": model.path,
            "model": model.name,
            "step": model.step,
            "precision": precision,
            "decoder": decoder,
        }
        self._beside = published_accuracy(model.name, evaluator.settings)
        self._found: dict[str, dict[str, Any]] = {}  # by set

    def evaluate(self, data: Data) -> bool:
        """Evaluate on one set, and print the results. Returns whether it was completed. Errors: Stop."""
        parts = ranks.rank_0_first(partial(sets.parts, data, self._model.classes))
        self._how = sets.settings_of(data, self._evaluator.settings, self._asked)
        evaluator = self._evaluator._replace(settings=self._how)
        results: dict[str, list[Result]] = {weights: [] for weights in self._model.nets}
        for part in parts:
            nets = self._model.nets
            if part.among is not None:
                nets = {weights: Among(net, part.among) for weights, net in nets.items()}
            answers = evaluator(nets, part.source)
            if answers is None:
                return False
            for weights, answer in answers.items():
                results[weights].append(answer)
        found = self._found[data.name] = counted(data, parts, results)
        for line in lines(data, found, list(results), *self._beside):
            say(line)
        return True

    def write(self, suite: str, writes: bool) -> None:
        """Write the JSON file. Its name contains the set, the settings and the checkpoint, so that none is
        overwritten by another.
        """
        step, precision = self._model.step, self._about["precision"]
        name = f"{self._model.name}-{precision}" if step is None else f"{precision}-step-{step:08d}"
        name += "".join(f"-{option}-{value}" for option, value in self._asked.items() if option != "batch")
        if suite == "none":
            ((data, found),) = self._found.items()
            path = self._folder / f"eval-{data}-{found['fingerprint'][:8]}-{name}.json"
            content = self._about | {"data": data, "evaluate": asdict(self._how)} | found
        else:
            path = self._folder / f"eval-{suite}-{name}.json"
            content = self._about | {"evaluate": asdict(self._evaluator.settings), "sets": self._found}
            say(row(self._found, list(self._model.nets), *self._beside))
        if writes:
            write_whole(path, json.dumps(content, indent=1) + "\n")
        say(f"written to {path}")


def counted(data: Data, parts: list[Part], results: dict[str, list[Result]]) -> dict[str, Any]:
    """Fingerprint and number of images of a set, and the scores of each kind of weights. Errors: Stop."""
    score = sets.SETS[str(data.dataset)].score if data.kind == "evaluation" else sets.top1
    prints = [part.source.fingerprint for part in parts]
    found: dict[str, Any] = {
        "images": sum(answer.images for answer in next(iter(results.values()))),
        "left_out": [text for answer in next(iter(results.values())) for text in answer.left_out],
        "fingerprint": prints[0] if len(prints) == 1 else sha256(" ".join(prints).encode()).hexdigest(),
    }
    for name, answers in results.items():
        found[name] = score(data, parts, answers)
        if len(parts) > 1:
            of_parts = zip(parts, answers, strict=True)
            found[name]["parts"] = {part.name: result.top1 for part, result in of_parts}
            continue
        (part,), (result,) = parts, answers
        found[name] |= {key: getattr(result, key) for key in ("top1", "top5", "loss", "ece", "images")}
        labels, classes = part.source.labels(result.ids), part.source.classes
        of_classes = sorted(per_class(labels, result.predicted))
        found[name]["per_class"] = {classes[of.label]: 100 * of.right / of.images for of in of_classes}
    return found


def lines(
    data: Data, found: dict[str, Any], kinds: list[str], who: str, published: dict[str, float]
) -> list[str]:
    """Lines to print for one set: one for each kind of weights, with the number that `who` published."""
    images, known = found["images"], sets.SETS[str(data.dataset)] if data.kind == "evaluation" else None
    said = [
        f"{images:,} images of {'eval/' * bool(known)}{data.name}"
        + (f" ({len(found['left_out'])} damaged ones left out)" if found["left_out"] else "")
        + (f" (but the published set has {known.images:,})" if known and images != known.images else "")
    ]
    beside = published.get(str(data.dataset)) if known else None
    for name in kinds:
        of = found[name]
        keys = [key for key in dict.fromkeys([next(iter(of)), *UNITS]) if key in of]
        numbers = [f"{UNITS[key]} {of[key]:.3f} %" for key in keys]
        if "loss" in of:
            numbers.append(f"loss {of['loss']:.4f}  calibration error {of['ece']:.2f} %")
        said.append(
            f"{name:<{max(map(len, kinds)) + 1}} {'  '.join(numbers)}"
            + (f"  ({who}: {beside:g} %)" if beside is not None else "")
        )
    return said


def row(found: dict[str, dict[str, Any]], kinds: list[str], who: str, published: dict[str, float]) -> str:
    """A table with one column for each set of a suite: its main score for each kind of weights, and the
    published one.
    """
    firsts = {name: next(iter(of[kinds[0]])) for name, of in found.items()}
    heads = [f"{name} ({UNITS[first]})" for name, first in firsts.items()]
    rows = [[kind, *(f"{found[name][kind][first]:.1f}" for name, first in firsts.items())] for kind in kinds]
    if published:
        rows.append([who, *(f"{published[name]:.1f}" if name in published else "-" for name in found)])
    return table(["percent", *heads], rows)
