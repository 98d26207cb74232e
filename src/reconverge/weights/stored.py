"""Reads weights from a file, or from a folder of timm. No file can run code."""

import argparse
import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.files import sha256_of

FORMS = (
    "runs/NAME, runs/NAME:best, one of its checkpoints, a .safetensors, .pth or .pt file, a folder with"
    " config.json, timm:NAME, hf-hub:OWNER/NAME, torchvision:NAME"
)
# Names of the raw and the EMA weights in checkpoint files: first those of the official code of ConvNeXt, DeiT
# and Swin, then those of timm.
SETS = {"raw": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
# What a weight may be stored as. Other types need a scale, which these files do not have, or are no numbers.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
# Arguments in a config.json that are not of a model, but of timm's ways to make and load it.
OPTIONS = (
    "pretrained",
    "checkpoint",
    "cache",
    "feature",
    "kwargs",
    "script",
    "export",
    "no_jit",
    "model_name",
)
PLAIN = (int, float, bool, str, type(None))
LOCAL_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order


@dataclass(frozen=True)
class Pretrained:
    tensors: dict[str, Tensor]  # names as in the file
    classes: list[str] | None  # of the rows of the head; None if they are not known
    origin: dict[str, Any]  # for environment.json; always has `text` and `sha256`


def timm_config(path: Path) -> tuple[str, Any]:
    """Architecture and label names of timm's config.json. Errors: Stop(MISSING, DAMAGED)."""
    try:
        config = json.loads((path / "config.json").read_text())
        refuse_config(config)
        return str(config["architecture"]), config.get(
            "label_names", config.get("pretrained_cfg", {}).get("label_names")
        )
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Stop(
            Exit.DAMAGED,
            f"{path / 'config.json'}: {error!r}",
            "timm's config.json with the key architecture",
            "name another folder, or name the file with the weights instead",
        ) from error


def refuse_config(config: dict[str, Any]) -> None:
    """ValueError for a config.json of somebody that asks timm for more than a model of its own with the
    weights beside it: model_args goes to timm's functions as it is, where it could leave weights out, or name
    folders to write to.
    """
    known = config.get("pretrained_cfg", config)
    if not timm.is_model(str(config["architecture"])):
        raise ValueError(f"architecture {config['architecture']} is not a model of timm")
    if known.get("custom_load") or known.get("label_offset"):
        raise ValueError("it asks for another way to load the weights")
    for name, value in (config.get("model_args") or {}).items():
        values = value if isinstance(value, list) else [value]
        if name.startswith(OPTIONS) or not all(type(one) in PLAIN for one in values):
            raise ValueError(f"model_args has {name}={value}, which is not a plain setting of a model")
        if not all(math.isfinite(one) for one in values if isinstance(one, float)):
            raise ValueError(f"model_args has {name}={value}")
    classes = {table["num_classes"] for table in (config, known) if "num_classes" in table}
    classes |= {(config.get("model_args") or {}).get("num_classes", min(classes, default=None))}
    if len(classes) > 1:
        raise ValueError(f"it names several numbers of classes: {', '.join(map(str, classes))}")


def timm_folder(path: Path, wanted: str) -> Pretrained:
    """A folder that timm's save_for_hf writes, and timm reads by the name local-dir:PATH."""
    architecture, names = timm_config(path)
    found = weights_in(path)
    weights = file(found, wanted)
    origin = {**weights.origin, "architecture": architecture, "text": f"{found}: {architecture}"}
    return Pretrained(
        weights.tensors, [str(name) for name in names] if isinstance(names, list) else None, origin
    )


def weights_in(path: Path) -> Path:
    """The file with weights in a timm folder. Errors: Stop(MISSING)."""
    for name in LOCAL_FILES:
        if (path / name).exists():
            return path / name
    raise Stop(
        Exit.MISSING,
        f"init={path} has no file with weights",
        f"a folder with config.json and {' or '.join(LOCAL_FILES)}",
        "correct the path, or name the file with the weights",
    )


def file(path: Path, wanted: str) -> Pretrained:
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise Stop(Exit.USAGE, f"init={path}", FORMS, "name one of these")
    if (path.parent / "MANIFEST.json").exists():
        # Read as a single file, its sha256 and classes and the name of its run would be lost.
        change = f"init={path.parent}{':ema' if path.stem == 'ema' else ''}"
        raise Stop(
            Exit.USAGE,
            f"init={path} is one file of a checkpoint",
            "the folder of the checkpoint",
            change,
        )
    content = _load(path)
    tensors, chosen = content, "one set of weights"
    held = {kind: [key for key in keys if isinstance(content.get(key), dict)] for kind, keys in SETS.items()}
    if held["raw"] or held["ema"]:
        keys = held[wanted or "raw"]
        if len(keys) != 1:
            change = f"init={path}:ema" if held["ema"] and not wanted else f"init={path}"
            raise Stop(
                Exit.USAGE,
                f"init={path}{wanted and ':' + wanted}; the keys of this file are"
                f" {', '.join(map(str, content))}",
                "a file with one of the keys model, state_dict; with :ema one of model_ema, state_dict_ema",
                change,
            )
        tensors, chosen = content[keys[0]], f"key {keys[0]}"
    elif wanted:
        raise Stop(
            Exit.USAGE,
            f"init={path}:{wanted}",
            "the path without :raw or :ema, because this file has only one set of weights",
            f"init={path}",
        )
    if not tensors or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise Stop(
            Exit.USAGE,
            f"init={path}; the keys of this file are {', '.join(map(str, list(content)[:8]))}",
            "a state dict (name -> tensor), or a file with a state dict in one of the keys model, model_ema,"
            " state_dict, state_dict_ema",
            "save the state_dict() of the model, or name another file",
        )
    digest = sha256_of(path)
    return Pretrained(
        tensors,
        None,
        {"text": f"{path}: {chosen}", "weights": chosen, "path": str(path.absolute()), "sha256": digest},
    )


def _load(path: Path) -> dict[str, Any]:
    """Reads tensors and plain values only; argparse.Namespace is also allowed, because the official
    checkpoints store their options in one.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises UnpicklingError, EOFError, RuntimeError, ValueError, KeyError and more on broken files
    except Exception as error:
        if not isinstance(error, SafetensorError) and explain(error):
            raise
        raise unreadable(str(path), error) from None
    return content if isinstance(content, dict) else {}


def unreadable(init: str, error: Exception) -> Stop:
    code = re.search(r"(?:GLOBAL|global|class) ([\w.]+\.\w+)", str(error))
    if code:
        reason = f"it asks for {code[1]}, which could run code"
    elif isinstance(error, pickle.UnpicklingError):  # torch's own message advises to load it unsafely
        reason = "not a file of torch.save"
    else:
        reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
    return Stop(
        Exit.DAMAGED,
        f"{init}: {reason}",
        "a whole file of tensors and plain values; nothing of this one was run",
        "save the weights alone: torch.save(model.state_dict(), FILE)" if code else "the file",
    )
