"""Signals from a scheduler or a user during training set a flag, which the loop reads between steps."""

import math
import os
import signal
import time
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_came: dict[int, float] = {}  # signal number -> time.monotonic() when it first arrived


def catch() -> None:
    """From now on these signals only set the flag.

    Call it before torch is imported: a signal during the import would otherwise end the process.
    """
    for number in CAUGHT:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _note)


def _note(number: int, frame: Any) -> None:
    """A second Ctrl-C stops at once, but only if it comes more than 2 s after the first: a scheduler may send
    one signal several times together.
    """
    if number == signal.SIGINT and time.monotonic() - _came.get(number, math.inf) > 2:
        raise KeyboardInterrupt
    if not _came:
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())
    _came.setdefault(number, time.monotonic())


def told_to_stop() -> bool:
    return bool(_came)


def told_by() -> str:
    """The name of the latest signal; a repetition of one does not count."""
    return signal.Signals(next(reversed(_came))).name if _came else "a signal to another rank"
