"""What a scheduler or a person says while a run trains: a flag, which the loop looks at between steps."""

import math
import signal
import sys
import time
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_came: dict[int, float] = {}  # number -> when it first came, by time.monotonic
_said: list[str] = []


def catch() -> None:
    """From now on these signals only raise the flag.

    For use before torch is imported: one that comes meanwhile would end the process.
    """
    for number in CAUGHT:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _note)


def _note(number: int, frame: Any) -> None:
    """Raises the flag, and does nothing that could fail: a reader of stderr may have gone by the same signal.

    A scheduler may send one signal several times at once; a person who presses Ctrl-C again after seconds
    means it.
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
