"""Mirrors metrics.jsonl to a tracker, from a process of its own: it can neither delay nor break the training.

The file is the truth. The mirror notes how far it got, so that a resumed run goes on where it stopped and
nothing comes twice.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reconverge.base import files, launcher
from reconverge.config.settings import Tracker as Settings

FAILED = "wandb online failed"  # so begins the line of tracker.log that says it
COMMAND = launcher.module("reconverge.run.tracker")
FLUSH = 30.0  # seconds that the end of a run waits for the mirror


class Tracker:
    """The process that mirrors `folder`; none for tracker=none. `note`: what a person should know of it."""

    def __init__(self, settings: Settings, folder: Path):
        self._process: subprocess.Popen | None = None
        self._log, self._log_before, self.note = folder / "tracker.log", 0, ""
        if settings.name == "none":
            return
        self.note = _offline_note(folder) if settings.name == "wandb" else _viewer_note(folder)
        command = [sys.executable, *COMMAND, settings.name, settings.project, str(folder)]
        with files.appending(self._log) as log:
            self._log_before = log.tell()
            # A session of its own: Ctrl-C is for the training. It ends when its standard input does, however
            # this process ended.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )

    def close(self) -> str | None:
        """Let the mirror finish; a sentence if it failed or is still at work."""
        if self._process is None or self._process.stdin is None or self._process.stdin.closed:
            return None
        try:
            self._process.stdin.write(b"end")  # closing is not enough: data workers have inherited the pipe
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died before
        try:
            code = self._process.wait(FLUSH)
        except subprocess.TimeoutExpired:
            return "the tracker is still at work, see tracker.log; the run is complete without it"
        if code:
            return f"the tracker failed with exit code {code}, see tracker.log; metrics.jsonl is complete"
        with open(self._log, errors="replace") as log:
            log.seek(self._log_before)
            return next((line.strip() for line in log if line.startswith(FAILED)), None)


def _wandb_mode() -> str:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = "WANDB_API_KEY" in os.environ or (netrc.exists() and "wandb" in netrc.read_text())
    return os.environ.get("WANDB_MODE", "online" if logged_in else "offline")


def _offline_note(folder: Path) -> str:
    if _wandb_mode() != "offline":
        return ""
    reason = "WANDB_MODE=offline" if "WANDB_MODE" in os.environ else "no login was found (wandb login)"
    return f"wandb records offline, {reason}; wandb sync {folder}/wandb/offline-* uploads the run later"


def _viewer_note(folder: Path) -> str:
    install = "" if find_spec("tensorboard") else "pip install tensorboard; "
    return f"to see the curves in TensorBoard: {install}tensorboard --logdir {folder.parent}"


def mirror(name: str, project: str, folder: Path) -> None:
    write, finish = {"wandb": _wandb, "tensorboard": _tensorboard}[name](folder, project)
    mark = folder / f"tracker-{name}.json"
    done = json.loads(files.read_text(mark)) if mark.exists() else {"step": -1, "records": 0}
    metrics, seen, at_step = folder / "metrics.jsonl", {"step": -1, "records": 0}, 0
    ended = False
    while True:
        with open(metrics) as file:
            file.seek(at_step)
            while (line := file.readline()).endswith("\n"):
                at_step = file.tell()
                record = json.loads(line)
                seen = {
                    "step": record["step"],
                    "records": seen["records"] + 1 if record["step"] == seen["step"] else 1,
                }
                if (seen["step"], seen["records"]) > (done["step"], done["records"]):
                    write(record)
                    done = seen
        files.write_whole(mark, json.dumps(done))
        if ended:
            break
        ended = bool(
            select.select([sys.stdin], [], [], 1.0)[0]
        )  # readable: told to end, or closed because the run died
    finish()


Write = Callable[[dict[str, Any]], None]


def _wandb(folder: Path, project: str) -> tuple[Write, Callable[[], None]]:
    # wandb reads wandb/settings of the folder in which it is imported. Such a file, which a downloaded folder
    # may bring, names the server that gets the user's key.
    os.chdir("/")
    import wandb
    import yaml

    def start(mode: str) -> Any:
        # A fixed id, so that a requeued job goes on in the same chart.
        return wandb.init(
            project=project,
            name=folder.name,
            id=sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=yaml.safe_load(files.read_text(folder / "config.yaml")),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(init_timeout=30),
        )

    try:
        run = start(_wandb_mode())
    except Exception as error:  # no server, no network, a wrong key
        reason = " ".join(str(error).split())
        print(
            f"{FAILED} ({reason}); going on offline: wandb sync {folder}/wandb/offline-* uploads it later",
            flush=True,
        )
        run = start("offline")
    return lambda record: run.log(record, step=record["step"]), run.finish


def _tensorboard(folder: Path, project: str) -> tuple[Write, Callable[[], None]]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, record["step"])

    return write, writer.close


if __name__ == "__main__":
    mirror(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve())
