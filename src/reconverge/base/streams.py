"""Standard streams that cannot end a training: a closed one is opened on /dev/null before any file gets its
number, and one that can no longer be written (a pipe that nobody reads, a full disk, a dead terminal) goes
quiet.
"""

import io
import os
import sys
from typing import Any


def secure() -> None:
    """For the beginning of a command, before anything is opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # and no other that somebody has put in its place
            setattr(sys, name, Quiet(stream))


class Quiet(io.TextIOWrapper):
    """A stream as `stream`, whose descriptor becomes that of /dev/null when it cannot be written."""

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering)

    def write(self, text: str) -> int:
        return self._tried(super().write, text) or len(text)

    def flush(self) -> None:
        self._tried(super().flush)

    def _tried(self, write: Any, *given: Any) -> Any:
        try:
            return write(*given)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return None
