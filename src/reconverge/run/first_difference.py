"""Finds the first difference between two runs that should be equal, in their records and checkpoints."""

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
    "grad_norm": "the gradient norm",
}

FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")


def records(one: Path, other: Path, first: int, last: int) -> str | None:
    """The first of the steps first..last that differs between two runs, and its different values, as text.
    None if all steps are equal bit for bit.
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
                f"; equal in this step: {same}" if same else ""
            )
    return None


def checkpoints(one: Path, other: Path) -> str | None:
    """The first file that differs between two checkpoints, and its first different tensor, as text. None if
    all hashes are equal.
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
                return f"{where} exists only in {one if name in mine else other}"
            tensors = name.endswith(".safetensors")
            return f"{where}: {_first_tensor(one / name, other / name) if tensors else 'the contents differ'}"
    return None


def manifest(checkpoint: Path) -> dict[str, dict[str, str]]:
    """The files of a checkpoint, each with its hash."""
    return json.loads(files.read_text(checkpoint / "MANIFEST.json"))["files"]


def _first_tensor(one: Path, other: Path) -> str:
    mine, theirs = load_file(one), load_file(other)
    for name in sorted(mine.keys() | theirs.keys(), key=numerically):
        if name not in mine or name not in theirs:
            return f"{name} exists only in {one if name in mine else other}"
        here, there = mine[name], theirs[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            return f"{name} is {here.dtype} {tuple(here.shape)} and {there.dtype} {tuple(there.shape)}"
        if not torch.equal(_bytes(here), _bytes(there)):
            apart = (here.double() - there.double()).abs()
            numbers = (
                f"{int((apart != 0).sum())} of {here.numel()} numbers, by up to {float(apart.max()):.3g}"
            )
            return f"{name} {tuple(here.shape)} is the first tensor that differs: {numbers}"
    return "the tensors are equal, but the files differ"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # as bytes, because NaN is not equal to NaN


def numerically(name: str) -> list[str]:
    """Sorting key for names of parameters, which puts block 10 after block 9."""
    return [part.zfill(4) for part in name.split(".")]
