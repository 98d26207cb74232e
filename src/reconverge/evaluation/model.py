"""Loads a trained model for eval.py: from a run, or from a name or folder that timm can load."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from reconverge.base import imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.config.settings import Evaluate
from reconverge.distributed import ranks
from reconverge.models import create
from reconverge.run import checkpoint
from reconverge.run.reader import Opened
from reconverge.weights import read


class Trained(NamedTuple):
    path: str  # what was loaded: a checkpoint, or the name of a timm model
    name: str  # name of the model: an entry of MODELS, or timm's name
    nets: dict[str, nn.Module]  # in evaluation mode, by kind of weights: raw and ema, or `weights`
    classes: list[str]
    evaluate: Evaluate  # how images are resized
    mean: list[float]
    std: list[float]
    step: int | None  # step of the run; None for timm models
    fixed_size: bool  # whether it takes images of only one size

    @property
    def title(self) -> str:
        return self.path if self.step is None else f"{self.path}: step {self.step}"

    def resized(self, asked: dict[str, Any]) -> Evaluate:
        """How images are resized, with the changes in `asked`. Errors: Stop(USAGE)."""
        if self.fixed_size and asked.get("size", self.evaluate.size) != self.evaluate.size:
            size = self.evaluate.size
            raise Stop(
                Exit.USAGE,
                f"size={asked['size']} with {self.name}",
                f"size={size}, because this model takes images of only one size",
                f"size={size}",
            )
        settings = replace(self.evaluate, **asked)
        net = next(iter(self.nets.values()))  # raw and EMA models have the same architecture
        create.refuse_sizes(net, {"size": settings.size})
        return settings


def of_run(run: Opened, path: Path) -> Trained:
    """Raw and EMA weights of the newest valid checkpoint at `path`. Errors: Stop(MISSING, DAMAGED)."""
    chosen, skipped = ranks.from_rank_0(lambda: checkpoint.choose(path))
    for reason in skipped:
        say(f"skipped a damaged checkpoint: {reason}")
    tensors, numbers = checkpoint.load(chosen)
    nets = {}
    for name, weights in (("raw", "model"), ("ema", "ema")):
        if weights in tensors:
            net = create.model(run.cfg.model, len(run.classes), run.cfg.seed).eval()
            checkpoint.hold(str(chosen / f"{weights}.safetensors"), tensors[weights], net.state_dict())
            net.load_state_dict(tensors[weights])
            nets[name] = net
    cfg, fixed_size = run.cfg, run.cfg.model.image_size is not None
    return Trained(
        str(chosen),
        cfg.model.name,
        nets,
        run.classes,
        cfg.evaluate,
        cfg.data.mean,
        cfg.data.std,
        numbers["step"],
        fixed_size,
    )


def of_timm(name: str) -> Trained:
    """A timm model with its weights and preprocessing. `name`: timm:NAME, hf-hub:OWNER/NAME or a folder.

    Errors: Stop(USAGE, MISSING, DAMAGED).
    """
    net = read.model(name).eval()
    known: dict[str, Any] = dict(net.pretrained_cfg)  # type: ignore[arg-type]
    labels = known.get("label_names")
    classes = (
        [str(label) for label in labels]
        if isinstance(labels, list | tuple) and len(labels) == net.num_classes
        else None
    )
    classes = classes or imagenet.of_head(int(net.num_classes))  # type: ignore[arg-type]
    mode = {"center": "crop", "squash": "squash"}.get(known.get("crop_mode") or "center")
    if classes is None or mode is None or known.get("interpolation") not in ("bicubic", "bilinear"):
        raise Stop(
            Exit.USAGE,
            f"{name}: {net.num_classes} classes, crop mode {known.get('crop_mode')}, interpolation"
            f" {known.get('interpolation')}",
            "a classifier with named classes or those of ImageNet, with centre crop or squash, bicubic or"
            " bilinear",
            "choose another model",
        )
    evaluate = Evaluate(known["input_size"][-1], known["crop_pct"], mode, known["interpolation"])
    architecture = f"{known.get('architecture', name)}.{known.get('tag') or ''}".removesuffix(".")
    fixed_size = bool(known.get("fixed_input_size"))
    return Trained(
        name,
        architecture,
        {"weights": net},
        classes,
        evaluate,
        list(known["mean"]),
        list(known["std"]),
        None,
        fixed_size,
    )
