"""The rank of this process, from the variables of torchrun or srun (one task per GPU); the cores that it may
use; and the scheduler's name of the job. Imports no torch.
"""

import atexit
import os
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple, NoReturn


class Place(NamedTuple):
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this host
    local_size: int = 1
    launcher: str = ""  # torchrun, srun, or "" for a process that was started directly


def place(environment: Mapping[str, str]) -> Place:
    """RANK and WORLD_SIZE come from torchrun and win over Slurm's variables: with `srun torchrun`, a Slurm
    task is a node, not a rank.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local, local_size = (
            int(environment.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
        return Place(rank, size, local, local_size, "torchrun")
    # Slurm sets this variable only inside a job step. The batch script around it is one process.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size > 1:
        tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
        return Place(int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), tasks, "srun")
    return Place()


def _tasks_per_node(text: str) -> list[int]:
    """Slurm writes "2(x3),1" for 2, 2, 2, 1."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in groups for _ in range(int(times or 1))]


HERE = place(os.environ)


def cores() -> int:
    """Cores that this process may use: an equal part of those that the ranks of its host share."""
    if HERE.launcher == "srun" and "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // HERE.local_size)


def brief() -> bool:
    """Whether a sweep started this run after others, whose introduction need not come again."""
    return "RECONVERGE_BRIEF" in os.environ


def job() -> str | None:
    """The scheduler's name of this job, which stays the same when the job is requeued."""
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" without torchrun --rdzv-id
    return os.environ.get("SLURM_JOB_ID") or (None if torchrun == "none" else f"torchrun {torchrun}")


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    One of several ranks ends without taking Python down first: a thread of gloo may still free a tensor then,
    for which it needs Python, and the process would be aborted ("terminate called without an active
    exception", exit code 134) although all its work is done. After a fault of a GPU the same may happen.
    """
    if HERE.size == 1 and code != 69:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def module(name: str) -> list[str]:
    """Arguments for a Python that runs a module, as `-m` does, but never imports from the folder in which it
    is started: `-m` would take a tensorboardX.py that lies there for the library. (`-P` needs Python 3.11.)
    """
    program = (
        "import sys; sys.path[:] = filter(None, sys.path); import runpy;"
        f" runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    )
    return ["-c", program]
