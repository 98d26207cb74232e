"""The exception whose text is written for the user, and the exit codes of every command."""

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
    BUG = 1  # also: a check found a difference
    USAGE = 2
    DAMAGED = 65  # damaged data or checkpoint
    MISSING = 66  # missing input file or folder
    LOST = 69  # a rank or a node was lost; run the same command again to continue
    NOT_FINITE = 70  # the loss is not finite
    OUT_OF_MEMORY = 71
    IN_USE = 73  # another process uses the run's folder
    DISK = 74  # the disk is full or fails
    PREEMPTED = 75  # stopped by a signal; run the same command again to continue
    PERMISSION = 77
    NOT_COMPARABLE = 78  # configuration, code, data, versions or hardware have changed


class Stop(Exception):
    """Ends the command with `code` and three lines: what was given, what is allowed, what to change."""

    def __init__(self, code: Exit, given: str, allowed: str, change: str):
        super().__init__(code, given, allowed, change)  # all four, so that a data worker can pickle it
        self.code = code
        self.told = False  # another rank, or a file, already shows it to the user

    def __str__(self) -> str:
        _, given, allowed, change = self.args
        return f"  given    {given}\n  allowed  {allowed}\n  change   {change}"


# Memory that ends in torch's allocators, or outside of them in cuBLAS, cuDNN or NCCL.
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|CU(BLAS|DNN|SOLVER|FFT)_\w*ALLOC|CUDA calloc")
# Faults of a GPU and of what connects it. One that is gone from the bus answers with one of the last three.
GPU_FAULTS = re.compile(
    r"uncorrectable (ECC|NVLink) error|unspecified launch failure|launch timed out|hardware stack error"
    r"|hardware error|GPU is lost|device lost|fallen off the bus"
    r"|CUDA error: unknown error|busy or unavailable|no CUDA-capable device"
)
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


def explain(error: BaseException) -> Stop | None:
    """The Stop that explains an exception of Python, Pillow or torch; None for a bug in this code."""
    if isinstance(error, Stop):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stop(
            Exit.PREEMPTED,
            "Ctrl-C",
            "one Ctrl-C, after which train.py finishes its step and saves a checkpoint",
            "run the same command again to continue from the last checkpoint",
        )
    if isinstance(error, PermissionError):
        return Stop(
            Exit.PERMISSION,
            str(error),
            "files that this user may read, and a run folder that this user may write",
            "change the permissions, use another data.root=, or start in another working folder",
        )
    if isinstance(error, FileNotFoundError):
        return Stop(Exit.MISSING, str(error), "files that exist", "correct the path")
    if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
        return Stop(
            Exit.MISSING,
            str(error),
            "a folder where a folder is expected, and a file where a file is expected",
            "correct the path, or move away the file or folder that is there",
        )
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return Stop(
            Exit.DISK,
            str(error),
            "a writable disk with free space",
            "free some space, then run the same command again to continue from the last good checkpoint",
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        # torch raises this error at any point of the main process. While that waits for a batch, torch wraps
        # it in a second error without the name of the signal.
        cause = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error
        said = str(cause).splitlines()[0]
        return Stop(
            Exit.OUT_OF_MEMORY if "Killed" in said else Exit.BUG,
            f"a data worker died: {said}",
            "data workers that have enough memory and shared memory, and that nobody kills",
            "run the same command again; if memory was short, with fewer workers=",
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        return Stop(
            Exit.OUT_OF_MEMORY,
            _line(error, NO_MEMORY) or "out of memory",
            "a forward pass of one microbatch that fits the device's memory",
            "checkpointing=true (stores about half the activations), precision=bf16, or a smaller"
            " forward_images=; a smaller microbatch= also helps, but it changes Mixup and needs a new run",
        )
    if isinstance(error, RuntimeError) and GPU_FAULTS.search(str(error)):
        return Stop(
            Exit.LOST,
            f"the GPU failed: {_line(error, GPU_FAULTS)}",
            "a GPU that answers and whose memory has no uncorrectable errors",
            "run the same command again to continue from the last checkpoint; if the same GPU fails again,"
            " use another one: `dmesg | grep Xid` and `nvidia-smi -q -d ECC` say what is wrong with it",
        )
    return None


def _line(error: BaseException, what: re.Pattern[str]) -> str:
    """The first line of an error's text, and then the first line that has `what`, if it is another one."""
    lines = [line.strip() for line in str(error).splitlines()]
    return ": ".join(dict.fromkeys([*lines[:1], *filter(what.search, lines)][:2]))


def reason(error: Exception) -> str:
    """The text of a library's error, without the address of a BytesIO object."""
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")


def exit_code(job: Callable[[], int]) -> int:
    """Run a command, print the error that stopped it, and return the exit code.

    The code is also written to the file that the environment variable RECONVERGE_EXIT_FILE names, if any.
    """
    streams.secure()
    try:
        code = job()
    except (Exception, KeyboardInterrupt) as error:
        code = ended(error)
    else:
        _leave_code(code)
    # torchrun restarts workers that end with anything but 0. status.json has the 75, and launch/local.sh
    # returns it.
    return Exit.DONE if code == Exit.PREEMPTED and "TORCHELASTIC_RUN_ID" in os.environ else code


def ended(error: BaseException) -> Exit:
    """Print why the command ends, write its exit code as exit_code() does, and return it."""
    stop = explain(error)
    code = stop.code if stop else Exit.BUG
    if stop is None or code == Exit.LOST:  # the traceback shows what this rank was waiting for
        traceback.print_exception(error)
    if stop and not stop.told:
        print(f"reconverge stopped (exit {code}):\n{stop}", file=sys.stderr, flush=True)
        stop.told = True
    _leave_code(code)
    return code


def _leave_code(code: int) -> None:
    """torchrun itself returns 1 for every failure; launch/local.sh reads the real code from this file."""
    if left := os.environ.get("RECONVERGE_EXIT_FILE"):
        Path(left).write_text(str(int(code)))
