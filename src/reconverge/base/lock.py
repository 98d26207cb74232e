"""One process a run folder: a lock that says who holds it, and whose heartbeat says that the holder lives."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from reconverge.base import launcher
from reconverge.base.errors import Exit, Stop

INTERVAL = 10.0  # seconds between two heartbeats; after five without one the holder counts as dead


class Lock:
    """Taken when made. `takeover` says, in a sentence, whose dead lock was taken over, if one was.

    Errors: Stop(IN_USE).
    """

    def __init__(self, path: Path):
        self.path = path
        self.takeover: str | None = None
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "job": launcher.job(),
            "id": uuid.uuid4().hex,
        }
        with self._alone() as file:
            text = file.read()
            if text:
                self.takeover = _judge(json.loads(text), self._mine, path)
            file.truncate(0)
            file.write(json.dumps(self._mine))
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    @contextmanager
    def _alone(self) -> Iterator[TextIO]:
        """The lock's file, made if there is none, while no other process reads or writes it."""
        while True:
            with open(self.path, "a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if (
                    self.path.exists() and os.fstat(file.fileno()).st_ino == self.path.stat().st_ino
                ):  # not removed meanwhile
                    file.seek(0)
                    yield file
                    return

    def check(self) -> None:
        """Before anything is written that matters: a process that was stopped for long may have lost its run.

        Errors: Stop(IN_USE).
        """
        try:
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:
            raise Stop(
                Exit.IN_USE,
                f"{self.path} is gone",
                "a run folder that nobody removes while it trains",
                "the same command starts anew",
            ) from None
        except ValueError:
            holder = {}  # another process writes its name there just now
        if holder.get("id") != self._mine["id"]:
            raise Stop(
                Exit.IN_USE,
                f"{self.path.parent} was taken over by {_name(holder)} while this process did not answer",
                "one process a run",
                "nothing: the other one goes on",
            )

    def release(self) -> None:
        self._released.set()
        if not self.path.exists():
            return
        with self._alone() as file:
            text = file.read()
            if not text or json.loads(text)["id"] == self._mine["id"]:
                self.path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(INTERVAL):
            try:
                os.utime(self.path)
            except OSError:
                pass  # the folder is gone or its disk is: whoever writes next will say so


def _judge(holder: dict, mine: dict, path: Path) -> str:
    """Why the lock of `holder` may be taken over. Errors: Stop(IN_USE)."""
    name = _name(holder)
    if holder["host"] == mine["host"]:
        # Start times tell a process from a later one of the same number. A live one of the same job is a
        # second task of it, not the first one requeued.
        if _started(holder["pid"]) != holder["started"]:
            return f"took over from {name}, which is dead"
    elif mine["job"] and holder["job"] == mine["job"]:
        return f"took over from {name}: this same job, requeued"
    elif (age := _age(path)) > 5 * INTERVAL:
        return f"took over from {name}, whose last heartbeat is {age:.0f} s old"
    raise Stop(
        Exit.IN_USE,
        f"{path.parent} is in use by {name}",
        "one process a run",
        "wait for it, stop it, or choose another run=NAME",
    )


def _name(holder: dict) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"


def _started(pid: int) -> str | None:
    """When a process of this host began, as the kernel counts; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in "ZX" else stat[19]  # a zombie is dead
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    try:  # no /proc, as on macOS
        os.kill(pid, 0)
        return "alive"
    except PermissionError:
        return "alive"
    except ProcessLookupError:
        return None


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system: the clocks of hosts may differ."""
    probe = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return time.time() - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
