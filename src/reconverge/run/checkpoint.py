"""Saves checkpoints atomically, and verifies them before they are loaded. milestones.py decides when.

checkpoints/step-00001234/ contains one safetensors file for each set of tensors, state.json, and
MANIFEST.json with the size and sha256 of each file, which is written last. No loaded file can run code.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import sha256_of
from reconverge.run import reader
from reconverge.run.reader import checkpoint_of, checkpoints, step_of

FORMAT = "checkpoint-1"


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> dict[str, str]:
    """Write the checkpoint of `step` below `folder`; return the sha256 of each file.

    Errors: Stop(DISK); then older checkpoints are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
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
    new = folder / f".new-{step:08d}"
    try:
        new.mkdir()
        for name, group in tensors.items():
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()},
                new / f"{name}.safetensors",
            )
        (new / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        files: dict[str, dict[str, Any]] = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(new.iterdir())
        }
        for name in files:
            _sync(new / name)
        (new / "MANIFEST.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        _sync(new / "MANIFEST.json")
        _sync(new)
    except Exception as error:  # safetensors raises its own exception type if the disk is full
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError) or "I/O error" in str(error) or "No space" in str(error):
            raise Stop(
                Exit.DISK,
                f"saving step {step} in {folder}: {error}",
                "a writable disk with free space",
                "free some space, then run the same command again to continue from the last good checkpoint",
            ) from error
        raise
    final = checkpoint_of(folder, step)
    if final.exists():  # a damaged checkpoint, which was reported when the run resumed from an older one
        final.rename(folder / f".old-{step:08d}")
    new.rename(final)
    _sync(folder)
    _clean(folder)
    return {name: entry["sha256"] for name, entry in files.items()}


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint (None: there is no checkpoint), and why each newer one was skipped.

    Errors: Stop(DAMAGED) if there are checkpoints, but none is valid.
    """
    skipped = []
    for path in reversed(checkpoints(folder)):
        if fault := verify(path):
            skipped.append(f"{path.name}: {fault}")
        else:
            return path, skipped
    if skipped:
        raise Stop(
            Exit.DAMAGED,
            "all checkpoints are damaged: " + "; ".join(skipped),
            "at least one checkpoint without damage",
            f"restore one from a copy, or remove {folder} to start from the beginning",
        )
    return None, []


def choose(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint at `path`, or the newest valid one of the run at `path`, and why newer ones were
    skipped.

    Errors: Stop(MISSING, DAMAGED).
    """
    if path.parent.name != "checkpoints":
        newest, skipped = newest_valid(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if newest is None:
            raise Stop(
                Exit.MISSING,
                f"{path} has no checkpoint yet",
                "a run that has saved a checkpoint",
                "wait until the run saves one, or start it with a smaller save_every=",
            )
        return newest, skipped
    if fault := verify(path):
        raise Stop(
            Exit.DAMAGED,
            f"{path}: {fault}",
            "a checkpoint without damage",
            f"name another checkpoint, or {path.parent.parent} to use its newest valid one",
        )
    return path, []


def best(run: Path, kind: str) -> tuple[Path, float]:
    """The checkpoint of a run with the best top-1 of its raw or EMA weights (`kind`), and this top-1 in
    percent.

    Errors: Stop(MISSING, DAMAGED).
    """
    evaluated = reader.top1(reader.metrics(run))
    step = reader.best_steps(evaluated).get(kind)
    if step is None:
        raise Stop(
            Exit.MISSING,
            f"the {kind} weights of {run} were never evaluated, so there is no best",
            "a run with at least one evaluation",
            "name the run without :best to take its newest checkpoint",
        )
    path = checkpoint_of(run / "checkpoints", step)
    if not path.exists():
        raise Stop(
            Exit.MISSING,
            f"the {kind} weights of {run} were best after step {step}, but it has no {path.name}",
            "a run that has kept its best checkpoint",
            "restore this checkpoint from a copy, or name another checkpoint",
        )
    return choose(path)[0], evaluated[step][kind]


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint: None if every file has the recorded size and sha256."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, not {FORMAT}"
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_of(file) != entry["sha256"]:
                return f"the sha256 of {name} is not the recorded one"
    except FileNotFoundError:
        return "MANIFEST.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "MANIFEST.json is damaged"
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of each set, on the CPU, and the state of a checkpoint. Verify it before."""
    return {file.stem: load_file(file) for file in path.glob("*.safetensors")}, json.loads(
        (path / "state.json").read_text()
    )


def prune(folder: Path, step: int, keep: int, best: Collection[int]) -> None:
    """Remove all checkpoints except the newest `keep` up to `step` and those of the steps `best`.

    `step` was saved just now. Checkpoints of later steps were found damaged when the run was resumed.
    """
    kept = [step_of(path) for path in checkpoints(folder) if step_of(path) <= step][-keep:]
    for path in checkpoints(folder):
        if step_of(path) not in (*kept, *best):
            path.rename(folder / f".old-{path.name}")  # so that a kill leaves no incomplete checkpoint
    _clean(folder)


def _clean(folder: Path) -> None:
    for path in [*folder.glob(".new-*"), *folder.glob(".old-*")]:
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Force a file or folder to the disk, so that the following rename cannot reach the disk first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
