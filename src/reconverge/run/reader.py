"""Reads the files of a run's folder, for eval.py, export, report, verify and resumed training. Imports no
torch.

A file that is damaged gives Stop(DAMAGED) with the name of the file and the fault.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

from reconverge.base.errors import Exit, Stop, reason
from reconverge.base.files import json_lines, read_text
from reconverge.config import compose
from reconverge.config.settings import SCORES, Train

RUNS = Path("runs")
Content = TypeVar("Content")


class Opened(NamedTuple):
    """A run's folder as eval.py reads it."""

    folder: Path
    cfg: Train
    classes: list[str]


def opened(path: Path) -> Opened:
    """The run whose folder or checkpoint `path` is.

    Errors: Stop(MISSING, DAMAGED).
    """
    if (path / "export.json").exists():  # the callers handle exports for timm before
        raise Stop(
            Exit.MISSING,
            f"{path} is an export for other tools",
            "a run, one of its checkpoints, or a folder of reconverge export --to timm",
            "name the run, or export it again with --to timm",
        )
    for folder in (path, *path.parents[:2]):
        if (folder / "config.yaml").exists() and (folder / "classes.txt").exists():
            config, classes = _text(folder / "config.yaml"), _text(folder / "classes.txt")
            return Opened(folder, compose.from_text(config, Train), classes.splitlines())
    raise Stop(
        Exit.MISSING,
        f"{path} is neither a run nor a checkpoint of a run",
        "runs/NAME or runs/NAME/checkpoints/step-...; eval.py also takes timm:NAME, hf-hub:OWNER/NAME, or a"
        " folder with timm's config.json",
        "correct the path",
    )


def is_timms(given: str) -> bool:
    """Whether `given` names weights that timm loads, and not a run."""
    return given.startswith(("timm:", "hf-hub:")) or (Path(given).expanduser() / "config.json").exists()


# ---- its files ----


def environment(folder: Path, *needed: str) -> dict[str, Any]:
    """environment.json, which must also have the keys `needed`. Errors: Stop(MISSING, DAMAGED)."""
    return _table(folder / "environment.json", "facts", "starts", "lost", *needed)


def status(folder: Path) -> dict[str, Any]:
    """status.json. Errors: Stop(MISSING, DAMAGED)."""
    return _table(folder / "status.json", "reason", "exit_code", "step", "total", "summary", "time")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, or none if there is no file. Errors: Stop(DAMAGED)."""
    path = folder / "metrics.jsonl"
    return as_written(path, lambda: [_numbers(line) for line in json_lines(path)])


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines of record.jsonl, or none if there is no file. Errors: Stop(DAMAGED)."""
    path = folder / "record.jsonl"
    return as_written(path, lambda: [_of_step(line) for line in json_lines(path)])


def as_written(path: Path, load: Callable[[], Content]) -> Content:
    """The result of `load`, which reads the file `path`. Errors: Stop(DAMAGED); OSError is passed on."""
    try:
        return load()
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, BadZipFile, RecursionError) as error:
        raise Stop(
            Exit.DAMAGED,
            f"{path} is damaged: {reason(error)}",
            "the file as the run wrote it",
            "restore the file from a copy, or leave this run out",
        ) from None


def _text(path: Path) -> str:
    return as_written(path, lambda: read_text(path))


def _table(path: Path, *needed: str) -> dict[str, Any]:
    def load() -> dict[str, Any]:
        table = json.loads(read_text(path))
        return table | {key: table[key] for key in needed}

    return as_written(path, load)


def _numbers(line: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; ValueError for anything else."""
    for key, value in _of_step(line).items():
        if not (value is None or type(value) in (int, float)):
            raise ValueError(f"step {line['step']}: {key} is not a number")
    return line


def _of_step(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError(f"a line without a step: {line}")
    return line


# ---- scores, from the lines of metrics.jsonl ----


def scores(lines: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Step of each evaluation -> score in percent (top-1 or mIoU) for each kind of weights (raw, and ema if
    there is one).
    """
    return {
        line["step"]: {kind: line[f"{kind}_{key}"] for kind in ("raw", "ema") if f"{kind}_{key}" in line}
        for line in lines
        for key, _ in SCORES.values()
        if f"raw_{key}" in line
    }


def best_steps(evaluated: Mapping[int, Mapping[str, float]]) -> dict[str, int]:
    """For each kind of weights in the result of `scores`, the first step with its best score."""
    kinds = next(iter(evaluated.values()), {})
    return {kind: max(evaluated, key=lambda step: evaluated[step][kind]) for kind in kinds}


class Best(NamedTuple):
    """The highest score of all evaluations, by whichever weights; of equal ones the first."""

    step: int
    kind: str  # raw or ema
    score: float  # percent


def best(lines: Sequence[Mapping[str, Any]]) -> Best | None:
    """None if there was no evaluation."""
    evaluated = scores(lines)
    found = [Best(step, kind, evaluated[step][kind]) for kind, step in best_steps(evaluated).items()]
    return max(found, key=lambda one: one.score, default=None)


# ---- its checkpoints ----


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder checkpoints/, oldest first, valid or not; no other folder beside them."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def checkpoint_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint of `step` in a folder checkpoints/; it need not exist."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])
