"""Checkpoints: saved whole or not at all, verified before they are believed. How, not when.

checkpoints/step-00001234/ holds one safetensors file a set of tensors, state.json, and MANIFEST.json, written
last, with the size and sha256 of each. Nothing that is loaded can run code.
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
from reconverge.run.reader import checkpoint_of, checkpoints, step_of

FORMAT = "checkpoint-1"


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> dict[str, str]:
    """Write checkpoints of `step` below `folder`; return the sha256 of each file.

    Errors: Stop(DISK), and the old ones are kept.
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
            f"{free / 1e6:.0f} MB free for a checkpoint of {needed / 1e6:.0f} MB in {folder}",
            "room for one more checkpoint than are kept",
            "free some space and run the same command again; or keep=1",
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
    except Exception as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError) or "I/O error" in str(error) or "No space" in str(error):
            raise Stop(
                Exit.DISK,
                f"saving step {step} in {folder}: {error}",
                "a disk with room that can be written",
                "free some space and run the same command again: the last good checkpoint is kept",
            ) from error
        raise
    final = checkpoint_of(folder, step)
    if final.exists():  # damaged, and named when the run was resumed from an older one
        final.rename(folder / f".old-{step:08d}")
    new.rename(final)
    _sync(folder)
    _clean(folder)
    return {name: entry["sha256"] for name, entry in files.items()}


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None: there is none at all), and why each newer one was skipped.

    Errors: Stop(DAMAGED) if there are some and all are bad.
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
            "; ".join(skipped),
            "at least one checkpoint that verifies",
            f"restore one, or remove {folder} to start from step 0",
        )
    return None, []


def choose(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint at `path`, or the newest valid one of the run there, and why newer ones were skipped.

    Errors: Stop(MISSING, DAMAGED).
    """
    if path.parent.name != "checkpoints":
        newest, skipped = newest_valid(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if newest is None:
            raise Stop(
                Exit.MISSING,
                f"{path} has no checkpoint yet",
                "a run that has saved one",
                "save_every=, or wait",
            )
        return newest, skipped
    if fault := verify(path):
        raise Stop(
            Exit.DAMAGED,
            f"{path}: {fault}",
            "a checkpoint that verifies",
            f"another checkpoint; {path.parent.parent} takes the newest valid one",
        )
    return path, []


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint: None if every file has the recorded size and sha256."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT:
            return f"of format {manifest['format']}, not {FORMAT}"
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} has another sha256 than recorded"
    except FileNotFoundError:
        return "MANIFEST.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "MANIFEST.json is damaged"
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by set, on the CPU, and the state of a checkpoint that was verified."""
    return {file.stem: load_file(file) for file in path.glob("*.safetensors")}, json.loads(
        (path / "state.json").read_text()
    )


def prune(folder: Path, step: int, keep: int, best: Collection[int]) -> None:
    """Remove all but the newest `keep` checkpoints up to `step` and those of the steps `best`.

    Newer ones than `step`, which was saved just now, are those that were found damaged when the run was
    resumed.
    """
    kept = [step_of(path) for path in checkpoints(folder) if step_of(path) <= step][-keep:]
    for path in checkpoints(folder):
        if step_of(path) not in (*kept, *best):
            path.rename(folder / f".old-{path.name}")  # so that a kill leaves no half of one
    _clean(folder)


def _clean(folder: Path) -> None:
    for path in [*folder.glob(".new-*"), *folder.glob(".old-*")]:
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Force a file or folder to the disk: a rename must not overtake what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
