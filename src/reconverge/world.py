"""The machine under a run: ranks, device, threads, precision. The only file that says torch.distributed. A
lone process is a world of one.

The ranks of a run are one gloo group, which passes words between hosts; on GPUs, a second one of NCCL adds
gradients.
"""

import ctypes
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xxhash import xxh3_64_hexdigest

from reconverge import environment, ranks
from reconverge.errors import Exit, Stop, explain
from reconverge.signals import told_to_stop

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ANSWER = 5.0  # seconds in which a rank that lives says so, when others are missed
Value = TypeVar("Value")

_store: dist.Store
_timeout: timedelta


# ---- the group, before there is a World: the run's folder is opened by rank 0 for all ----


@contextmanager
def group(minutes: float) -> Iterator[None]:
    """Joins the ranks of this run. Errors: Stop(LOST) if they do not all come."""
    global _store, _timeout
    _timeout = timedelta(minutes=minutes)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_timeout))
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        _store = dist.PrefixStore(_met(store, rank, size, 60 * minutes), store)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("group", _store), rank=rank, world_size=size, timeout=_timeout
        )
    except (RuntimeError, ValueError) as error:
        raise Stop(
            Exit.LOST,
            f"rank {ranks.HERE.rank} of {ranks.HERE.size} did not find the others at"
            f" {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within {minutes:g} minutes:"
            f" {_first_line(error)}",
            "every rank started, and a network between their hosts (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
            " name its interface)",
            "run the same command again; world_timeout= waits longer",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _met(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name that the ranks of this start alone know, once all of them have it. Errors: RuntimeError,
    Stop(PREEMPTED).

    torchrun keeps one store over restarts, and hosts may count these differently: what ranks of an earlier
    start left in it, their addresses above all, must not be taken for that of this one. A name is made from
    what each rank wrote anew, so an old one never fits.
    """
    hellos, names = ([f"{what}/{other}" for other in range(size)] for what in ("hello", "name"))
    store.set(hellos[rank], uuid.uuid4().hex)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if store.check(hellos):
            name = xxh3_64_hexdigest(b"".join(store.multi_get(hellos)))
            store.set(names[rank], name)
            if store.check(names) and set(store.multi_get(names)) == {name.encode()}:
                return name
        if told_to_stop():
            raise Stop(
                Exit.PREEMPTED,
                "a signal, before all ranks had come",
                "nothing was begun",
                "run the same command again",
            )
        time.sleep(0.1)
    raise RuntimeError(
        f"of {size} ranks {sum(store.check([hello]) for hello in hellos)} came, or some of them are of an"
        " earlier start"
    )


@contextmanager
def losses_named() -> Iterator[None]:
    """An error of a collective becomes the Stop of the rank that failed, if one said why, else a Stop(LOST)
    that names who is missing.
    """
    try:
        yield
    except BaseException as error:
        if not _of_a_collective(error):
            _leave_word(error)
            raise
        raise _named(error) from error


def from_rank_0(function: Callable[[], Value]) -> Value:
    """See ranks.from_rank_0."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [function()]
        except Exception as error:
            answer = [explain(error)]
            if answer[0] is None:
                raise
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Stop):
        answer[0].told = dist.get_rank() > 0  # rank 0 tells it
        raise answer[0]
    return answer[0]


def _of_a_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "Timed out waiting", "NCCL", "Connection closed")
    )


def _leave_word(error: BaseException) -> None:
    """For the others, who will miss this rank, why it goes."""
    stop = explain(error)
    args = list(stop.args) if stop else [int(Exit.BUG), repr(error), "no exception", "see its errors/ file"]

    def leave() -> None:
        _store.set(f"left/{dist.get_rank()}", json.dumps(args))
        _await_answers(2.0)  # rank 0 may hold the store: the others must have read it before it ends
        if isinstance(error, Stop) and dist.get_rank() > 0 and _store.check(["left/0"]):
            error.told = json.loads(_store.get("left/0")) == args  # what stops all ranks is said once

    _with_store(leave, 4.0)


