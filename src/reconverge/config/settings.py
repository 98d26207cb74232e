"""Every setting, one section a part, with unit, default and source: the one page of all knobs.

Imports no torch. "Table 5" and "Table 6" are those of "A ConvNet for the 2020s" (arXiv 2201.03545 v2). The
defaults are neutral; the values of an experiment stand in conf/recipe/. A part of the program gets its own
section and plain values, never the whole configuration.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

MISSING = "???"  # must be given by a yaml file or on the command line


def setting(
    default: Any,
    help: str,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    high: float | None = None,
    pattern: str = "",
    free: bool = False,
) -> Any:
    """A field of a section.

    `low` and `high` are allowed themselves; `free` settings may change when a run is resumed.
    """
    checks = {"help": help, "choices": choices, "low": low, "high": high, "pattern": pattern, "free": free}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=checks)
    return field(default=default, metadata=checks)


NAME = r"[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*"  # a plain folder name: no separators, not "." or ".."
EVERY = r"[0-9]+(epoch)?"
EVERY_OR_NEVER = EVERY + "|never"


# fmt: off

@dataclass
class Model:
    name: str = setting(MISSING, "an entry of the table MODELS, as model=NAME")
    size: str = setting(MISSING,
        help="the row of the recipe's tables that this model takes: atto, t, s, b, l, xl, iso_s, ...")
    drop_path: float = setting(MISSING, low=0, high=0.99,
        help="stochastic depth: drop rate of the last block, linear over all blocks (Table 5); the recipe's "
             "table by size")
    layer_scale: float | None = setting(1e-6, low=0,
        help="initial gamma of each block's branch (Table 5); null: no layer scale, or a model of timm's, "
             "whose constructor decides")
    head_init_scale: float = setting(1.0, low=0,
        help="multiplies the initial weights of the head (Table 5: none; Table 6: 0.001 for fine-tuning)")
    image_size: int | None = setting(None, low=1,
        help="pixels, side of the images that the model is built for: augment.size for ViT and Swin; null: "
             "it takes any")
    timm: str | None = setting(None, pattern=NAME,
        help="for model=timm: timm's name of a model that is not in the table")


@dataclass
class Recipe:
    name: str = setting(MISSING, "a file of conf/recipe, as recipe=NAME")
    dataset: str | None = setting(None, choices=(None, "imagenet1k", "imagenet22k"), free=True,
        help="the published run's training images; null: the recipe reproduces no published run")
    starts_from: str | None = setting(None, free=True,
        help="the trained weights that the recipe is meant for, in words; null: it starts from scratch")
    batch: int = setting(MISSING, "images of one step that lr was chosen for", low=1)
    drop_path: dict[str, float] = setting({}, "model size -> stochastic depth (Table 5)")
    microbatch: dict[str, int] = setting({},
        help="model size -> images of one forward pass, on which Mixup draws and BatchNorm averages (the "
             "published images per GPU)")
    ema: dict[str, float | None] = setting({},
        help="model size -> ema.decay, where it depends on the size (Table 6)")
    expected: dict[str, float] = setting({}, "model name -> published top-1, percent", free=True)
    noise: float | None = setting(None, low=0, free=True,
        help="percent points around the published top-1 that independent runs of the recipe fall into")


@dataclass
class Augment:
    size: int = setting(224, "pixels, side of a training image (Table 5)", low=1)
    scale: list[float] = setting([0.08, 1.0],
        help="random resized crop: smallest and largest share of the area (timm)")
    ratio: list[float] = setting([0.75, 4 / 3],
        help="random resized crop: smallest and largest aspect ratio (timm)")
    interpolation: str = setting("bicubic", choices=("bicubic", "bilinear", "random"),
        help="of the random resized crop (official code)")
    flip: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    auto: str = setting("rand-m9-mstd0.5-inc1", pattern=r"none|rand(-(m|n|p|mmax|mstd|inc)[0-9.]+)*",
        help="timm's name of a RandAugment policy, or none (Table 5: magnitude 9, deviation 0.5)")
    repeats: int = setting(1, low=1,
        help="how often each chosen sample comes in an epoch, each time augmented anew (repeated "
             "augmentation; DeiT: 3)")
    erase: float = setting(0.25, low=0, high=1,
        help="probability of random erasing with normal noise, per image (Table 5, mode pixel)")


@dataclass
class Mix:
    mixup: float = setting(0.8, "alpha of Mixup's beta distribution, 0 for none (Table 5)", low=0)
    cutmix: float = setting(1.0, "alpha of CutMix's beta distribution, 0 for none (Table 5)", low=0)
    probability: float = setting(1.0, "that a microbatch is mixed", low=0, high=1)
    switch: float = setting(0.5, "share of CutMix where both are on", low=0, high=1)
    smoothing: float = setting(0.1, "label smoothing (Table 5)", low=0, high=1)


@dataclass
class Optim:
    lr: float = setting(4e-3, low=0,
        help="AdamW's learning rate after warm-up, of one step of recipe.batch images (Table 5)")
    lr_batch: int | None = setting(None, low=1,
        help="images of a step that lr, min_lr and warmup_lr are given for: all are multiplied by batch / "
             "lr_batch; null: as they are, whatever the batch")
    min_lr: float = setting(1e-6, "where the cosine ends (official code)", low=0)
    warmup_lr: float = setting(0.0, "where the warm-up begins (official code: 0; DeiT's: 1e-6)", low=0)
    warmup_epochs: int = setting(20, "epochs of linear warm-up (Table 5)", low=0)
    schedule: str = setting("convnext", choices=("convnext", "deit", "swin"),
        help="warm-up and cosine in the exact form of which published code: convnext and swin by step, deit "
             "by epoch")
    layer_decay: float = setting(1.0, low=0.01, high=1,
        help="lr of a layer / lr of the layer above it, 1 at the head; 1: one lr for all (Table 6: 0.7 and "
             "0.8)")
    layer_groups: str = setting("auto", choices=("auto", "stages", "blocks"),
        help="what a layer is; stages: ConvNeXt's published groups; blocks: each block; auto: stages for "
             "ConvNeXts, else blocks")
    weight_decay: float = setting(0.05, "on weights of two or more dimensions (Table 5)", low=0)
    betas: list[float] = setting([0.9, 0.999], "decay of AdamW's two moments, per step (Table 5)")
    eps: float = setting(1e-8, "AdamW's epsilon (official code)", low=0)
    clip: float | None = setting(None, low=0,
        help="largest norm of the gradient; null clips nothing (Table 5: none)")


@dataclass
class Ema:
    decay: float | None = setting(None, low=0, high=1,
        help="per step, after every step, without warm-up; null keeps no EMA (Table 5: 0.9999)")


@dataclass
class Evaluate:
    size: int = setting(224, "pixels, side of an evaluation image (Table 5)", low=1)
    crop_ratio: float = setting(0.875, low=0.01, high=1,
        help="side of the centre crop / shorter side after resizing: 224 from 256 (official code)")
    mode: str = setting("crop", choices=("crop", "squash"),
        help="crop: resize the shorter side, crop the centre; squash: warp to a square (official code at "
             "384)")
    interpolation: str = setting("bicubic", "of the resize (official code)", ("bicubic", "bilinear"))
    batch: int = setting(128, "images of one forward pass", low=1, free=True)


@dataclass
class Data:
    name: str = setting(MISSING, "a file of conf/data, as data=NAME", pattern=NAME)
    kind: str = setting(MISSING, choices=("digits", "folder", "shards", "synthetic", "trained", "evaluation"),
        help="how it is read")
    root: str | None = setting(None, free=True,
        help="folder: holds the train and val folders; shards: holds dataset.json")
    train: str = setting("train", "folder below root with one folder a class")
    val: str | None = setting("val",
        help="folder below root with one folder a class; null: there are no validation images")
    cache: str = setting("~/.cache/reconverge", "folder for indexes and generated images", free=True)
    mean: list[float] = setting([0.485, 0.456, 0.406], "of R, G, B in 0..1 (ImageNet's)")
    std: list[float] = setting([0.229, 0.224, 0.225], "of R, G, B in 0..1 (ImageNet's)")
    dataset: str | None = setting(None,
        help="shards: what dataset.json must say that it is, null takes any; data=eval/NAME: that NAME")
    labels: str | None = setting(None, "data=eval/real only: the file real.json; null: in root", free=True)
    decode: str = setting("exact", choices=("exact", "fast"),
        help="of training images: exact has Pillow's pixels; fast resamples with torch where native/ does "
             "not serve: 0.04 of 255 off on average")
    native: str = setting("auto", choices=("auto", "on", "off"), free=True,
        help="the C library of native/, which gives the same pixels sooner: auto where it can be used; on "
             "refuses to start without it")
    window: str = setting("all", pattern=r"all|[1-9][0-9]*",
        help="shuffle over everything, or, for sequential reading, within windows of so many shards")
    stage: str | None = setting(None, free=True,
        help="folder on a local disk, to which the shards of the coming windows are copied; null reads them "
             "where they are")
    stage_gb: float = setting(100.0, "10^9 bytes that stage may take on each node", low=0, free=True)
    on_bad_image: str = setting("stop", choices=("stop", "substitute"), free=True,
        help="a training image that is damaged or cannot be decoded: stop, or substitute another")
    max_substitutes: int = setting(100, low=0, free=True,
        help="different images that may be substituted before the run stops")
    images: int = setting(5120, "synthetic only: training images; a tenth as many for validation", low=10)
    classes: int = setting(1000, "synthetic only: number of classes", low=2)


@dataclass
class Tracker:
    name: str = setting("none", "mirrors metrics.jsonl", ("none", "wandb", "tensorboard"), free=True)
    project: str = setting("reconverge", "wandb only: project", free=True)


@dataclass
class Debug:
    overfit: bool = setting(False,
        help="train every step on the images of step 0, with the augmentation of epoch 0")
    profile: int = setting(0, "steps to trace into trace.json after the second one", low=0, free=True)


@dataclass
class Train:
    """train.py"""

    run: str = setting(MISSING, "name of the folder under runs/", pattern=NAME, free=True)
    seed: int = setting(0, "key of every random draw", low=0)
    batch: int = setting(MISSING, "images of one step over all ranks; recipe.batch", low=2)
    microbatch: int = setting(MISSING, low=2,
        help="images that Mixup draws for and BatchNorm averages over, even; the recipe's table by size")
    forward_images: int | None = setting(None, low=1, free=True,  # its end of R2 is recorded
        help="images of one forward pass: a microbatch in several for a small memory, or several at once for "
             "a large GPU; draws and targets stay those of microbatches; null: one microbatch")
    reduce: str = setting("ddp", choices=("ddp", "tree"),
        help="how gradients are added: ddp, overlapping the backward pass; tree, in one order on any number "
             "of ranks that is a power of two (R4)")
    epochs: int = setting(300, "length of the schedule (Table 5)", low=1)
    steps: int | None = setting(None, low=1, free=True,
        help="stop after so many steps; the schedule stays that of epochs")
    init: str | None = setting(None,
        help="weights of the first start: runs/NAME or a checkpoint of it (raw; with :ema at the end the EMA "
             "weights), a .safetensors, .pth or .pt file, a folder with config.json, timm:NAME, "
             "hf-hub:OWNER/NAME, torchvision:NAME; null: from scratch")
    init_strict: bool = setting(True,
        help="init must give every weight but the head, and none besides; false loads what fits and lists "
             "the rest")
    init_head: str = setting("auto", choices=("auto", "keep", "mapped", "fresh"),
        help="the head under init. keep: as it is; mapped: row by row, by class name; fresh: its initial "
             "weights (times model.head_init_scale); auto: keep for the same classes, else fresh")
    workers: int | None = setting(None, low=0, free=True,
        help="processes that load images; null: from the cores of this process")
    threads: int | None = setting(None, low=1,
        help="torch threads of this process; null: from its cores at the first start, then as recorded")
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), free=True,  # "hardware" is compared
        help="auto takes a GPU where there is one")
    world_timeout: float = setting(10.0, low=0.01, free=True,
        help="minutes in which every rank must answer, or the run stops and names those that did not")
    precision: str = setting("fp32", choices=("fp32", "tf32", "bf16", "fp16"),
        help="of forward and backward: fp32 (as published), bf16, fp16 (with loss scaling), tf32 (on an "
             "NVIDIA GPU since A100)")
    compile: bool = setting(False, "torch.compile the model")
    channels_last: bool = setting(False, "memory format of images and weights")
    checkpointing: bool = setting(False,
        help="recompute activations in backward: less memory, about 30 % more time")
    deterministic: bool = setting(True, "deterministic kernels only; false gives up promises R1 and R2")
    fused: bool = setting(True,
        help="AdamW as one kernel; false: a kernel an operation, and the host waits for each step's gradient "
             "norm")
    copy_ahead: bool = setting(True, free=True,
        help="load and copy the next microbatch while the device works on this one")
    save_every: str = setting("1epoch", pattern=EVERY, free=True,
        help="steps, or epochs as in 2epoch; 0: at the end only")
    evaluate_every: str = setting("1epoch", pattern=EVERY_OR_NEVER, free=True,
        help="steps, or epochs as in 2epoch; 0: at the end only; never: not at all")
    log_every: int = setting(10, "steps between two lines of metrics.jsonl", low=1, free=True)
    keep: int = setting(2, "newest checkpoints to keep, beside the best", low=1, free=True)
    resume_allow: list[str] = setting([], free=True,
        help="what may differ when a run is resumed: settings, or code, data, versions, hardware; a promise "
             "is lost and recorded")
    model: Model = field(default_factory=Model)
    recipe: Recipe = field(default_factory=Recipe)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tracker: Tracker = field(default_factory=Tracker)
    debug: Debug = field(default_factory=Debug)


@dataclass
class Suite:
    name: str = setting("none", "a file of conf/suite, as suite=NAME")
    root: str | None = setting(None, "the folder that holds the sets, each as its archive unpacks")
    sets: list[str] = setting([], "names of data=eval/NAME; those that are not there are left out, and said")


@dataclass
class Eval:
    """eval.py"""

    checkpoint: str = setting(MISSING,
        help="runs/NAME (its newest valid checkpoint) or a checkpoint of it, timm:NAME, hf-hub:OWNER/NAME, "
             "or a folder that timm reads")
    images: Any = setting(None,
        help="predict: an image, a folder of images, or a list of these; null: evaluate on data")
    size: int | None = setting(None, "pixels, side of an image; null: as the model was trained for", low=1)
    crop_ratio: float | None = setting(None, low=0.01, high=1,
        help="side of the centre crop / shorter side after resizing; null: as the model was trained for, and "
             "1 for data=eval/c, whose images are cropped")
    mode: str | None = setting(None, choices=(None, "crop", "squash"),
        help="crop: resize the shorter side, crop the centre; squash: warp to a square; null: as the model "
             "was trained for")
    interpolation: str | None = setting(None, choices=(None, "bicubic", "bilinear"),
        help="of the resize; null: as the model was trained for")
    batch: int | None = setting(None, "images of one forward pass; null: as in the run", low=1)
    workers: int | None = setting(None, low=0,
        help="processes that load images; null: from the cores of this process")
    threads: int | None = setting(None, "torch threads of this process; null: from its cores", low=1)
    device: str = setting("auto", "auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    precision: str = setting("fp32", "of the forward pass", ("fp32", "tf32", "bf16", "fp16"))
    channels_last: bool = setting(False, "memory format of images and weights")
    world_timeout: float = setting(10.0, "minutes in which every rank must answer", low=0.01)
    suite: Suite = field(default_factory=Suite)
    data: Data = field(default_factory=Data)

# fmt: on


def flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting of a section and the sections below it: dotted key, value, metadata."""
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            yield from flat(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, value, one.metadata


def section_of(schema: Any, dotted: str) -> Any:
    """The dataclass of a section such as data; None if there is none, as inside a table."""
    for part in filter(None, dotted.split(".")):
        schema = next(
            (field.type for field in fields(schema) if field.name == part and is_dataclass(field.type)), None
        )
        if schema is None:
            return None
    return schema


def help_of(schema: Any, key: str) -> str:
    """What a setting means; nothing for one that does not exist."""
    parent, _, name = key.rpartition(".")
    section = section_of(schema, parent)
    return (
        next((field.metadata.get("help", "") for field in fields(section) if field.name == name), "")
        if section
        else ""
    )
