"""Reads checkpoints, which saving.py writes, and verifies them before they are loaded.

checkpoints/step-00001234/ contains one safetensors file for each set of tensors, state.json, and
MANIFEST.json with the size and sha256 of each file, which is written last. No loaded file can run code, and
no tensor is copied into a model or an optimizer before all of them were held against it (`hold`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import no_plain_file, read_text, sha256_of
from reconverge.run import reader
from reconverge.run.reader import checkpoint_of, checkpoints, step_of

FORMAT = "checkpoint-1"
NEEDED = ("model.safetensors", "state.json")  # every checkpoint has them
FILES = re.compile(r"\w+\.safetensors|state\.json")  # and nothing else beside its manifest
# Folders that a kill may leave in checkpoints/; earlier versions gave them names without the last part.
PASSING = re.compile(r"\.(new|old)-(step-)?\d{8,}(-[0-9a-f]{32})?")


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
    """The checkpoint of a run with the best score of its raw or EMA weights (`kind`), and this score (top-1
    or mIoU) in percent.

    Errors: Stop(MISSING, DAMAGED).
    """
    evaluated = reader.scores(reader.metrics(run))
    step = reader.best_steps(evaluated).get(kind)
    if step is None:
        raise Stop(
            Exit.MISSING,
            f"the {kind} weights of {run} were never evaluated, so there is no best",
            "a run with at least one evaluation",
            "leave out :best or --best to take its newest checkpoint",
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
    """What is wrong with a checkpoint: None if it has exactly the files of its manifest, each with the
    recorded size and sha256, and what it says of its step is its name.
    """
    try:
        manifest = json.loads(read_text(path / "MANIFEST.json"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, not {FORMAT}"
        recorded = dict(manifest["files"])
        for name in recorded:
            if not FILES.fullmatch(name):
                return f"MANIFEST.json lists {name!r}, which is no file of a checkpoint"
        there = {file.name for file in path.iterdir() if FILES.fullmatch(file.name)}
        for name in sorted({*there, *NEEDED} - recorded.keys()):
            return f"MANIFEST.json leaves out {name}"
        for name, entry in recorded.items():
            file = path / name
            if file.is_symlink() or not file.is_file():
                return f"{name} is missing" if not file.is_symlink() else f"{name} is a link"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_of(file) != entry["sha256"]:
                return f"the sha256 of {name} is not the recorded one"
        if (said := numbers(path)["step"]) != step_of(path):
            return f"state.json is of step {said}"
    except FileNotFoundError:
        return "MANIFEST.json is missing"
    except Stop as stop:
        return str(stop.args[1])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "MANIFEST.json is damaged"
    return None


def numbers(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint: its step, and the state of the loss scale. Errors: Stop(DAMAGED)."""
    try:
        found = json.loads(read_text(path / "state.json"))
        if type(found["step"]) is not int:
            raise ValueError("its step is no whole number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(f"{path / 'state.json'}: {error!r}") from None
    return found


def tensors_of(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one set, on the CPU. Verify the checkpoint before. Errors: Stop(DAMAGED)."""
    return load_tensors(path / f"{name}.safetensors")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Errors: Stop(DAMAGED), FileNotFoundError."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise no_plain_file(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise damaged(f"{path}: {str(error).partition(chr(10))[0]}") from None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of each set, on the CPU, and the state of a checkpoint. Verify it before.

    Errors: Stop(DAMAGED).
    """
    sets = [file.stem for file in sorted(path.glob("*.safetensors"))]
    return {name: tensors_of(path, name) for name in sets}, numbers(path)


def hold(where: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Hold tensors that were read against those that they are for, before anything is copied: names complete
    and none besides, shapes, dtypes, and finite values.

    Errors: Stop(DAMAGED). Native code reads what it is given without a second look.
    """
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} is not one of its tensors" for name in tensors if name not in wanted]
    for name, tensor in tensors.items():
        if name not in wanted:
            continue
        shape, dtype = wanted[name].shape, wanted[name].dtype
        if tensor.shape != shape:
            faults.append(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
        elif tensor.dtype != dtype:
            faults.append(f"{name} has the type {tensor.dtype}, not {dtype}")
        elif not finite(tensor):
            faults.append(f"{name} has values that are not finite")
    if faults:
        more = f", and {len(faults) - 3} more faults" if len(faults) > 3 else ""
        raise damaged(f"{where}: {'; '.join(faults[:3])}{more}")


def finite(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def damaged(given: str) -> Stop:
    return Stop(
        Exit.DAMAGED,
        given,
        "the file as the run wrote it: each tensor of its model and optimizer, with its shape, its type and"
        " finite values",
        "restore the checkpoint from a copy, or remove its folder to use the one before it",
    )


def passing(folder: Path) -> list[Path]:
    """What a kill left in checkpoints/: folders with our names and nothing but files of a checkpoint."""
    found = [*folder.glob(".new-*"), *folder.glob(".old-*")]
    return [path for path in found if PASSING.fullmatch(path.name) and ours(path)]


def ours(path: Path) -> bool:
    """Whether a folder holds nothing but files of a checkpoint."""
    return (
        not path.is_symlink()
        and path.is_dir()
        and all(FILES.fullmatch(file.name) or file.name == "MANIFEST.json" for file in path.iterdir())
    )
