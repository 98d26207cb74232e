"""Reads the weights that `init=` names: a run, a file, a folder, or a download. No file can run code."""

import argparse
import difflib
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.files import sha256_of
from reconverge.run import checkpoint
from reconverge.weights.given import no_run, parts

FORMS = (
    "runs/NAME, runs/NAME:best, one of its checkpoints, a .safetensors, .pth or .pt file, a folder with"
    " config.json, timm:NAME, hf-hub:OWNER/NAME, torchvision:NAME"
)
# Names of the raw and the EMA weights in checkpoint files: first those of the official code of ConvNeXt, DeiT
# and Swin, then those of timm.
SETS = {"raw": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
LOCAL_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order


@dataclass(frozen=True)
class Pretrained:
    tensors: dict[str, Tensor]  # names as in the file
    classes: list[str] | None  # of the rows of the head; None if they are not known
    origin: dict[str, Any]  # for environment.json; always has `text` and `sha256`


def read(init: str) -> Pretrained:
    """The weights that `init` names, on the CPU. Errors: Stop(USAGE, MISSING, DAMAGED, PERMISSION)."""
    given = parts(init)
    rest, wanted, best = given
    scheme, _, name = rest.partition(":")
    if scheme in DOWNLOADS and not Path(rest).exists():
        if wanted:
            raise Stop(
                Exit.USAGE,
                f"init={init}",
                f"{scheme}:NAME without :{wanted}, because it has only one set of weights",
                f"init={rest}",
            )
        if best:
            raise no_run(init, given)
        return DOWNLOADS[scheme](name)
    path = Path(rest).expanduser()
    if not path.exists():
        raise _absent(path)
    if best and not (path / "checkpoints").is_dir():
        raise no_run(init, given)
    if path.is_dir():
        return _folder(path, wanted, best)
    return _file(path, wanted)


def _absent(path: Path) -> Stop:
    change = f"init=runs/{path}" if (Path("runs") / path).exists() else "correct the path"
    return Stop(Exit.MISSING, f"init={path}: there is no such file or folder", FORMS, change)


def _folder(path: Path, wanted: str, best: bool) -> Pretrained:
    is_run = (path / "checkpoints").is_dir() or path.absolute().parent.name == "checkpoints"
    is_timm = (path / "config.json").exists()
    if is_run and is_timm:
        raise Stop(
            Exit.USAGE,
            f"init={path} contains both checkpoints/ and config.json",
            "the folder of a run, or a timm folder with config.json",
            "name one of its checkpoints, or the file with the weights",
        )
    if is_run:
        return _run(path, wanted or "raw", best)
    if is_timm:
        return _timm_folder(path, wanted)
    raise Stop(
        Exit.MISSING,
        f"init={path} is a folder without checkpoints/ and config.json",
        FORMS,
        "correct the path",
    )


def _run(path: Path, wanted: str, best: bool) -> Pretrained:
    """The newest valid checkpoint of a run, that with the `best` top-1, or the named one, after its sha256
    was verified.
    """
    top1: float | None = None
    skipped: list[str] = []
    if best:
        chosen, top1 = checkpoint.best(path.absolute(), wanted)
    else:
        chosen, skipped = checkpoint.choose(path.absolute())
    run = chosen.parents[1]
    files = {"raw": chosen / "model.safetensors", "ema": chosen / "ema.safetensors"}
    if not files[wanted].exists():
        raise Stop(
            Exit.USAGE,
            f"init={path}:{wanted}, but {chosen} has no EMA weights",
            "the raw weights of this run",
            f"init={path}",
        )
    try:
        classes = (run / "classes.txt").read_text().splitlines()
    except FileNotFoundError:
        raise Stop(
            Exit.MISSING,
            f"{run} has no classes.txt",
            "a run's folder with all its files",
            "restore the file from a copy",
        ) from None
    step = json.loads((chosen / "state.json").read_text())["step"]
    digest = json.loads((chosen / "MANIFEST.json").read_text())["files"][files[wanted].name]["sha256"]
    text = f"{path}: {wanted} weights of run {run.name} after step {step}"
    text += "" if top1 is None else f", its best top-1 ({top1:.2f} %)"
    text += "".join(f"; skipped a damaged checkpoint: {reason}" for reason in skipped)
    return Pretrained(
        safetensors.torch.load_file(files[wanted]),
        classes,
        {
            "text": text,
            "run": run.name,
            "step": step,
            "weights": wanted,
            "path": str(files[wanted]),
            "sha256": digest,
            **({} if top1 is None else {"best_top1": top1}),
        },
    )


def _timm_config(path: Path) -> tuple[str, Any]:
    """Architecture and label names of timm's config.json. Errors: Stop(DAMAGED)."""
    try:
        config = json.loads((path / "config.json").read_text())
        return str(config["architecture"]), config.get(
            "label_names", config.get("pretrained_cfg", {}).get("label_names")
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise Stop(
            Exit.DAMAGED,
            f"{path / 'config.json'}: {error!r}",
            "timm's config.json with the key architecture",
            "name another folder, or name the file with the weights instead",
        ) from error


def _timm_folder(path: Path, wanted: str) -> Pretrained:
    """A folder that timm's save_for_hf writes, and timm reads by the name local-dir:PATH."""
    architecture, names = _timm_config(path)
    found = [path / name for name in LOCAL_FILES if (path / name).exists()]
    if not found:
        raise Stop(
            Exit.MISSING,
            f"init={path} has no file with weights",
            f"a folder with config.json and {' or '.join(LOCAL_FILES)}",
            "correct the path, or name the file with the weights",
        )
    weights = _file(found[0], wanted)
    origin = {**weights.origin, "architecture": architecture, "text": f"{found[0]}: {architecture}"}
    return Pretrained(
        weights.tensors, [str(name) for name in names] if isinstance(names, list) else None, origin
    )


def _file(path: Path, wanted: str) -> Pretrained:
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
        raise _unreadable(str(path), error) from None
    return content if isinstance(content, dict) else {}


def _unreadable(init: str, error: Exception) -> Stop:
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
        "the file",
    )


# ---- downloads; the libraries store them in their own caches ----


@contextmanager
def _downloading(init: str) -> Iterator[None]:
    """Inside, libraries of all versions load weights only, so no code can run. Their errors become a Stop."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise _unreadable(init, error) from None
    except Exception as error:  # of requests, httpx, urllib, huggingface_hub
        stop = explain(error)
        if stop and stop.code != Exit.MISSING:
            raise
        raise Stop(
            Exit.MISSING,
            f"{init}: {type(error).__name__} {str(error).partition(chr(10))[0]}",
            "a network connection, or weights that this machine has already downloaded",
            "try again; or download the weights on another machine and name the file or folder in init=",
        ) from error
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def model(given: str) -> nn.Module:
    """A timm model with the weights of timm:NAME, hf-hub:OWNER/NAME or a folder with timm's config.json.

    Errors: Stop(USAGE, MISSING, DAMAGED).
    """
    scheme, _, name = given.partition(":")
    if scheme == "timm":
        if not timm.is_model_pretrained(name):
            known = timm.list_pretrained()
            near = difflib.get_close_matches(name, known, n=3, cutoff=0)
            raise Stop(
                Exit.USAGE,
                f"timm:{name}",
                f"one of the {len(known)} names of timm.list_pretrained()",
                f"timm:{' or timm:'.join(near)}",
            )
    elif scheme == "hf-hub":
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
            raise Stop(
                Exit.USAGE,
                f"hf-hub:{name}",
                "hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION",
                "hf-hub:timm/convnext_tiny.fb_in1k",
            )
        name = given
    else:
        folder = Path(given).expanduser()
        _timm_config(folder)
        name = f"local-dir:{folder}"
    # timm knows the addresses of the weights, and converts old names of weights.
    with _downloading(given), chance.scope("init", given):
        return timm.create_model(name, pretrained=True)


def _created(given: str) -> Pretrained:
    net = model(given)
    tensors: dict[str, Tensor] = net.state_dict()
    known: Any = net.pretrained_cfg or {}
    architecture = f"{known.get('architecture', given)}.{known.get('tag') or '-'}".removesuffix(".-")
    names = known.get("label_names")
    classes = (
        [str(label) for label in names]
        if isinstance(names, list | tuple) and len(names) == net.num_classes
        else None
    )
    return Pretrained(
        tensors,
        classes,
        {"text": f"{given}: {architecture}", "architecture": architecture, "sha256": _digest(tensors)},
    )


def _from_torchvision(name: str) -> Pretrained:
    """`name`: a model that has one set of weights, or the name of a set: ResNet50_Weights.IMAGENET1K_V2."""
    try:
        sets = (
            [torchvision.models.get_weight(name)]
            if "." in name
            else list(torchvision.models.get_model_weights(name))
        )
    except (ValueError, KeyError):
        near = difflib.get_close_matches(
            name, torchvision.models.list_models(module=torchvision.models), n=3, cutoff=0
        )
        raise Stop(
            Exit.USAGE,
            f"init=torchvision:{name}",
            "a model of torchvision, or the full name of a set of weights",
            f"init=torchvision:{near[0]}",
        ) from None
    if len(sets) > 1:
        full = [f"torchvision:{weights}" for weights in sets]
        raise Stop(Exit.USAGE, f"init=torchvision:{name}", f"one of {', '.join(full)}", f"init={full[0]}")
    with _downloading(f"torchvision:{name}"):
        tensors = sets[0].get_state_dict(progress=False, check_hash=True)
    return Pretrained(tensors, None, {"text": f"torchvision:{sets[0]}", "sha256": _digest(tensors)})


DOWNLOADS = {
    "timm": lambda name: _created(f"timm:{name}"),
    "hf-hub": lambda name: _created(f"hf-hub:{name}"),
    "torchvision": _from_torchvision,
}


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of names and values, which does not depend on the file that the library downloaded."""
    return sha256(
        safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    ).hexdigest()
