"""train.py as processes of its own, which a command starts, waits for and ends. Imports no torch."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit, Stop

PATIENCE = 60  # seconds in which a job that is told to stop saves its step


def script() -> Path:
    """train.py of this installation. Errors: Stop(MISSING)."""
    path = ROOT / "train.py"
    if not path.exists():
        raise Stop(
            Exit.MISSING,
            f"no {path}",
            "reconverge installed from its own folder",
            "pip install -e that folder",
        )
    return path


def command(script: Path, ranks: int) -> list[str]:
    """What starts a script on so many ranks of this machine."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    return [sys.executable, *launcher, str(script)]


@contextmanager
def started(command: list[str], log: Path, folder: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in `folder` (None: this one), whose words go to `log`.

    It ends with the context; a signal from the keyboard does not reach it.
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
    """The end of what a job said, before torchrun's report of it."""
    said = takewhile(
        lambda line: "torch/distributed/elastic" not in line, log.read_text(errors="replace").splitlines()
    )
    return "\n".join(list(said)[-lines:])
