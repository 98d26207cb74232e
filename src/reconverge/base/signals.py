"""Signals from a scheduler or a user during training set a flag, which the loop reads between steps."""

import math
import signal
import sys
import time
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_came: dict[int, float] = {}  # signal number -> time.monotonic() when it first arrived
_said: list[str] = []


def catch() -> None:
    """From now on these signals only raise the flag.

    For use before torch is imported: one that comes meanwhile would end the process.
    """
    for number in CAUGHT:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _note)


def _note(number: int, frame: Any) -> None:
    """Set the flag, and do nothing that can fail: the same signal may have ended the reader of stderr.

    A second Ctrl-C stops at once, but only more than 2 s after the first one: a scheduler may send a
    signal several times together.
    """
    if number == signal.SIGINT and time.monotonic() - _came.get(number, math.inf) > 2:
        raise KeyboardInterrupt
    _came.setdefault(number, time.monotonic())


def told_to_stop() -> bool:
    """Whether a signal came; the first time that it is so, it is printed."""
    if _came and not _said:
        _said.append(told_by())
        print(f"\n{told_by()}: stopping", file=sys.stderr, flush=True)
    return bool(_came)


def told_by() -> str:
    """The last signal that came first."""
    return signal.Signals(next(reversed(_came))).name if _came else "a signal to another rank"
