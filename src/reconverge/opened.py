"""A run as it lies on the disk, for what looks at it: eval.py, export, report, verify. Imports no torch."""

from pathlib import Path
from typing import NamedTuple

from reconverge import config
from reconverge.errors import Exit, Stop
from reconverge.settings import Train


class Opened(NamedTuple):
    """A run's folder as eval.py reads it."""

    folder: Path
    cfg: Train
    classes: list[str]


def opened(path: Path) -> Opened:
    """The run that `path`, its folder or one of its checkpoints, belongs to. Errors: Stop(MISSING)."""
    if (path / "export.json").exists():  # one that timm reads does not come here
        raise Stop(
            Exit.MISSING,
            f"{path} is an export for other tools",
            "a run, one of its checkpoints, or an export --to timm",
            "the path",
        )
    for folder in (path, *path.parents[:2]):
        if (folder / "config.yaml").exists() and (folder / "classes.txt").exists():
            cfg = config.from_text((folder / "config.yaml").read_text(), Train)
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
