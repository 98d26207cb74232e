"""What all ranks of a run do together, before and beside torch: meet, share the microbatches of a step, ask
rank 0. Imports no torch: a lone process, a world of one, reaches its refusals without it.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from reconverge.base.errors import Exit, Stop
from reconverge.base.launcher import HERE
from reconverge.base.terminal import counted

Value = TypeVar("Value")


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
    from reconverge.distributed import group

    with group.joined(minutes), group.losses_named():
        yield


@contextmanager
def losses_named() -> Iterator[None]:
    """Around what needs all ranks: when some are lost, the error becomes a Stop(LOST) that names them."""
    if HERE.size == 1:
        yield
        return
    from reconverge.distributed import group

    with group.losses_named():
        yield


def from_rank_0(function: Callable[[], Value]) -> Value:
    """What `function` gives on rank 0, which alone calls it, on every rank; a Stop of its stops them all."""
    if HERE.size == 1:
        return function()
    from reconverge.distributed import group

    return group.from_rank_0(function)


def rank_0_first(function: Callable[[], Value]) -> Value:
    """Every rank calls it, and rank 0 before the others, who find in a cache what it left there.

    Its Stop stops them all.
    """
    found: list[Value] = []
    from_rank_0(lambda: found.append(function()))
    return found[0] if found else function()


def _rendezvous_of_slurm() -> None:
    """Where the ranks of a Slurm step meet, unless the job's script says so: on its first host, at a port
    made from its number.
    """
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + (97 * job + step) % 10000))
    if "MASTER_ADDR" not in os.environ:
        listing = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
        os.environ["MASTER_ADDR"] = names[0]
    os.environ |= {"RANK": str(HERE.rank), "WORLD_SIZE": str(HERE.size)}


def _static_rendezvous() -> bool:
    """torchrun does not tell its workers; its own command line does."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return False
    own = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PET_")]
    return not re.search(r"standalone|c10d|etcd", " ".join([*command, *own]), re.IGNORECASE)


# ---- which microbatches of a step are whose ----


def worlds(microbatches: int, tree: bool) -> list[int]:
    """Every number of ranks that can carry a step; with reduce=tree powers of two, whose blocks are its
    subtrees.
    """
    sizes = range(1, microbatches + 1)
    return [size for size in sizes if microbatches % size == 0 and not (tree and size & (size - 1))]


def block(microbatches: int, rank: int, ranks: int, tree: bool, images: int | None = None) -> range:
    """The numbers, of 0..microbatches-1, that `rank` of `ranks` takes. Errors: Stop(USAGE), which suggests a
    larger batch where it knows the `images` of a microbatch.
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
