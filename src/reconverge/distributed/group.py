"""The gloo group of all ranks, for messages between hosts. If ranks are lost, it finds out which, and why.

The group exists before the World, because rank 0 opens the run's folder for all ranks.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from xxhash import xxh3_64_hexdigest

from reconverge.base.errors import Exit, Stop, ended, explain
from reconverge.base.launcher import HERE
from reconverge.base.signals import told_to_stop
from reconverge.distributed import libraries

ANSWER = 5.0  # seconds in which live ranks answer when a rank seems to be lost
ABORT = 5.0  # seconds for NCCL to give up its operations
END = 60.0  # seconds in which a rank ends that has failed or lost another one
Value = TypeVar("Value")

_store: dist.Store
_timeout: timedelta
_of_gpus: Any = None  # the group with NCCL
_parted = False  # from the other ranks


@contextmanager
def joined(minutes: float, deterministic: bool) -> Iterator[None]:
    """Join the ranks of this run, in deterministic mode or not. Errors: Stop(LOST) if some ranks do not
    arrive in time.
    """
    global _store, _timeout
    _timeout = timedelta(minutes=minutes)
    libraries.set_modes(deterministic)
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
            f"rank {HERE.rank} of {HERE.size} did not find the other ranks at"
            f" {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within {minutes:g} minutes:"
            f" {_first_line(error)}",
            "all ranks started, and a network between their hosts (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            " select the network interface)",
            "run the same command again, with a larger world_timeout= (minutes) if ranks start slowly",
        ) from error
    yield
    dist.destroy_process_group()  # after an error it would wait for ranks that may be lost: see _part


def _met(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """Wait for all ranks, and return a name for this start that is the same on all of them. Errors:
    RuntimeError, Stop(PREEMPTED).

    torchrun keeps one store over restarts, and hosts may count restarts differently. Values of an earlier
    start in the store, such as addresses, must not be used in this start. The name is a hash of new random
    values from all ranks, so it is different in every start.
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
                "a signal arrived before all ranks had started",
                "no signal until all ranks have started; the run was not changed",
                "run the same command again",
            )
        time.sleep(0.1)
    raise RuntimeError(
        f"{sum(store.check([hello]) for hello in hellos)} of {size} ranks arrived, or some of them belong to"
        " an earlier start"
    )


@contextmanager
def losses_named() -> Iterator[None]:
    """Replace an error of a collective operation by the Stop of the rank that failed, if it left one, and
    else by a Stop(LOST) with the missing ranks.
    """
    try:
        yield
    except BaseException as error:
        if not _of_a_collective(error):
            _leave_word(error)
            _part(error)
            raise
        stop = _named(error)
        _part(stop)
        raise stop from error


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
        answer[0].told = dist.get_rank() > 0  # rank 0 prints it
        raise answer[0]
    return answer[0]


def _of_a_collective(error: BaseException) -> bool:
    if explain(error):  # such as NCCL's, if the memory of this GPU is full
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "Timed out waiting", "NCCL", "Connection closed")
    )


def _leave_word(error: BaseException) -> None:
    """Leave the reason why this rank stops in the store, for the other ranks."""
    stop = explain(error)
    args = (
        list(stop.args)
        if stop
        else [
            int(Exit.BUG),
            repr(error),
            "no exception",
            "read the traceback in the errors/ folder of the run",
        ]
    )

    def leave() -> None:
        _store.set(f"left/{dist.get_rank()}", json.dumps(args))
        _await_answers(2.0)
        if dist.get_rank() == 0:
            _await_readers(2.0)
            return
        if isinstance(error, Stop) and _store.check(["left/0"]):
            error.told = json.loads(_store.get("left/0")) == args  # print once what stops all ranks
        _store.set(f"read/{dist.get_rank()}", "")

    _with_store(leave, 6.0)


def _named(error: BaseException) -> Stop:
    """The Stop that names the missing ranks.

    Every live rank reports itself in the store, and ranks that stopped have left their reason there.
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
        else "the rank that serves the store, or the network to it,"
    )
    return Stop(
        Exit.LOST,
        f"{who} was lost: {_first_line(error)}",
        "ranks that answer within world_timeout",
        "run the same command again to continue from the last checkpoint; the run's errors/ folder and the"
        " launcher's log may show why the rank was lost",
    )


def _part(error: BaseException) -> None:
    """Leave the other ranks because of `error`. This process ends within seconds, whatever still waits.

    A collective operation without all of its ranks never ends on a GPU, and whatever waits for the device
    waits for it. So NCCL's group is aborted, which also may not return (github.com/NVIDIA/nccl/issues/1013).
    """
    global _parted
    if _parted:
        return
    _parted = True
    last = threading.Timer(END, lambda: os._exit(ended(error)))
    last.daemon = True
    last.start()
    if _of_gpus is not None:
        thread = threading.Thread(target=_of_gpus.abort, daemon=True, name="abort")
        thread.start()
        thread.join(ABORT)


def _with_store(function: Callable[[], Value], seconds: float) -> Value | None:
    """The result of `function`, which reads the store. None if the store cannot be reached: torch's calls may
    then never return, so they run in a thread.
    """
    found: list[Value] = []

    def ask() -> None:
        try:
            found.append(function())
        except (RuntimeError, TypeError):
            pass  # the store is gone

    thread = threading.Thread(target=ask, daemon=True, name="store")
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _await_answers(seconds: float) -> list[int]:
    """Ranks that did not report themselves within `seconds`."""
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


def _await_readers(seconds: float) -> None:
    """Rank 0 may serve the store, so the other ranks that stop must have read it before rank 0 ends."""
    stopping = [rank for rank in range(dist.get_world_size()) if _store.check([f"left/{rank}"])]
    deadline = time.monotonic() + seconds
    while not all(_store.check([f"read/{rank}"]) for rank in stopping if rank > 0):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def of_gpus() -> Any:
    """A second group, with NCCL. Its timeout is longer than that of gloo, which can name missing ranks."""
    global _of_gpus
    _of_gpus = dist.new_group(backend="nccl", timeout=2 * _timeout)
    return _of_gpus
