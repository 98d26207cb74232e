"""A run as it lies on the disk: the one place that knows its files, for eval.py, export, report, verify and a
resumed training alike. Imports no torch.

What cannot be read as it was written is Stop(DAMAGED), with the file and the fault.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

from reconverge.base.errors import Exit, Stop, reason
from reconverge.base.files import json_lines
from reconverge.config import compose
from reconverge.config.settings import Train

RUNS = Path("runs")
Content = TypeVar("Content")


class Opened(NamedTuple):
    """A run's folder as eval.py reads it."""

    folder: Path
    cfg: Train
    classes: list[str]


def opened(path: Path) -> Opened:
    """The run that `path`, its folder or one of its checkpoints, belongs to.

    Errors: Stop(MISSING, DAMAGED).
    """
    if (path / "export.json").exists():  # one that timm reads does not come here
        raise Stop(
            Exit.MISSING,
            f"{path} is an export for other tools",
            "a run, one of its checkpoints, or an export --to timm",
            "the path",
        )
    for folder in (path, *path.parents[:2]):
        if (folder / "config.yaml").exists() and (folder / "classes.txt").exists():
            cfg = compose.from_text((folder / "config.yaml").read_text(), Train)
            return Opened(folder, cfg, (folder / "classes.txt").read_text().splitlines())
    raise Stop(
        Exit.MISSING,
        f"{path} is no run and no checkpoint of one",
        "runs/NAME or runs/NAME/checkpoints/step-..., and for eval.py what timm reads: timm:NAME,"
        " hf-hub:OWNER/NAME, a folder with config.json",
        "the path",
    )


def is_timms(given: str) -> bool:
    """Whether a checkpoint is meant that timm reads, and not a run."""
    return given.startswith(("timm:", "hf-hub:")) or (Path(given).expanduser() / "config.json").exists()


# ---- its files ----


def environment(folder: Path, *needed: str) -> dict[str, Any]:
    """environment.json, with what else is `needed` of it. Errors: Stop(MISSING, DAMAGED)."""
    return _table(folder / "environment.json", "facts", "starts", "lost", *needed)


def status(folder: Path) -> dict[str, Any]:
    """status.json. Errors: Stop(MISSING, DAMAGED)."""
    return _table(folder / "status.json", "reason", "exit_code", "step", "total", "summary", "time")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, none if there is no file. Errors: Stop(DAMAGED)."""
    path = folder / "metrics.jsonl"
    return as_written(path, lambda: [_numbers(line) for line in json_lines(path)])


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines of record.jsonl, none if there is no file."""
    return json_lines(folder / "record.jsonl")


def as_written(path: Path, load: Callable[[], Content]) -> Content:
    """What `load` reads from the file `path`. Errors: Stop(DAMAGED), and OSError as it is."""
    try:
        return load()
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, BadZipFile) as error:
        raise Stop(
            Exit.DAMAGED,
            f"{path}: {reason(error)}",
            "the file as the run wrote it",
            "restore it, or leave this run out",
        ) from None


def _table(path: Path, *needed: str) -> dict[str, Any]:
    def load() -> dict[str, Any]:
        table = json.loads(path.read_text())
        return table | {key: table[key] for key in needed}

    return as_written(path, load)


def _numbers(line: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; ValueError for anything else."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError(f"a line without a step: {line}")
    for key, value in line.items():
        if not (value is None or type(value) in (int, float)):
            raise ValueError(f"step {line['step']}: {key} is no number")
    return line


# ---- accuracy, as the lines of metrics.jsonl have it ----


def top1(lines: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Of each evaluation, by step: top-1 by kind of weights (raw, and ema where there is one), percent."""
    return {
        line["step"]: {kind: line[f"{kind}_top1"] for kind in ("raw", "ema") if f"{kind}_top1" in line}
        for line in lines
        if "raw_top1" in line
    }


def best_steps(evaluated: Mapping[int, Mapping[str, float]]) -> dict[str, int]:
    """For each kind of weights that `top1` has, the first step with its best top-1."""
    kinds = next(iter(evaluated.values()), {})
    return {kind: max(evaluated, key=lambda step: evaluated[step][kind]) for kind in kinds}


class Best(NamedTuple):
    """The highest top-1 of all evaluations, by whichever weights; of equal ones the first."""

    step: int
    kind: str  # raw or ema
    top1: float  # percent


def best(lines: Sequence[Mapping[str, Any]]) -> Best | None:
    """None if there was no evaluation."""
    evaluated = top1(lines)
    found = [Best(step, kind, evaluated[step][kind]) for kind, step in best_steps(evaluated).items()]
    return max(found, key=lambda one: one.top1, default=None)


# ---- its checkpoints ----


def checkpoints(folder: Path) -> list[Path]:
    """Those below a folder checkpoints/, oldest first, valid or not."""
    return sorted(folder.glob("step-*"))


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or would be, below a folder checkpoints/."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])