def _named(error: BaseException) -> Stop:
    """Who is missing.

    Every rank that lives says so in the store, and those that stopped have left their reason there.
    """
    size = dist.get_world_size()

    def answers() -> tuple[list[int], dict[int, Any]]:
        _store.set(f"here/{dist.get_rank()}", "")
        missing = _await_answers(ANSWER)
        return missing, {
            rank: json.loads(_store.get(f"left/{rank}")) for rank in missing if _store.check([f"left/{rank}"])
        }

    missing, left = _with_store(answers, 2 * ANSWER) or ([], {})
    for rank, (code, given, allowed, change) in sorted(
        left.items(), key=lambda item: item[1][0] == Exit.LOST
    ):
        return Stop(Exit(code), f"rank {rank}: {given}", allowed, change)
    who = (
        f"rank {', '.join(map(str, missing))} of {size}"
        if missing
        else "the rank that holds the store, or the network to it,"
    )
    return Stop(
        Exit.LOST,
        f"{who} was lost: {_first_line(error)}",
        "ranks that answer within world_timeout",
        "run the same command again: it goes on from the last checkpoint; errors/ and the launcher's log may"
        " say why it was lost",
    )


def _with_store(function: Callable[[], Value], seconds: float) -> Value | None:
    """What `function`, which asks the store, gives; None if the store's rank is gone, or a link to it is cut:
    then torch's calls do not return.
    """
    found: list[Value] = []

    def ask() -> None:
        try:
            found.append(function())
        except (RuntimeError, TypeError):
            pass  # nobody is there

    thread = threading.Thread(target=ask, daemon=True, name="store")
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _await_answers(seconds: float) -> list[int]:
    """Ranks that did not say within `seconds` that they live."""
    others, deadline = (
        [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()],
        time.monotonic() + seconds,
    )
    while True:
        missing = [rank for rank in others if not _store.check([f"here/{rank}"])]
        gone = [rank for rank in missing if _store.check([f"left/{rank}"])]
        if len(missing) == len(gone) or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


