"""Reads the weights that `init=` names: a run, a file, a folder, or a download. No file can run code."""

import difflib
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from reconverge.base import chance
from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.files import read_text, sha256_of
from reconverge.run import checkpoint
from reconverge.weights import stored
from reconverge.weights.given import no_run, parts
from reconverge.weights.stored import FLOATS, FORMS, INTEGERS, Pretrained


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
    return stored.file(path, wanted)


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
        return stored.timm_folder(path, wanted)
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
        classes = read_text(run / "classes.txt").splitlines()
    except FileNotFoundError:
        raise Stop(
            Exit.MISSING,
            f"{run} has no classes.txt",
            "a run's folder with all its files",
            "restore the file from a copy",
        ) from None
    step, digest = checkpoint.numbers(chosen)["step"], sha256_of(files[wanted])
    text = f"{path}: {wanted} weights of run {run.name} after step {step}"
    text += "" if top1 is None else f", its best top-1 ({top1:.2f} %)"
    text += "".join(f"; skipped a damaged checkpoint: {reason}" for reason in skipped)
    return Pretrained(
        checkpoint.load_tensors(files[wanted]),
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


# ---- downloads; the libraries store them in their own caches ----


@contextmanager
def _downloading(init: str) -> Iterator[None]:
    """Inside, libraries of all versions load weights only, so no code can run. Their errors become a Stop."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise stored.unreadable(init, error) from None
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
    tensors: dict[str, Tensor] = {}  # as they are stored; those of timm's own names are checked by their hash
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
        stored.timm_config(folder)
        tensors = stored.file(stored.weights_in(folder), "").tensors
        name = f"local-dir:{folder}"
    # timm knows the addresses of the weights, and converts old names of weights.
    with _downloading(given), chance.scope("init", given):
        if scheme == "hf-hub":
            tensors = _of_hub(name.partition(":")[2])
        net = timm.create_model(name, pretrained=True)
    _refuse_others(given, tensors, net)
    return net


def _of_hub(repository: str) -> dict[str, Tensor]:
    """The tensors as they are stored in a repository, whose config.json was looked at. Errors: Stop(DAMAGED),
    those of the library.
    """
    owner, _, revision = repository.partition("@")
    path = Path(huggingface_hub.hf_hub_download(owner, "config.json", revision=revision or None))
    stored.timm_config(path.parent)
    known = json.loads(path.read_text())
    other = known.get("pretrained_cfg", known).get("hf_hub_filename")
    given = {"filename": str(other)} if other else {}
    return timm.models.load_state_dict_from_hf(repository, weights_only=True, **given)


def _refuse_others(given: str, tensors: dict[str, Tensor], net: nn.Module) -> None:
    """Refuse what timm has cast to the type of the weight, or loaded although it is not finite.

    Errors: Stop(DAMAGED).
    """
    own = net.state_dict()
    for name, tensor in tensors.items():
        allowed = FLOATS if name in own and own[name].is_floating_point() else (*FLOATS, *INTEGERS)
        if tensor.dtype not in allowed:
            raise _no_weights(given, f"{name} consists of {tensor.dtype}".replace("torch.", ""))
    for name, tensor in own.items():
        if not checkpoint.finite(tensor):
            raise _no_weights(given, f"{name} has values that are not finite")


def _no_weights(given: str, reason: str) -> Stop:
    return Stop(Exit.DAMAGED, f"{given}: {reason}", "finite floating-point weights", "use other weights")


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
