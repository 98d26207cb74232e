"""The lock of a run's folder, for one process at a time. It names its holder; a heartbeat shows that the
holder is alive.
"""

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
    """Creating the object takes the lock. `takeover` tells from which dead process it was taken over, if any.

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
        """The lock's file, created if needed, while no other process reads or writes it."""
        while True:
            with open(self.path, "a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # The file may have been removed before flock returned: then try again with a new one.
                if self.path.exists() and os.fstat(file.fileno()).st_ino == self.path.stat().st_ino:
                    file.seek(0)
                    yield file
                    return

    def check(self) -> None:
        """To be called before each important write: a process that was suspended may have lost the lock.

        Errors: Stop(IN_USE).
        """
        try:
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:
            raise Stop(
                Exit.IN_USE,
                f"{self.path} was removed while the run was training",
                "a run folder that nobody removes or renames during training",
                "run the same command again to start from the beginning",
            ) from None
        except ValueError:
            holder = {}  # another process is writing its name there at this moment
        if holder.get("id") != self._mine["id"]:
            raise Stop(
                Exit.IN_USE,
                f"{self.path.parent} was taken over by {_name(holder)} while this process was suspended",
                "one process for each run",
                "nothing; the other process continues the run",
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
                pass  # the folder or its disk is gone: the next write will report it


def _judge(holder: dict, mine: dict, path: Path) -> str:
    """Why the lock of `holder` may be taken over. Errors: Stop(IN_USE)."""
    name = _name(holder)
    if holder["host"] == mine["host"]:
        # The start time tells a process from a later one with the same number. A live process with the same
        # job is a second task of that job, not the requeued first one.
        if _started(holder["pid"]) != holder["started"]:
            return f"took over from {name}, which is dead"
    elif mine["job"] and holder["job"] == mine["job"]:
        return f"took over from {name}: the same job, which was requeued"
    elif (age := _age(path)) > 5 * INTERVAL:
        return f"took over from {name}, whose last heartbeat is {age:.0f} s old"
    raise Stop(
        Exit.IN_USE,
        f"{path.parent} is in use by {name}",
        "one process for each run",
        "wait for that process, stop it, or choose another run=NAME",
    )


def _name(holder: dict) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"


def _started(pid: int) -> str | None:
    """The start time of a process of this host, in the kernel's units; None if the process does not exist."""
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
    """Seconds since the last heartbeat, by the clock of the file system, since hosts' clocks may differ."""
    probe = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return time.time() - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
