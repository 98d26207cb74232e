"""Where two runs that should be alike part: by the lines of their records, and by the tensors of their
checkpoints.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from reconverge.base import files

VALUES = {
    "images": "the augmented images",
    "lr": "the learning rate",
    "loss": "the loss",
    "grad_norm": "the gradient's norm",
}

FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")


def records(one: Path, other: Path, first: int, last: int) -> str | None:
    """Of steps first..last of two runs the first that differs, and each value that does; None: they are the
    same, bit for bit.
    """
    mine, theirs = (
        {line["step"]: line for line in files.json_lines(folder / "record.jsonl")} for folder in (one, other)
    )
    for step in range(first, last + 1):
        if step not in mine or step not in theirs:
            return f"step {step}: not recorded in {other if step in mine else one}"
        found = [key for key in VALUES if mine[step][key] != theirs[step][key]]
        if found:
            values = "; ".join(
                f"{VALUES[key]} ({key}), {mine[step][key]} and {theirs[step][key]}" for key in found
            )
            same = " and ".join(key for key in VALUES if key not in found)
            return f"step {step} is the first that differs: {values}" + (
                f"; the same in it: {same}" if same else ""
            )
    return None


def checkpoints(one: Path, other: Path) -> str | None:
    """Of two checkpoints' files the first that differs, and the first tensor in it; None: they have the same
    hashes.
    """
    for path in (one, other):
        if not (path / "MANIFEST.json").exists():
            return f"{path} is missing"
    mine, theirs = (
        {name: entry["sha256"] for name, entry in manifest(path).items()} for path in (one, other)
    )
    for name in FILES:
        if mine.get(name) != theirs.get(name):
            where = f"{one.name}/{name}"
            if name not in mine or name not in theirs:
                return f"{where} is in {one if name in mine else other} alone"
            tensors = name.endswith(".safetensors")
            return f"{where}: {_first_tensor(one / name, other / name) if tensors else 'other contents'}"
    return None


def manifest(checkpoint: Path) -> dict[str, dict[str, str]]:
    """The files of a checkpoint, each with its hash."""
    return json.loads((checkpoint / "MANIFEST.json").read_text())["files"]


def _first_tensor(one: Path, other: Path) -> str:
    mine, theirs = load_file(one), load_file(other)
    for name in sorted(mine.keys() | theirs.keys(), key=numerically):
        if name not in mine or name not in theirs:
            return f"{name} is in {one if name in mine else other} alone"
        here, there = mine[name], theirs[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            return f"{name} is {here.dtype} {tuple(here.shape)} and {there.dtype} {tuple(there.shape)}"
        if not torch.equal(_bytes(here), _bytes(there)):
            apart = (here.double() - there.double()).abs()
            numbers = (
                f"{int((apart != 0).sum())} of {here.numel()} numbers, by up to {float(apart.max()):.3g}"
            )
            return f"{name} {tuple(here.shape)} is the first tensor that differs: {numbers}"
    return "the same tensors in other bytes"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # so that not-a-number equals itself


def numerically(name: str) -> list[str]:
    """To sort the names of parameters by: block 10 comes after block 9."""
    return [part.zfill(4) for part in name.split(".")]
