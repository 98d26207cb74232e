"""Exports a trained model for other tools, with an example and its logits.

`check` loads the export with the other tool, and compares its logits of the example.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reconverge.base import chance, imagenet
from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.files import anew, checksum, no_plain_file, read_text, sha256_of, write_whole
from reconverge.config import compose
from reconverge.config.settings import Train
from reconverge.evaluation import exported
from reconverge.models import create
from reconverge.run import checkpoint, reader
from reconverge.run.checkpoint import load_tensors
from reconverge.run.reader import Opened
from reconverge.weights import read

FORMAT = "reconverge-export-1"
OPSET = 18  # of ONNX
EXAMPLES = 5  # images of the example; ONNX is tried with a batch of one and a batch of all
TOLERANCE = 1e-4  # of the logits, relative to the largest one; kernels and machines may differ


class Weights(NamedTuple):
    tensors: dict[str, Tensor]
    kind: str  # raw or ema
    steps: list[int]  # more than one: the mean of these checkpoints


def choose(path: Path, run: Opened, kind: str | None, best: bool, average: int) -> Weights:
    """Weights of a run: those of its newest checkpoint, of the checkpoint with the `best` top-1 of this kind,
    or the mean of the newest `average` checkpoints.

    `kind`: raw or ema; None: ema if the run keeps EMA weights, else raw. Errors: Stop(USAGE, MISSING,
    DAMAGED).
    """
    kind = kind or ("ema" if run.cfg.ema.decay is not None else "raw")
    folder = run.folder / "checkpoints"
    chosen = [checkpoint.choose(path)[0]]
    if best:
        chosen = [checkpoint.best(run.folder, kind)[0]]
    if average > 1:
        known = [step for step in reader.checkpoints(folder) if step.name <= chosen[0].name]
        if len(known) < average:
            raise Stop(
                Exit.MISSING,
                f"--average {average}, but {folder} has only {len(known)} checkpoints",
                f"--average up to the number of kept checkpoints, {len(known)}",
                f"--average {len(known)}, or train with keep={average}",
            )
        chosen = [checkpoint.choose(step)[0] for step in known[-average:]]
    name = {"raw": "model", "ema": "ema"}[kind]
    found = [checkpoint.load(one)[0] for one in chosen]
    if any(name not in tensors for tensors in found):
        raise Stop(
            Exit.USAGE,
            f"--weights {kind}, but {chosen[0]} has no EMA weights",
            "the raw weights of this run",
            "--weights raw",
        )
    return Weights(mean([tensors[name] for tensors in found]), kind, [reader.step_of(one) for one in chosen])


def mean(sets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over the sets, summed in float64; of integers (BatchNorm's counts) the last."""
    if len(sets) == 1:
        return sets[0]
    return {
        name: (
            torch.stack([tensors[name].double() for tensors in sets]).mean(0).to(last.dtype)
            if last.is_floating_point()
            else last
        )
        for name, last in sets[-1].items()
    }


# ---- the formats -------------------------------------------------------------------------------------------


class Form(NamedTuple):
    # (model, folder, contents of export.json, example images): writes the model
    write: Callable[[nn.Module, Path, dict[str, Any], Tensor], None]
    # (folder, contents of export.json, images) -> logits, computed by the tool of this format
    logits: Callable[[Path, dict[str, Any], Tensor], Tensor]
    usage: str  # Python code that loads the model from FOLDER
    exact: bool  # whether its logits have equal bits on the machine that wrote it
    files: tuple[str, ...]  # that are loaded


def _safetensors(net: nn.Module, folder: Path, about: dict[str, Any], example: Tensor) -> None:
    with anew(folder / "model.safetensors") as draft:
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, draft)


def _by_ourselves(folder: Path, about: dict[str, Any], images: Tensor) -> Tensor:
    cfg = compose.from_text(about["config"], Train)
    net = create.model(cfg.model, len(about["classes"]), cfg.seed).eval()
    tensors = load_tensors(folder / "model.safetensors")
    checkpoint.hold(str(folder / "model.safetensors"), tensors, net.state_dict())
    net.load_state_dict(tensors)
    return net(images)


def _timm(net: nn.Module, folder: Path, about: dict[str, Any], example: Tensor) -> None:
    """config.json as timm's save_for_hf writes it, readable by timm 1.0 and later."""
    known: dict[str, Any] = dict(getattr(net, "pretrained_cfg", None) or {})
    if "architecture" not in known:
        raise Stop(
            Exit.USAGE,
            f"--to timm with {about['model']}, which is not a model of timm",
            "--to timm only for models of timm",
            "--to pt2, --to onnx or --to safetensors",
        )
    cfg, side = compose.from_text(about["config"], Train), about["evaluate"]["size"]
    arguments: dict[str, Any] = {"img_size": cfg.model.image_size} if cfg.model.image_size else {}
    if known["architecture"].startswith("convnext"):
        arguments["ls_init_value"] = cfg.model.layer_scale
    described = imagenet.described(about["classes"])
    content = {
        "architecture": known["architecture"],
        "num_classes": len(about["classes"]),
        "num_features": net.num_features,
        "label_names": about["classes"],
        "label_descriptions": {entry["synset"]: entry["name"] for entry in described},
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": about["run"],
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": bool(known.get("fixed_input_size")),
            "interpolation": about["evaluate"]["interpolation"],
            "crop_pct": about["evaluate"]["crop_ratio"],
            "crop_mode": {"crop": "center", "squash": "squash"}[about["evaluate"]["mode"]],
            "mean": about["mean"],
            "std": about["std"],
            "num_classes": len(about["classes"]),
            "pool_size": None,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
            "license": about["license"],
        },
    }
    write_whole(folder / "config.json", json.dumps(content, indent=1) + "\n")
    _safetensors(net, folder, about, example)


