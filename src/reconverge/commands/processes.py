"""Start train.py in its own processes, wait for it, and end it. Imports no torch."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from reconverge.base import launcher
from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit, Stop

PATIENCE = 60  # seconds that a job gets to save its step after SIGTERM, before SIGKILL


def script() -> Path:
    """train.py of this installation. Errors: Stop(MISSING)."""
    path = ROOT / "train.py"
    if not path.exists():
        raise Stop(
            Exit.MISSING,
            f"{path} does not exist",
            "reconverge installed in editable mode from its repository",
            "pip install -e PATH_OF_THE_REPOSITORY",
        )
    return path


def command(script: Path, ranks: int) -> list[str]:
    """The command that runs a script on `ranks` ranks of this machine."""
    torchrun = [*launcher.module("torch.distributed.run"), "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(script)]


@contextmanager
def started(command: list[str], log: Path, folder: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in `folder` (None: the current folder), whose output goes to the file `log`.

    It is ended when the context ends. Ctrl-C in the terminal does not reach it.
    """
    with open(log, "wb") as words:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, cwd=folder, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()  # torchrun passes it on to its ranks
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_words(log: Path, lines: int = 12) -> str:
    """The last lines that a job printed, before torchrun's own report of the failure."""
    said = takewhile(
        lambda line: "torch/distributed/elastic" not in line, log.read_text(errors="replace").splitlines()
    )
    return "\n".join(list(said)[-lines:])
