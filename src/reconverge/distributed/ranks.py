"""Functions for all ranks of a run: join, divide the microbatches of a step, get values from rank 0.

Imports no torch, so that a single process can reject wrong settings without importing it.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.launcher import HERE
from reconverge.base.terminal import counted

Value = TypeVar("Value")


@contextmanager
def joined(minutes: float, deterministic: bool) -> Iterator[None]:
    """Join all ranks of the run in one group; a single process needs none. `minutes`: how long to wait for
    other ranks. `deterministic`: as in libraries.set_modes.

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
            "a c10d rendezvous, because with a static one the ranks cannot meet again after a restart",
            "torchrun --standalone on one machine; --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT on several"
            " machines; or --max-restarts=0",
        )
    from reconverge.distributed import group

    with group.joined(minutes, deterministic), group.losses_named():
        yield


@contextmanager
def losses_named() -> Iterator[None]:
    """Use it around code that needs all ranks: if some are lost, the error becomes a Stop(LOST) with them."""
    if HERE.size == 1:
        yield
        return
    from reconverge.distributed import group

    with group.losses_named():
        yield


@contextmanager
def faults_named(step: Callable[[], int]) -> Iterator[None]:
    """Use it around a training: if a GPU fails or memory ends, the error becomes a Stop that also says on
    which host and GPU, and after how many steps, which `step` returns.
    """
    try:
        yield
    except RuntimeError as error:
        stop = explain(error)
        if stop is None:
            raise
        code, given, allowed, change = stop.args
        where = ", ".join([f"host {socket.gethostname()}", *_gpu(), f"after step {step()}"])
        raise Stop(code, f"{given} ({where})", allowed, change) from error


def _gpu() -> list[str]:
    """The GPU of this process by number and UUID, if it has one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    try:
        device = torch.cuda.current_device()
        return [f"GPU {device}: GPU-{torch.cuda.get_device_properties(device).uuid}"]
    except RuntimeError:
        return ["a GPU that says nothing any more"]


def from_rank_0(function: Callable[[], Value]) -> Value:
    """Call `function` only on rank 0, and return its result on every rank. Its Stop stops all ranks."""
    if HERE.size == 1:
        return function()
    from reconverge.distributed import group

    return group.from_rank_0(function)


def rank_0_first(function: Callable[[], Value]) -> Value:
    """Call `function` on rank 0, and then on the other ranks, which can use a cache that rank 0 has written.

    A Stop on rank 0 stops all ranks.
    """
    found: list[Value] = []
    from_rank_0(lambda: found.append(function()))
    return found[0] if found else function()


def _rendezvous_of_slurm() -> None:
    """Set where the ranks of a Slurm step meet, unless the job's script has set it: on the first host, at a
    port computed from the job's number.
    """
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + (97 * job + step) % 10000))
    if "MASTER_ADDR" not in os.environ:
        listing = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
        os.environ["MASTER_ADDR"] = names[0]
    os.environ |= {"RANK": str(HERE.rank), "WORLD_SIZE": str(HERE.size)}


def _static_rendezvous() -> bool:
    """Whether torchrun uses a static rendezvous. Only its own command line shows that."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return False
    own = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PET_")]
    return not re.search(r"standalone|c10d|etcd", " ".join([*command, *own]), re.IGNORECASE)


# ---- the microbatches of each rank ----


def worlds(microbatches: int, tree: bool) -> list[int]:
    """All possible numbers of ranks. With reduce=tree they are powers of two, so that the block of each rank
    is a subtree.
    """
    sizes = range(1, microbatches + 1)
    return [size for size in sizes if microbatches % size == 0 and not (tree and size & (size - 1))]


def block(microbatches: int, rank: int, ranks: int, tree: bool, images: int | None = None) -> range:
    """The microbatches, from 0..microbatches-1, of `rank`.

    Errors: Stop(USAGE), which suggests a larger batch where it knows the `images` of a microbatch.
    """
    fitting = worlds(microbatches, tree)
    if ranks not in fitting:
        nearest = min(fitting, key=lambda size: abs(size - ranks))
        two = " and are powers of two" if tree else ""
        more = (
            -(-microbatches // max(1, ranks)) * ranks
        )  # the next number of microbatches that they can share
        larger = f", or batch={more * images}" if images and ranks in worlds(more, tree) else ""
        raise Stop(
            Exit.USAGE,
            f"{counted(ranks, 'rank')} for {counted(microbatches, 'microbatch', 'microbatches')} a step"
            + (" with reduce=tree" if tree else ""),
            f"numbers of ranks that divide them{two}: {', '.join(map(str, fitting))}",
            f"{counted(nearest, 'rank')}{larger}; another batch= may need another optim.lr=, and another"
            " microbatch= changes Mixup",
        )
    each = microbatches // ranks
    return range(rank * each, (rank + 1) * each)