def _by_timm(folder: Path, about: dict[str, Any], images: Tensor) -> Tensor:
    return read.model(str(folder)).eval()(images)


def _pt2(net: nn.Module, folder: Path, about: dict[str, Any], example: Tensor) -> None:
    program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with anew(folder / "model.pt2") as draft:
        torch.export.save(program, draft)


def _by_torch(folder: Path, about: dict[str, Any], images: Tensor) -> Tensor:
    return exported.pt2(folder / "model.pt2")(images)


def _onnx(net: nn.Module, folder: Path, about: dict[str, Any], example: Tensor) -> None:
    _needed("onnx", "onnxscript", "onnxruntime")
    options: dict[str, Any] = {"dynamo": True, "opset_version": OPSET, "external_data": False}
    shapes = ({0: torch.export.Dim("batch")},)
    options |= {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    with anew(folder / "model.onnx") as draft:
        torch.onnx.export(net, (example,), draft, dynamic_shapes=shapes, **options)


def _by_onnxruntime(folder: Path, about: dict[str, Any], images: Tensor) -> Tensor:
    _needed("onnx", "onnxruntime")
    import onnxruntime

    model = exported.onnx(folder / "model.onnx")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    one, all = (session.run(None, {"images": batch.numpy()})[0] for batch in (images[:1], images))
    if abs(one - all[:1]).max() > TOLERANCE * abs(all).max():
        raise Stop(
            Exit.DAMAGED,
            f"{folder}: the logits of an image depend on the other images of the batch",
            f"equal logits (within {TOLERANCE:g}) for any batch",
            "export the model again",
        )
    return torch.from_numpy(all)


def _needed(*packages: str) -> None:
    from importlib.util import find_spec

    if lacking := [package for package in packages if find_spec(package) is None]:
        raise Stop(
            Exit.USAGE,
            f"--to onnx, but these packages are not installed: {', '.join(lacking)}",
            "the optional packages of reconverge[export]",
            f"pip install {' '.join(lacking)}",
        )


FORMS = {
    "timm": Form(_timm, _by_timm,
        'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()', True,
        ("config.json", "model.safetensors")),
    "safetensors": Form(_safetensors, _by_ourselves,
        'from safetensors.torch import load_file\nweights = load_file("FOLDER/model.safetensors")', True,
        ("model.safetensors",)),
    "pt2": Form(_pt2, _by_torch, 'import torch\nmodel = torch.export.load("FOLDER/model.pt2").module()',
        True, ("model.pt2",)),
    "onnx": Form(_onnx, _by_onnxruntime,
        'import onnxruntime\nsession = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        'logits = session.run(None, {"images": images})[0]', False,
        ("model.onnx",)),
}  # fmt: skip


# ---- writing and checking ----------------------------------------------------------------------------------


@torch.no_grad()
def export(run: Opened, weights: Weights, form: str, folder: Path, license: str) -> dict[str, Any]:
    """Write the model into `folder`, and return the contents of its export.json.

    Errors: Stop(USAGE, NOT_COMPARABLE).
    """
    cfg = run.cfg
    net = create.model(cfg.model, len(run.classes), cfg.seed).eval()
    checkpoint.hold(f"{run.folder}, {weights.kind} weights", weights.tensors, net.state_dict())
    net.load_state_dict(weights.tensors)
    about = {
        "format": FORMAT,
        "form": form,
        "run": cfg.run,
        "model": cfg.model.name,
        "recipe": cfg.recipe.name,
        "weights": weights.kind,
        "steps": weights.steps,
        "license": license,
        "top1": _accuracy(run, weights),
        "classes": run.classes,
        "evaluate": {
            name: getattr(cfg.evaluate, name) for name in ("size", "crop_ratio", "mode", "interpolation")
        },
        "mean": cfg.data.mean,
        "std": cfg.data.std,
        "config": compose.to_text(cfg),
    } | _history(run)
    if form == "onnx":
        about["opset"] = OPSET
    side = cfg.evaluate.size
    example = torch.from_numpy(chance.uniform((EXAMPLES, 3, side, side), "export", "example")).float() * 4 - 2
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise no_plain_file(folder)
    FORMS[form].write(net, folder, about, example)
    with anew(folder / "example.safetensors") as draft:
        save_file({"images": example, "logits": net(example)}, draft)
    write_whole(folder / "README.md", card(about, folder.name))
    about["files"] = {
        path.name: sha256_of(path)
        for path in sorted(folder.iterdir())
        if path.name != "export.json" and path.is_file() and not path.is_symlink()
    }
    about["sha256"] = checksum(about)
    write_whole(folder / "export.json", json.dumps(about, indent=1) + "\n")
    return about


@torch.no_grad()
def check(folder: Path) -> str:
    """Check the hashes of an export's files, and its logits with the tool of its format. Returns a text about
    the difference of the logits.

    Errors: Stop(MISSING, DAMAGED).
    """
    try:
        about = json.loads(read_text(folder / "export.json"))
        form, files, digest = FORMS[about["form"]], dict(about["files"]), about["sha256"]
    except FileNotFoundError:
        raise Stop(
            Exit.MISSING,
            f"{folder} has no export.json",
            "a folder that reconverge export wrote",
            "correct the path",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"{folder / 'export.json'} is damaged: {error!r}") from None
    if digest != checksum(about):
        raise _damaged(f"{folder / 'export.json'} has changed since the export")
    for name, digest in files.items():
        if Path(name).name != name or (folder / name).is_symlink() or not (folder / name).is_file():
            raise _damaged(f"{folder / name} is missing, or is no plain file of the export")
        if sha256_of(folder / name) != digest:
            raise _damaged(f"{folder / name} has changed since the export")
    for name in ("example.safetensors", *form.files):
        if name not in files:
            raise _damaged(f"{folder / 'export.json'} leaves out {name}")
    example = load_tensors(folder / "example.safetensors")
    images, expected = example.get("images"), example.get("logits")
    if images is None or expected is None or images.dtype != torch.float32 or images.ndim != 4:
        raise _damaged(f"{folder / 'example.safetensors'} has no images and logits")
    try:
        logits = form.logits(folder, about, images)
    except Exception as error:  # of any tool
        if explain(error):
            raise
        words = str(error).partition("\n")[0]
        raise _damaged(f"{folder}: its model does not compute the example: {words}") from None
    if not len(images) or (logits.shape, logits.dtype) != (expected.shape, expected.dtype):
        raise _damaged(f"{folder}: the logits of the example have another shape")
    away = float((logits - expected).abs().max() / expected.abs().max())
    if not away <= TOLERANCE:
        raise _damaged(f"{folder}: the logits of the example differ by {away:.2g} of the largest logit")
    return "equal bit for bit" if away == 0 else f"equal within {away:.1g} of the largest logit"


def _damaged(given: str) -> Stop:
    return Stop(Exit.DAMAGED, given, "an export as reconverge export wrote it", "export the model again")


def _accuracy(run: Opened, weights: Weights) -> float | None:
    """Top-1 of these weights in percent; None if they were not evaluated. A mean of checkpoints never was."""
    evaluated = reader.scores(reader.metrics(run.folder))
    return evaluated.get(weights.steps[0], {}).get(weights.kind) if len(weights.steps) == 1 else None


def _history(run: Opened) -> dict[str, Any]:
    there = (run.folder / "environment.json").exists()
    recorded = reader.environment(run.folder) if there else {"facts": {}, "starts": []}
    return {
        "data": recorded["facts"].get("data"),
        "versions": recorded["facts"].get("versions"),
        "promises": recorded.get("promises"),
        "commands": [start["command"] for start in recorded["starts"]],
    }


def card(about: dict[str, Any], folder: str) -> str:
    """The model card: README.md of the export."""
    steps = about["steps"]
    of = (
        f"mean of the checkpoints of steps {', '.join(map(str, steps))}"
        if len(steps) > 1
        else f"after step {steps[0]}"
    )
    how, promises = about["evaluate"], about["promises"] or {}
    top1 = (
        "not evaluated" if about["top1"] is None else f"{about['top1']:.2f} % on the run's validation images"
    )
    rows = {
        "Model": about["model"],
        "Recipe": about["recipe"],
        "Weights": f"{about['weights']}, {of}",
        "Top-1": top1,
        "Classes": str(len(about["classes"])),
        "Images": f"{how['size']} px, {how['mode']}, crop ratio {how['crop_ratio']:g}, "
        f"{how['interpolation']}; mean {about['mean']}, std {about['std']}",
        "Training data": f"fingerprint {(about['data'] or {}).get('train')}",
        "Reproducibility": ", ".join(name for name, kept in promises.items() if kept) or "none",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    usage = FORMS[about["form"]].usage.replace("FOLDER", folder)
    commands = "\n".join(about["commands"][:1])
    return f"""---
license: {about["license"]}
library_name: {"timm" if about["form"] == "timm" else "pytorch"}
pipeline_tag: image-classification
tags: [image-classification]
---
# {about["run"]}

| | |
|---|---|
{table}

```python
{usage}
```

Trained by reconverge with

```
{commands}
```

`reconverge export --check {folder}` compares the logits of example.safetensors with those of this model.
"""
