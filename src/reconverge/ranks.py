"""Which of a run's processes this one is, by the word of whoever started it: torchrun, srun (one task a GPU),
or nobody.

Imports no torch: a lone process, a world of one, reaches its refusals without it.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from reconverge.errors import Exit, Stop

Value = TypeVar("Value")


class Place(NamedTuple):
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this host
    local_size: int = 1
    launcher: str = ""  # torchrun, srun, or nobody


def place(environment: Mapping[str, str]) -> Place:
    """RANK and its kin are what torchrun gives, and count before what Slurm says: under srun torchrun, a task
    is a node.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local, local_size = (
            int(environment.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
        return Place(rank, size, local, local_size, "torchrun")
    if (
        int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    ):  # set in a step alone: the script around it is one process
        node, tasks = (
            int(environment["SLURM_NODEID"]),
            _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"]),
        )
        size = int(environment["SLURM_STEP_NUM_TASKS"])
        return Place(
            int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), tasks[node], "srun"
        )
    return Place()


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" is 2, 2, 2, 1."""
    return [
        int(tasks)
        for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(times or 1))
    ]


HERE = place(os.environ)


@contextmanager
def joined(minutes: float) -> Iterator[None]:
    """All ranks of the run as one group, which a world of one does not need. `minutes`: how long a rank is
    waited for.

    Errors: Stop(USAGE) for a launcher that cannot restart ranks, Stop(LOST).
    """
    if HERE.size == 1:
        yield
        return
    if HERE.launcher == "srun":
        _rendezvous_of_slurm()
    elif int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and _static_rendezvous():
        raise Stop(
            Exit.USAGE,
            "torchrun --max-restarts with a static rendezvous (--master-addr, --master-port, --node-rank)",
            "a c10d rendezvous: a static one does not find together again after a rank was killed",
            "torchrun --standalone on one machine, --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT on several;"
            " or --max-restarts=0",
        )
    from reconverge import world

    with world.group(minutes), world.losses_named():
        yield


@contextmanager
def losses_named() -> Iterator[None]:
    """Around what needs all ranks: when some are lost, the error becomes a Stop(LOST) that names them."""
    if HERE.size == 1:
        yield
        return
    from reconverge import world

    with world.losses_named():
        yield


def from_rank_0(function: Callable[[], Value]) -> Value:
    """What `function` gives on rank 0, which alone calls it, on every rank; a Stop of its stops them all."""
    if HERE.size == 1:
        return function()
    from reconverge import world

    return world.from_rank_0(function)


def cores() -> int:
    """Cores that this process may use, of those that the ranks of its host share."""
    if HERE.launcher == "srun" and "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // HERE.local_size)


def _rendezvous_of_slurm() -> None:
    """Where the ranks of a Slurm step meet, unless the job's script says so: on its first host, at a port
    made from its number.
    """
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + (97 * job + step) % 10000))
    if "MASTER_ADDR" not in os.environ:
        listing = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        os.environ["MASTER_ADDR"] = subprocess.run(
            listing, capture_output=True, text=True, check=True
        ).stdout.split()[0]
    os.environ |= {"RANK": str(HERE.rank), "WORLD_SIZE": str(HERE.size)}


def _static_rendezvous() -> bool:
    """torchrun does not tell its workers; its own command line does."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return False
    settings = " ".join(
        [*command, *(f"{name}={value}" for name, value in os.environ.items() if name.startswith("PET_"))]
    )
    return not re.search(r"standalone|c10d|etcd", settings, re.IGNORECASE)
