"""The one exception that a person is meant to read, and the exit codes of every command."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from reconverge.base import streams


class Exit(IntEnum):
    DONE = 0
    BUG = 1  # or: a check found a difference
    USAGE = 2
    DAMAGED = 65  # data or checkpoint
    MISSING = 66
    LOST = 69  # a rank or a node; run again
    NOT_FINITE = 70
    OUT_OF_MEMORY = 71
    IN_USE = 73
    DISK = 74  # full, or failing
    PREEMPTED = 75  # run again to go on
    PERMISSION = 77
    NOT_COMPARABLE = 78  # changed configuration, code, data or versions


class Stop(Exception):
    """Ends the command with `code` and three lines: what was given, what is allowed, what to change."""

    def __init__(self, code: Exit, given: str, allowed: str, change: str):
        super().__init__(code, given, allowed, change)  # all of them, so that it can cross from a data worker
        self.code = code
        self.told = False  # where a person reads it: by another rank, or in a file

    def __str__(self) -> str:
        _, given, allowed, change = self.args
        return f"  given    {given}\n  allowed  {allowed}\n  change   {change}"


DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


def explain(error: BaseException) -> Stop | None:
    """The Stop that an exception of Python, Pillow or torch stands for; None for a bug of ours."""
    if isinstance(error, Stop):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stop(
            Exit.PREEMPTED,
            "Ctrl-C",
            "what was saved before stays (train.py finishes and saves its step after the first one)",
            "run the same command again: it goes on from there",
        )
    if isinstance(error, PermissionError):
        return Stop(
            Exit.PERMISSION,
            str(error),
            "files that this user may read, and a run folder that it may write",
            "the permissions, or data.root=, or the working folder",
        )
    if isinstance(error, FileNotFoundError):
        return Stop(Exit.MISSING, str(error), "files that exist", "the path")
    if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
        return Stop(
            Exit.MISSING,
            str(error),
            "a folder where a folder is wanted, a file where a file is",
            "the path, or what stands in its way",
        )
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return Stop(
            Exit.DISK,
            str(error),
            "a disk with free space that can be written",
            "free some space and run the same command again: the last good checkpoint is kept",
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        # Torch raises it wherever the main process is just then: while it waits for a batch, as the cause of
        # another that no longer tells the signal.
        cause = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error
        said = str(cause).splitlines()[0]
        return Stop(
            Exit.OUT_OF_MEMORY if "Killed" in said else Exit.BUG,
            f"a data worker died: {said}",
            "workers with enough memory, shared memory and no signals",
            "run the same command again; fewer workers= if memory was short",
        )
    # torch.OutOfMemoryError on a GPU; a plain RuntimeError from torch's CPU allocator.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return Stop(
            Exit.OUT_OF_MEMORY,
            str(error).splitlines()[0] if str(error) else "out of memory",
            "a forward pass of one microbatch that fits the device's memory",
            "checkpointing=true (stores about half the activations), or precision=bf16; "
            "a smaller microbatch= changes Mixup and needs a run of its own",
        )
    return None


def reason(error: Exception) -> str:
    """What a library said, without the address of the object it said it of."""
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")


def exit_code(job: Callable[[], int]) -> int:
    """Run a command; print what stopped it and return the exit code, which is also left in the file
    RECONVERGE_EXIT_FILE, if it names one.
    """
    streams.secure()
    try:
        code = job()
    except (Exception, KeyboardInterrupt) as error:
        stop = explain(error)
        code = stop.code if stop else Exit.BUG
        if stop is None or code == Exit.LOST:  # where it stood says what it waited for
            traceback.print_exc()
        if stop and not stop.told:
            print(f"reconverge stopped (exit {code}):\n{stop}", file=sys.stderr)
    if left := os.environ.get(
        "RECONVERGE_EXIT_FILE"
    ):  # torchrun makes 1 of every failure: launch/local.sh reads it here
        Path(left).write_text(str(int(code)))
    # torchrun starts workers again that end with anything but 0. status.json has the 75, and launch/local.sh
    # returns it.
    return Exit.DONE if code == Exit.PREEMPTED and "TORCHELASTIC_RUN_ID" in os.environ else code
