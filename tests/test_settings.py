"""Every setting has an effect: each is changed alone, and the effect that is named here must change too."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights
from PIL import Image

from reconverge.config.setting import flat
from reconverge.config.settings import Train
from reconverge.data.loader import Images

MIXED = ["mix.mixup=0.8", "mix.cutmix=1.0", "mix.probability=1.0", "mix.switch=0.5"]
SYNTHETIC = ["data=synthetic", "data.images=40", "data.classes=5"]

# setting, what both runs have, what one of them changes, where it shows
EFFECTS = [
    ("run", [], "run=other", "folder"),
    ("seed", [], "seed=1", "inputs"),
    ("batch", [], "batch=32", "weights"),
    ("microbatch", [], "microbatch=4", "weights"),
    ("epochs", ["optim.warmup_epochs=0"], "epochs=5", "lr"),
    ("steps", [], "steps=3", "logged"),
    ("workers", [], "workers=1", "said"),
    ("threads", [], "threads=2", "threads"),
    ("device", [], "device=cuda", "code"),
    ("precision", [], "precision=bf16", "weights"),
    ("channels_last", [], "channels_last=true", "memory format"),
    ("checkpointing", [], "checkpointing=true", "block calls"),
    ("deterministic", [], "deterministic=false", "deterministic"),
    ("fused", [], "fused=false", "weights"),
    ("copy_ahead", [], "copy_ahead=false", "loaded at first step"),
    ("save_every", [], "save_every=1", "checkpoints"),
    ("evaluate_every", [], "evaluate_every=1", "evaluated"),
    ("log_every", [], "log_every=1", "logged"),
    ("keep", ["save_every=1", "evaluate_every=0"], "keep=1", "checkpoints"),
    ("model.name", [], "model.name=convnext_t", "said"),
    ("model.size", [], "model.size=t", "said"),
    ("model.drop_path", [], "model.drop_path=0.5", "weights"),
    ("model.layer_scale", [], "model.layer_scale=0.1", "weights"),
    ("model.head_init_scale", [], "model.head_init_scale=0.1", "weights"),
    ("model.image_size", [], "model.image_size=64", "code"),
    ("model.timm", ["model.layer_scale=null"], "model.timm=test_resnet", "said"),
    ("recipe.name", [], "recipe.name=mine", "said"),
    ("recipe.batch", ["recipe.batch=16"], "recipe.batch=64", "said"),
    ("recipe.dataset", ["ema.decay=0.5"], "recipe.dataset=imagenet1k", "said"),
    ("recipe.starts_from", [], "recipe.starts_from=elsewhere", "said"),
    ("recipe.drop_path", ["model=convnext_atto"], "recipe.drop_path.atto=0.5", "weights"),
    ("augment.size", [], "augment.size=64", "inputs"),
    ("augment.scale", [], "augment.scale=[0.1,0.2]", "inputs"),
    ("augment.ratio", [], "augment.ratio=[0.5,0.6]", "inputs"),
    ("augment.interpolation", [], "augment.interpolation=bilinear", "inputs"),
    ("augment.flip", [], "augment.flip=1.0", "inputs"),
    ("augment.auto", [], "augment.auto=none", "inputs"),
    ("augment.repeats", [], "augment.repeats=2", "inputs"),
    ("augment.erase", [], "augment.erase=1.0", "inputs"),
    ("mix.mixup", [*MIXED, "mix.switch=0.0"], "mix.mixup=8.0", "inputs"),
    ("mix.cutmix", [*MIXED, "mix.switch=1.0"], "mix.cutmix=8.0", "inputs"),
    ("mix.probability", MIXED, "mix.probability=0.0", "inputs"),
    ("mix.switch", [*MIXED, "mix.switch=0.0"], "mix.switch=1.0", "inputs"),
    ("mix.smoothing", [], "mix.smoothing=0.3", "weights"),
    ("optim.lr", [], "optim.lr=1e-3", "lr"),
    ("optim.lr_batch", [], "optim.lr_batch=64", "lr"),
    ("optim.min_lr", ["optim.warmup_epochs=0"], "optim.min_lr=1e-3", "lr"),
    ("optim.warmup_lr", [], "optim.warmup_lr=1e-3", "lr"),
    ("optim.schedule", [], "optim.schedule=swin", "lr"),
    ("optim.layer_decay", [], "optim.layer_decay=0.5", "weights"),
    ("optim.layer_groups", ["optim.layer_decay=0.5"], "optim.layer_groups=blocks", "weights"),
    ("optim.warmup_epochs", [], "optim.warmup_epochs=2", "lr"),
    ("optim.weight_decay", [], "optim.weight_decay=0.5", "weights"),
    ("optim.betas", [], "optim.betas=[0.5,0.9]", "weights"),
    ("optim.eps", [], "optim.eps=1e-3", "weights"),
    ("optim.clip", [], "optim.clip=0.01", "weights"),
    ("ema.decay", [], "ema.decay=0.5", "ema"),
    ("ema.decay", [], "ema.decay=null", "ema"),
    ("evaluate.size", [], "evaluate.size=64", "raw_loss"),
    ("evaluate.crop_ratio", [], "evaluate.crop_ratio=0.5", "raw_loss"),
    ("evaluate.mode", ["PHOTOGRAPHS"], "evaluate.mode=squash", "raw_loss"),
    ("evaluate.interpolation", [], "evaluate.interpolation=bilinear", "raw_loss"),
    ("evaluate.batch", [], "evaluate.batch=10", "evaluation calls"),
    ("data.name", [], "data.name=mine", "said"),
    ("data.kind", SYNTHETIC, "data.kind=folder", "said"),
    ("data.root", [], "PHOTOGRAPHS", "weights"),
    ("data.train", [], "data.train=val", "weights"),
    ("data.val", [], "data.val=train", "said"),
    ("data.cache", [], "data.cache=here", "files"),
    ("data.mean", [], "data.mean=[0,0,0]", "weights"),
    ("data.std", [], "data.std=[1,1,1]", "weights"),
    ("data.dataset", ["SHARDS"], "data.dataset=imagenet1k", "code"),
    ("data.decode", [], "data.decode=fast", "weights"),
    ("data.window", ["SHARDS"], "data.window=1", "weights"),
    ("data.stage", ["SHARDS", "data.window=1"], "data.stage=local", "files"),
    ("data.stage_gb", ["SHARDS", "data.window=1", "data.stage=local"], "data.stage_gb=0", "code"),
    ("data.images", SYNTHETIC, "data.images=50", "said"),
    ("data.classes", SYNTHETIC, "data.classes=6", "said"),
    ("machine.name", [], "machine=cpu", "said"),
    ("tracker.name", [], "tracker=tensorboard", "folder"),
    ("debug.overfit", [], "debug.overfit=true", "weights"),
    ("debug.profile", ["steps=4"], "debug.profile=1", "folder"),
    ("forward_images", [], "forward_images=4", "block calls"),
    ("reduce", ["batch=32", "microbatch=4"], "reduce=tree", "weights"),
]  # fmt: skip
EVALUATED = {"raw_loss", "evaluated", "evaluation calls"}
ELSEWHERE = {
    "data.labels": "test_evalsets.py: the labels of ReaL; eval.py's alone",
    "init": "test_init.py: a chain of runs",
    "init_strict": "test_weights.py: nothing partial without being told",
    "init_head": "test_init.py: the same classes keep their head, others are mapped or keep initial weights",
    "recipe.ema": "test_recipes.py: every recipe for every size",
    "recipe.expected": "test_recipes.py: the end of a run compares",
    "recipe.noise": "test_recipes.py: the end of a run compares",
    "recipe.microbatch": "test_recipes.py: every recipe for every size",
    "world_timeout": "faults/test_lost_ranks.py (slow): a rank that stands still is named after it",
    "compile": "test_train.py (slow): the compiled model trains to the same loss",
    "resume_allow": "test_resume.py: a change is refused, and allowed by name",
    "data.on_bad_image": "test_shards.py: damaged images stop the run, or are replaced when asked;"
    " test_damaged_validation.py: or are left out of evaluations",
    "data.native": (
        "test_native.py: the same weights and another line in the panel; on refuses to start without it"
    ),
    **{
        key: "test_segment.py: task=segment alone reads it"
        for key, _, checks in flat(Train())
        if checks["task"] == "segment"
    },
    "task": "test_segment.py: a segmenter is trained",
    "recipe.task": "test_segment.py: a recipe of another task is refused",
    "recipe.peak_lr": "test_segment.py: the recipes of ADE20K for every size",
    "schedule_steps": "test_segment.py: the schedule in steps",
    "optim.warmup_steps": "test_segment.py: the schedule in steps",
    "data.max_substitutes": "test_shards.py: one too many stops the run",
    "tracker.project": "test_tracker.py: the offline file names it",
}


def test_every_setting_is_here():
    assert {name for name, *_ in EFFECTS} | set(ELSEWHERE) == {key for key, *_ in flat(Train())}


@pytest.fixture
def observe(train, capsys, photographs, shards, monkeypatch, tmp_path):
    meant = {"PHOTOGRAPHS": [f"data.root={photographs}"], "SHARDS": ["data=shards", f"data.root={shards}"]}

    def observe(*arguments):
        arguments = [actual for argument in arguments for actual in meant.get(argument, [argument])]
        name = next((argument[4:] for argument in arguments if argument.startswith("run=")), "a")
        (tmp_path / "runs").exists() and (tmp_path / "runs").rename(
            tmp_path / f"before{len(list(tmp_path.iterdir()))}"
        )
        capsys.readouterr()
        seen = {"block calls": 0, "evaluation calls": 0, "loaded": 0}

        def hook(module, inputs):
            if type(module).__name__ == "ConvNeXtBlock" and module.training:
                seen["block calls"] += 1
            if type(module).__name__ == "ConvNeXt" and not inputs[0].is_meta:
                seen["evaluation calls"] += not module.training
                seen.setdefault("loaded at first step", seen["loaded"])
                stem = module.stem[0].weight
                last = {"memory_format": torch.channels_last}
                seen["memory format"] = inputs[0].is_contiguous(**last), stem.is_contiguous(**last)
                seen["deterministic"] = torch.are_deterministic_algorithms_enabled()

        load = Images.__getitem__

        def counted(images, at):
            seen["loaded"] += 1
            return load(images, at)

        monkeypatch.setattr(Images, "__getitem__", counted)
        handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
        try:
            seen["code"] = train("run=a", "steps=2", *arguments)
        finally:
            handle.remove()
            monkeypatch.setattr(Images, "__getitem__", load)
        said = capsys.readouterr()
        seen["said"] = [line for line in said.out.splitlines() if "images/s" not in line]
        if seen["code"]:
            return seen
        folder = Path("runs") / name
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return seen | {
            "folder": [
                *sorted(
                    path.name for path in Path("runs").glob("*/*") if not path.name.startswith("tracker")
                ),
                name,
            ],
            "files": sorted(
                path.name for path in Path().iterdir() if path.is_dir() and not path.name.startswith("before")
            ),
            "weights": weights(name),
            "ema": weights(name, "ema") if list(folder.glob("checkpoints/*/ema.safetensors")) else None,
            "inputs": first_batch(folder),
            "lr": [record["lr"] for record in records if "lr" in record],
            "logged": [record["step"] for record in records if "lr" in record],
            "evaluated": [record["step"] for record in records if "raw_top1" in record],
            "raw_loss": [record["raw_loss"] for record in records if "raw_loss" in record],
            "checkpoints": sorted(path.name for path in folder.glob("checkpoints/*")),
            "threads": json.loads((folder / "environment.json").read_text())["facts"]["threads"],
        }

    return observe


def first_batch(folder):
    """The images and targets in first_batch.png, without its title, which names some settings."""
    with Image.open(folder / "first_batch.png") as picture:
        return hashlib.sha256(np.asarray(picture)[60:].tobytes()).hexdigest()


_bases = {}


@pytest.mark.parametrize(
    ("name", "base", "change", "shows"), EFFECTS, ids=[f"{name}-{change}" for name, _, change, _ in EFFECTS]
)
def test_effect(observe, name, base, change, shows):
    base = ["evaluate_every=0", *base] if shows in EVALUATED else base
    key = tuple(base)
    if key not in _bases:
        _bases[key] = observe(*base)
        assert _bases[key]["code"] == 0
    changed = observe(*base, change)
    assert changed[shows] != _bases[key][shows]


def test_the_same_command_shows_the_same(observe):
    first, second = observe("evaluate_every=0"), observe("evaluate_every=0")
    assert first == second
