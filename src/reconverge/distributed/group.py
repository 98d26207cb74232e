"""The ranks of a run as one gloo group, which passes words between hosts; when some are lost, who and why.

There is a group before there is a World: rank 0 opens the run's folder for all.
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

from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.launcher import HERE
from reconverge.base.signals import told_to_stop

ANSWER = 5.0  # seconds in which a rank that lives says so, when others are missed
Value = TypeVar("Value")

_store: dist.Store
_timeout: timedelta


@contextmanager
def joined(minutes: float) -> Iterator[None]:
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
            f"rank {HERE.rank} of {HERE.size} did not find the others at"
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


def of_gpus() -> Any:
    """A second group, of NCCL. It waits longer than the hosts' group, which can name the missing rank."""
    return dist.new_group(backend="nccl", timeout=2 * _timeout)