class World:
    def __init__(self, device: str, precision: str, deterministic: bool):
        """Errors: Stop(USAGE) for a device or precision that this machine lacks."""
        self.rank, self.size, self.local_rank, _, self.launcher = ranks.HERE
        available = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and available == "cpu":
            raise Stop(
                Exit.USAGE,
                "device=cuda, and torch sees no GPU",
                "cpu, or a GPU with a driver that torch can use",
                "device=cpu",
            )
        self.device = torch.device(available if device == "auto" else device)
        self._of_gradients: Any = None  # None: the one group of all
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            self.device = torch.device("cuda", self._own_gpu())
            torch.cuda.set_device(self.device)
            if self.size > 1:  # later than the hosts', which can name the missing rank
                self._of_gradients = dist.new_group(backend="nccl", timeout=2 * _timeout)
        self.precision = precision
        if precision == "tf32" and (self.device.type == "cpu" or torch.cuda.get_device_capability() < (8, 0)):
            raise Stop(
                Exit.USAGE,
                f"precision=tf32 on {self.hardware()}",
                "fp32, bf16, fp16; tf32 on an NVIDIA GPU since A100",
                "precision=fp32",
            )
        # Convolutions of torch take TF32 by default: published is fp32, so say which.
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        self.deterministic = deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time
        torch.backends.cudnn.benchmark = not deterministic

    def _own_gpu(self) -> int:
        """The GPU of this rank, whether its launcher shows each task one or all of the node's.

        Errors: Stop(USAGE).
        """
        visible = torch.cuda.device_count()
        if visible > 1 and self.local_rank >= visible:
            raise Stop(
                Exit.USAGE,
                f"rank {self.rank} is number {self.local_rank} on its host, and {visible} GPUs are visible",
                "a rank a GPU",
                f"torchrun --nproc-per-node={visible}, or srun with as many tasks a node as GPUs",
            )
        return self.local_rank if visible > 1 else 0

    def set_threads(self, threads: int) -> None:
        """Another number of threads gives other bits."""
        self.threads = threads
        torch.set_num_threads(threads)

    # ---- words between hosts, through their memory ----

    def any(self, flag: bool) -> bool:
        """Whether it is raised on any rank."""
        return bool(self.gather(torch.tensor([float(flag)])).any())

    def gather(self, values: Tensor) -> Tensor:
        """Of each rank its `values`, as one tensor (ranks, *shape) on the host."""
        mine = values.detach().cpu().contiguous()
        if self.size == 1:
            return mine[None]
        gathered = torch.empty(self.size, *mine.shape, dtype=mine.dtype)
        dist.all_gather(list(gathered), mine)
        return gathered

    def gather_objects(self, value: Value) -> list[Value]:
        """Of each rank its `value`, in the order of ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, what: str, value: Any) -> Any:
        """`value`, if all ranks have the same. Errors: Stop(NOT_COMPARABLE) with the ranks that differ."""
        values = self.gather_objects(value)
        others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise Stop(
                Exit.NOT_COMPARABLE,
                f"{what}: rank 0 has {values[0]}, and rank {', '.join(others)} {values[int(others[0])]}",
                "the same on every rank",
                f"start all of them with the same {what}",
            )
        return value

    def rank_0_first(self, function: Callable[[], Value]) -> Value:
        """Every rank calls it, and rank 0 before the others, who find in a cache what it left there.

        Its Stop stops them all.
        """
        found: list[Value] = []
        ranks.from_rank_0(lambda: found.append(function()))
        return found[0] if found else function()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """What they hold on rank 0, to every rank."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()  # of channels_last a copy
            dist.broadcast(values, src=0, group=self._of_gradients)
            tensor.detach().copy_(values)

    # ---- gradients, through the devices ----

    def add_up(self, values: Tensor) -> Callable[[], object]:
        """Begin to add `values` of all ranks, in place; call what it returns before they are read."""
        if self.size == 1:
            return lambda: None
        return dist.all_reduce(values, group=self._of_gradients, async_op=True).wait

    def exchange(self, mine: Tensor, partner: int, into: Tensor) -> None:
        """Send `mine` to the rank `partner`, and receive its own."""
        both = [
            dist.P2POp(dist.isend, mine, partner, self._of_gradients),
            dist.P2POp(dist.irecv, into, partner, self._of_gradients),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    # ---- the device ----

    def place(self, model: nn.Module, channels_last: bool) -> nn.Module:
        """The model on the device, its weights in the memory format that the images will have."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16; does nothing for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def tracer(self, steps: int, path: Path) -> torch.profiler.profile | None:
        """A context that traces `steps` steps after the second into a file for ui.perfetto.dev, fewer if it
        ends before.

        Its step() is to be called after each. None for 0, and on other ranks than 0.
        """
        if steps == 0 or self.rank > 0:
            return None
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        return torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
        )

    def hardware(self) -> str:
        """What decides the bits beside versions and threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{environment.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def keep_freed_memory() -> None:
    """Let malloc keep large blocks that are freed, for the next step's tensors.

    Mapped anew each time, their pages are zeroed and faulted in one by one: 8 to 10 % of a training step on a
    CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def default_workers(device: torch.device) -> int:
    """On a GPU every core but the main process's, 16 at most; on a CPU one, for there the model takes the
    time.
    """
    return min(16 if device.type == "cuda" else 1, ranks.cores() - 1)


def default_threads(device: torch.device, workers: int) -> int:
    """Threads and workers together never take more than the cores."""
    return 1 if device.type == "cuda" else max(1, ranks.cores() - workers)
