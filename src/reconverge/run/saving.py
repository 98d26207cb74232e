"""Writes checkpoints, atomically and while training goes on; checkpoint.py reads them.

The loop waits only until the tensors are copied into memory of the host, which is kept for the next time. A
thread writes the copy, hashes it on the way, and gives the folder its name when everything is on the disk.
"""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.files import sync
from reconverge.base.terminal import say
from reconverge.run.checkpoint import FORMAT, ours, passing
from reconverge.run.reader import checkpoint_of, checkpoints, step_of

Tensors = Mapping[str, Mapping[str, Tensor]]  # by set (model, ema, optimizer) and name

# Names of types in safetensors, in the order in which its files have them.
TYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
ORDER = list(TYPES)
BLOCK = 1 << 24  # bytes that are written and hashed at a time


class Saver:
    """Saves the checkpoints of a run in a thread, one after the other."""

    def __init__(self, folder: Path):
        """`folder`: the folder checkpoints/ of the run."""
        self._folder = folder
        self._kept: dict[tuple[str, str], Tensor] = {}  # copies of the tensors, by set and name
        self._side: Any = None  # the CUDA stream that copies
        self._thread: threading.Thread | None = None
        self._trouble: Exception | None = None
        self._saved = 0

    def begin(
        self, step: int, tensors: Tensors, state: dict[str, Any], keep: int, best: Collection[int]
    ) -> None:
        """Start to save the checkpoint of `step`, after the one before is finished. Then all checkpoints are
        removed except the newest `keep` and those of the steps `best`. When this returns, the tensors may
        change.

        Errors: Stop(DISK), also of the one before.
        """
        self.wait()
        copies, arrived = self._copy(tensors)
        best = list(best)

        def work() -> None:
            try:
                arrived()
                save(self._folder, step, copies, state)
                prune(self._folder, step, keep, best)
                self._saved = step
            except Exception as error:  # the loop raises it
                self._trouble = error

        self._thread = threading.Thread(target=work, daemon=True, name="save")
        self._thread.start()

    def saved(self) -> int:
        """The newest step whose checkpoint is complete; 0 if there is none. Errors: Stop(DISK) if saving
        failed since the last call.
        """
        if self._trouble:
            trouble, self._trouble = self._trouble, None
            raise trouble
        return self._saved

    def wait(self) -> int:
        """Wait until nothing is being saved; then as `saved`."""
        if self._thread:
            self._thread.join()
            self._thread = None
        return self.saved()

    def close(self) -> None:
        """At the end of the run, however it ends: finish what was begun, and name what failed."""
        try:
            self.wait()
        except Exception as error:
            stop = explain(error)
            say(f"a checkpoint was not saved: {stop.args[1] if stop else repr(error)}")

    def _copy(self, tensors: Tensors) -> tuple[Tensors, Callable[[], object]]:
        """Copies in memory of the host, and a function that waits until they have arrived. Only the device
        waits for the copies, before it changes the tensors again.
        """
        devices = {tensor.device for group in tensors.values() for tensor in group.values()}
        gpu = next((device for device in devices if device.type == "cuda"), None)
        if gpu is not None:
            self._side = self._side or torch.cuda.Stream(gpu)
            self._side.wait_stream(torch.cuda.current_stream(gpu))
        with torch.no_grad(), torch.cuda.stream(self._side) if gpu is not None else nullcontext():
            copies = {
                name: {key: self._copied(name, key, tensor) for key, tensor in group.items()}
                for name, group in tensors.items()
            }
        if gpu is None:
            return copies, lambda: None
        torch.cuda.current_stream(gpu).wait_stream(self._side)
        return copies, self._side.record_event().synchronize

    def _copied(self, name: str, key: str, tensor: Tensor) -> Tensor:
        copy = self._kept.get((name, key))
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._kept[name, key] = copy
        return copy.copy_(tensor, non_blocking=True)


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> dict[str, str]:
    """Write the checkpoint of `step` below `folder`, from tensors on the CPU; return the sha256 of each file.

    Errors: Stop(DISK); then older checkpoints are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    _refuse_full_disk(folder, tensors)
    new = folder / f".new-{step:08d}-{uuid.uuid4().hex}"
    try:
        new.mkdir()
        files = {
            f"{name}.safetensors": write(new / f"{name}.safetensors", group)
            for name, group in tensors.items()
        }
        files["state.json"] = _written(new / "state.json", json.dumps({"step": step, **state}, indent=1))
        manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
        _written(new / "MANIFEST.json", json.dumps(manifest, indent=1))
        sync(new)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise Stop(
            Exit.DISK,
            f"saving step {step} in {folder}: {error}",
            "a writable disk with free space",
            "free some space, then run the same command again to continue from the last good checkpoint",
        ) from error
    except Exception:
        shutil.rmtree(new, ignore_errors=True)
        raise
    final = checkpoint_of(folder, step)
    if final.exists():  # a damaged checkpoint, which was reported when the run resumed from an older one
        final.rename(folder / f".old-{step:08d}-{uuid.uuid4().hex}")
    new.rename(final)
    sync(folder)
    _clean(folder)
    return {name: entry["sha256"] for name, entry in files.items()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors of the CPU as a safetensors file, the bytes of safetensors' own save_file, without a copy
    in memory; return its size ("bytes") and "sha256".
    """
    names = sorted(tensors, key=lambda name: (ORDER.index(tensors[name].dtype), name))
    table, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return _on_disk(
        path, len(header).to_bytes(8, "little") + header, *(_bytes(tensors[name]) for name in names)
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _written(path: Path, text: str) -> dict[str, Any]:
    return _on_disk(path, text.encode())


def _on_disk(path: Path, *parts: bytes | memoryview) -> dict[str, Any]:
    """Write and sync a new file. Writing and hashing of blocks let other threads run."""
    digest = sha256()
    with open(path, "xb", buffering=0) as file:
        for part in parts:
            rest = memoryview(part)
            while rest:
                count = file.write(rest[:BLOCK])
                digest.update(rest[:count])
                rest = rest[count:]
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def prune(folder: Path, step: int, keep: int, best: Collection[int]) -> None:
    """Remove all checkpoints except the newest `keep` up to `step` and those of the steps `best`.

    `step` was saved just now. Checkpoints of later steps were found damaged when the run was resumed.
    """
    kept = [step_of(path) for path in checkpoints(folder) if step_of(path) <= step][-keep:]
    for path in checkpoints(folder):
        if step_of(path) not in (*kept, *best) and ours(path):
            path.rename(
                folder / f".old-{path.name}-{uuid.uuid4().hex}"
            )  # so that a kill leaves no incomplete checkpoint
    _clean(folder)


def _clean(folder: Path) -> None:
    """Remove what a kill left: folders with our names that hold nothing but files of a checkpoint."""
    for path in passing(folder):
        shutil.rmtree(path)


def _refuse_full_disk(folder: Path, tensors: Tensors) -> None:
    """Errors: Stop(DISK)."""
    needed = sum(
        tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values()
    )
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise Stop(
            Exit.DISK,
            f"{free / 1e6:.0f} MB free in {folder} for a checkpoint of {needed / 1e6:.0f} MB",
            "free space for one more checkpoint than keep=",
            "free some space, then run the same command again to continue; or use keep=1",
        )
