"""Every setting: name, type, default, allowed values, meaning, unit and source. Imports no torch.

This file is the only place where settings are defined; `python train.py --help` and docs/settings.md are
printed from it. "Table 5" and "Table 6" are those of "A ConvNet for the 2020s" (arXiv 2201.03545 v2). The
defaults here are neutral: the values of an experiment are in conf/recipe/. Each part of the program gets its
own section and plain values, never the whole configuration.
"""

from dataclasses import dataclass, field
from typing import Any

from reconverge.config.setting import MISSING, setting

# fmt: off

NAME = r"[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*"  # a plain folder name: no separators, not "." or ".."
EVERY = r"[0-9]+(epoch)?"
EVERY_OR_NEVER = EVERY + "|never"
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
TASKS = CLASSIFY, SEGMENT = ("classify", "segment")
# The number of an evaluation that says which weights are best, in percent, and its name in words.
SCORES = {CLASSIFY: ("top1", "top-1"), SEGMENT: ("miou", "mIoU")}


@dataclass
class Model:
    """The network"""

    name: str = setting(MISSING, "name of the model, chosen by model=NAME")
    size: str = setting(MISSING,
        help="size class of the model (atto, t, s, b, l, ...): chooses the row of the recipe's tables")
    drop_path: float = setting(MISSING, low=0, high=0.99, source="Table 5",
        help="stochastic depth (drop path): drop rate of the last block; it grows linearly over the blocks")
    layer_scale: float | None = setting(1e-6, low=0, source="Table 5",
        help="initial value of layer scale (gamma of each block's branch); null: no layer scale, and for "
             "models of timm what timm does")
    head_init_scale: float = setting(1.0, low=0, source="Table 6: 0.001 for fine-tuning", task=CLASSIFY,
        help="multiplies the initial weights of the classifier head")
    image_size: int | None = setting(None, low=1, unit="pixels",
        help="image size that the model is built for (ViT and Swin: augment.size); null: any size")
    timm: str | None = setting(None, pattern=NAME, help="with model=timm: the name of the timm model")


@dataclass
class Recipe:
    """The recipe's own tables"""

    name: str = setting(MISSING, "name of the recipe, chosen by recipe=NAME")
    task: str = setting(CLASSIFY, choices=TASKS, free=True, help="task that the recipe is for")
    dataset: str | None = setting(None, choices=(None, "imagenet1k", "imagenet22k", "ade20k"), free=True,
        help="training images of the published run; null: the recipe reproduces no published run")
    starts_from: str | None = setting(None, free=True,
        help="the pre-trained weights that the recipe expects, in words; null: it trains from scratch")
    batch: int = setting(MISSING, low=1, unit="images", help="batch size of the recipe")
    drop_path: dict[str, float] = setting({}, source="Table 5", help="model.drop_path for each model size")
    microbatch: dict[str, int] = setting({}, source="published images per GPU", unit="images",
        help="microbatch for each model size")
    ema: dict[str, float | None] = setting({}, source="Table 6",
        help="ema.decay for each model size, where it depends on the size")
    peak_lr: dict[str, float] = setting({}, source="the authors' configurations",
        help="optim.lr for each model size, where it depends on the size")
    expected: dict[str, float] = setting({}, free=True, unit="percent",
        help="published top-1 or mIoU for each model name")
    noise: float | None = setting(None, low=0, free=True, unit="percentage points",
        help="how far independent runs of the recipe are from the published number")


@dataclass
class Augment:
    """Augmentation of training images"""

    size: int = setting(224, low=1, source="Table 5", unit="pixels",
        help="side of a training image; task=segment: of the random crop")
    scale: list[float] = setting([0.08, 1.0], source="timm", task=CLASSIFY,
        help="random resized crop: smallest and largest share of the image's area")
    ratio: list[float] = setting([0.75, 4 / 3], source="timm", task=CLASSIFY,
        help="random resized crop: smallest and largest aspect ratio")
    interpolation: str = setting("bicubic", choices=("bicubic", "bilinear", "random"), task=CLASSIFY,
        source="official code", help="random resized crop: interpolation of the resize")
    flip: float = setting(0.5, low=0, high=1, unit="probability", help="horizontal flip")
    auto: str = setting("rand-m9-mstd0.5-inc1", pattern=r"none|rand(-(m|n|p|mmax|mstd|inc)[0-9.]+)*",
        source="Table 5: magnitude 9, std 0.5", task=CLASSIFY,
        help="RandAugment policy in timm's notation; none: no RandAugment")
    repeats: int = setting(1, low=1, source="DeiT: 3",
        help="repeated augmentation: how often each chosen image occurs in an epoch")
    erase: float = setting(0.25, low=0, high=1, source="Table 5, mode pixel", unit="probability",
        task=CLASSIFY, help="random erasing: a rectangle is replaced by normal noise")


@dataclass
class Mix:
    """Mixup, CutMix and label smoothing"""

    mixup: float = setting(0.8, low=0, source="Table 5", task=CLASSIFY,
        help="alpha of Mixup's beta distribution; 0: no Mixup")
    cutmix: float = setting(1.0, low=0, source="Table 5", task=CLASSIFY,
        help="alpha of CutMix's beta distribution; 0: no CutMix")
    probability: float = setting(1.0, low=0, high=1, unit="probability", source="timm", task=CLASSIFY,
        help="that a microbatch is mixed at all")
    switch: float = setting(0.5, low=0, high=1, unit="probability", source="timm", task=CLASSIFY,
        help="that a mixed microbatch gets CutMix instead of Mixup, where both are on")
    smoothing: float = setting(0.1, low=0, high=1, source="Table 5", task=CLASSIFY,
        help="label smoothing")


@dataclass
class Optim:
    """Optimizer (AdamW) and learning rate"""

    lr: float = setting(4e-3, low=0, source="Table 5",
        help="peak learning rate, for batches of optim.lr_batch images if it is given, else of recipe.batch")
    lr_batch: int | None = setting(None, low=1, unit="images",
        help="lr, min_lr and warmup_lr are multiplied by batch / lr_batch; null: they never follow the batch")
    min_lr: float = setting(1e-6, low=0, source="official code",
        help="learning rate at the end of the cosine")
    warmup_lr: float = setting(0.0, low=0, source="official code: 0; DeiT: 1e-6",
        help="learning rate at the beginning of the warm-up")
    warmup_epochs: int = setting(20, low=0, source="Table 5", unit="epochs",
        help="length of the linear warm-up")
    warmup_steps: int | None = setting(None, low=0, unit="steps",
        help="length of the linear warm-up, instead of optim.warmup_epochs; null: in epochs")
    schedule: str = setting("convnext", choices=("convnext", "deit", "swin", "poly"),
        help="convnext, deit, swin: warm-up and cosine by the formula of that code (deit changes the "
             "learning rate at each epoch, the others at each step); poly: mmsegmentation's linear decay")
    layer_decay: float = setting(1.0, low=0.01, high=1, source="Table 6: 0.7 and 0.8",
        help="layer-wise learning-rate decay: learning rate of a layer / that of the next layer; 1: no decay")
    layer_groups: str = setting("auto", choices=("auto", "stages", "stage_wise", "blocks"),
        help="what counts as a layer for layer_decay: stages (ConvNeXt's published groups), stage_wise (its "
             "groups in segmentation), blocks (each block), or auto (stages for ConvNeXt, blocks for others)")
    weight_decay: float = setting(0.05, low=0, source="Table 5",
        help="decoupled weight decay, on weights of two or more dimensions only")
    betas: list[float] = setting([0.9, 0.999], source="Table 5",
        help="AdamW's betas: decay of the first and second moments per step")
    eps: float = setting(1e-8, low=0, source="official code", help="AdamW's epsilon")
    clip: float | None = setting(None, low=0, source="Table 5: none",
        help="gradient clipping: largest norm of the whole gradient; null: no clipping")


@dataclass
class Ema:
    """Exponential moving average of the weights (EMA)"""

    decay: float | None = setting(None, low=0, high=1, source="Table 5: 0.9999",
        help="decay of the EMA per step, without warm-up; null: no EMA")


@dataclass
class Segment:
    """Semantic segmentation (task=segment): UPerNet, its augmentation and its evaluation"""

    channels: int = setting(512, low=2, source="Table 4's UPerNet", task=SEGMENT,
        help="width of UPerNet's decoder; the auxiliary head has half of it")
    resize: list[int] = setting([2048, 512], source="mmsegmentation", unit="pixels", task=SEGMENT,
        help="longest and shortest side: an image is resized until one of its sides has this length")
    scale: list[float] = setting([0.5, 2.0], source="mmsegmentation", task=SEGMENT,
        help="training images are resized by a random factor between these two as well")
    distort: bool = setting(True, source="mmsegmentation's PhotoMetricDistortion", task=SEGMENT,
        help="random changes of brightness, contrast, saturation and hue of training images")
    window: int = setting(0, low=0, source="Table 7: 512, or 640", unit="pixels", task=SEGMENT,
        help="evaluation: side of windows that slide over the image; 0: the whole image at once")
    stride: int = setting(0, low=0, source="Table 7: 341, or 426", unit="pixels", task=SEGMENT,
        help="evaluation: distance between two windows")
    scales: list[float] = setting([1.0], source="Table 4: 0.5 to 1.75", task=SEGMENT,
        help="evaluation: the image is looked at in each of these sizes, and probabilities are averaged")
    flip: bool = setting(False, source="Table 4: true", task=SEGMENT,
        help="evaluation: look at each size in a mirror, too")


@dataclass
class Evaluate:
    """How validation images are prepared (task=classify)"""

    size: int = setting(224, low=1, source="Table 5", task=CLASSIFY, unit="pixels",
        help="side of an evaluation image; it does not follow augment.size")
    crop_ratio: float = setting(0.875, low=0.01, high=1, source="official code: 224 from 256", task=CLASSIFY,
        help="side of the centre crop / shorter side after resizing")
    mode: str = setting("crop", choices=("crop", "squash"), source="official code; squash at 384 pixels",
        task=CLASSIFY,
        help="crop: resize the shorter side and crop the centre; squash: resize to a square")
    interpolation: str = setting("bicubic", choices=("bicubic", "bilinear"), task=CLASSIFY,
        source="official code",
        help="interpolation of the resize")
    batch: int = setting(128, low=1, free=True, unit="images", task=CLASSIFY,
        help="images of one forward pass in evaluation")


@dataclass
class Data:
    """The data set"""

    name: str = setting(MISSING, pattern=NAME, help="name of the data set, chosen by data=NAME")
    kind: str = setting(MISSING, help="how the data set is stored",
        choices=("digits", "folder", "shards", "synthetic", "scenes", "maps", "ade20k", "trained",
                 "evaluation"))
    root: str | None = setting(None, free=True,
        help="data=folder: the folder that holds train/ and val/; shards: the folder that holds "
             "dataset.json; maps: the folder that holds images/ and maps/")
    train: str = setting("train",
        help="data=folder: folder of the training images below root, with one folder for each class; maps: "
             "folder below images/ and maps/")
    val: str | None = setting("val",
        help="the same of the validation images; null: no validation images")
    ignore: int | None = setting(255, low=0, high=255, task=SEGMENT,
        help="data=maps: value of pixels without a class in label maps; null: none")
    cache: str = setting("~/.cache/reconverge", free=True,
        help="folder for indexes of data sets and for generated images")
    mean: list[float] = setting([0.485, 0.456, 0.406], source="ImageNet's", unit="of values in 0..1",
        help="mean of R, G, B for normalisation")
    std: list[float] = setting([0.229, 0.224, 0.225], source="ImageNet's", unit="of values in 0..1",
        help="standard deviation of R, G, B for normalisation")
    dataset: str | None = setting(None,
        help="shards: the data set that dataset.json must name, null takes any; data=eval/NAME: NAME")
    labels: str | None = setting(None, free=True,
        help="data=eval/real only: path of real.json; null: it is in data.root")
    decode: str = setting("exact", choices=("exact", "fast"), task=CLASSIFY,
        help="exact: the pixels of Pillow; fast: resize with torch where the native decoder cannot be used, "
             "which changes pixels by 0.04 of 255 on average")
    native: str = setting("auto", choices=("auto", "on", "off"), free=True,
        help="the native decoder, which gives Pillow's pixels faster; auto: use it where it works; on: "
             "refuse to train without it")
    window: str = setting("all", pattern=r"all|[1-9][0-9]*", unit="shards",
        help="all: shuffle the whole data set; a number: shuffle within groups of so many shards, so that "
             "disks read sequentially")
    stage: str | None = setting(None, free=True,
        help="folder on a local disk to which the next shards are copied; null: read shards where they are")
    stage_gb: float = setting(100.0, low=0, free=True, unit="10^9 bytes for each node",
        help="largest size of data.stage")
    on_bad_image: str = setting("stop", choices=("stop", "substitute"), free=True,
        help="when an image is damaged: stop; or use another training image in its place, and leave a "
             "validation image out of the evaluation")
    max_substitutes: int = setting(100, low=0, free=True, unit="images",
        help="how many damaged images may be replaced before the run stops")
    images: int = setting(5120, low=10, unit="images",
        help="data=synthetic only: number of training images; a tenth as many for validation")
    classes: int = setting(1000, low=2, help="data=synthetic only: number of classes")


@dataclass
class Machine:
    """The machine preset"""

    name: str = setting("auto", "name of the preset, chosen by machine=NAME", pattern=NAME, free=True)


@dataclass
class Tracker:
    """Experiment tracker"""

    name: str = setting("none", choices=("none", "wandb", "tensorboard"), free=True,
        help="tracker that gets a copy of metrics.jsonl")
    project: str = setting("reconverge", free=True, help="wandb only: name of the project")


@dataclass
class Debug:
    """Debugging"""

    overfit: bool = setting(False, "train all steps on the images of the first step, augmented once")
    profile: int = setting(0, low=0, free=True, unit="steps",
        help="write a profiler trace of so many steps, after the second one, to trace.json")


@dataclass
class Train:
    """train.py"""

    run: str = setting(MISSING, pattern=NAME, free=True, heading="The run",
        help="name of the run's folder below runs/")
    task: str = setting(CLASSIFY, choices=TASKS, help="what is learned, chosen by task=NAME")
    seed: int = setting(0, low=0, help="seed of every random number")
    init: str | None = setting(None,
        help="initial weights: runs/NAME or one of its checkpoints (add :ema for the EMA weights; after "
             "runs/NAME also :best for the checkpoint with their best top-1 or mIoU), a .safetensors, .pth "
             "or .pt file, a folder with config.json, timm:NAME, hf-hub:OWNER/NAME, torchvision:NAME; null: "
             "from scratch")
    init_strict: bool = setting(True,
        help="init must have every weight of the model except the head, and no other; false: load what fits "
             "and list the rest")
    init_head: str = setting("auto", choices=("auto", "keep", "mapped", "fresh"),
        help="the classifier head of init. keep: load it; mapped: load the rows of classes with the same "
             "name; fresh: new initial weights; auto: keep if the classes are the same, else fresh")
    resume_allow: list[str] = setting([], free=True,
        help="names of what may differ when a run is resumed although it ends R2: settings, or code, data, "
             "versions, libraries, hardware")

    batch: int = setting(MISSING, low=2, unit="images", heading="Batch and length of training",
        help="batch size: images of one optimizer step over all ranks (default: the recipe's)")
    microbatch: int = setting(MISSING, low=2, unit="images",
        help="images that Mixup and BatchNorm see together; even; batch / microbatch forward and backward "
             "passes make a step (gradient accumulation; default: the recipe's, by model size)")
    epochs: int = setting(300, low=1, source="Table 5", unit="epochs",
        help="length of training and of the learning-rate schedule")
    schedule_steps: int | None = setting(None, low=1, unit="steps",
        help="length of training and of the learning-rate schedule, instead of epochs; null: in epochs")
    steps: int | None = setting(None, low=1, free=True, unit="steps",
        help="stop after so many steps; the schedule stays as it is")

    device: str = setting("auto", choices=DEVICES, free=True, heading="Hardware and speed",
        help="auto: a GPU if there is one")  # a change of "hardware" is noticed and refused on its own
    precision: str = setting("fp32", choices=PRECISIONS,
        source="published: torch 1.8's float32, which is tf32 on an A100 and fp32 on older GPUs",
        help="mixed precision: bf16, fp16 (with loss scaling), or tf32 matrix products (NVIDIA GPUs since "
             "A100)")
    compile: bool = setting(False, "compile the model with torch.compile")
    channels_last: bool = setting(False, "channels_last memory format of images and weights")
    checkpointing: bool = setting(False,
        help="activation (gradient) checkpointing: less memory, about 30 % more time")
    forward_images: int | None = setting(None, low=1, free=True, unit="images",  # the end of R2 is recorded
        help="images of one forward pass: less than a microbatch saves memory, several microbatches fill a "
             "large GPU; a change ends R1 and R2; null: one microbatch")
    workers: int | None = setting(None, low=0, free=True, unit="processes",
        help="data workers of each rank; null: chosen from the CPU cores of this process")
    threads: int | None = setting(None, low=1, unit="threads",
        help="CPU threads of torch in each rank; null: chosen from the CPU cores at first, then kept")
    deterministic: bool = setting(True,
        help="use deterministic kernels only; false: no promise of equal bits (R1, R2)")
    fused: bool = setting(True,
        help="one fused AdamW kernel; false: many kernels, and the CPU waits for each gradient norm")
    copy_ahead: bool = setting(True, free=True,
        help="copy the next microbatch to the device while it works on this one")
    reduce: str = setting("ddp", choices=("ddp", "tree"),
        help="how gradients of ranks are added: ddp, overlapped with the backward pass; tree, in one order "
             "that gives the same bits for 1, 2, 4, 8, ... ranks (R4)")
    world_timeout: float = setting(10.0, low=0.01, free=True, unit="minutes",
        help="a run stops and names the missing rank when a rank does not answer for so long")

    save_every: str = setting("1epoch", pattern=EVERY, free=True, unit="steps, or epochs as in 2epoch",
        heading="Checkpoints, evaluation and logs",
        help="how often a checkpoint is saved; 0: only at the end")
    keep: int = setting(2, low=1, free=True, unit="checkpoints",
        help="how many of the newest checkpoints are kept; the best ones are always kept")
    evaluate_every: str = setting("1epoch", pattern=EVERY_OR_NEVER, free=True,
        unit="steps, or epochs as in 2epoch",
        help="how often the validation images are evaluated; 0: only at the end; never: not at all")
    log_every: int = setting(10, low=1, free=True, unit="steps",
        help="how often a line is printed and written to metrics.jsonl")
    model: Model = field(default_factory=Model)
    recipe: Recipe = field(default_factory=Recipe)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    segment: Segment = field(default_factory=Segment)
    evaluate: Evaluate = field(default_factory=Evaluate)
    machine: Machine = field(default_factory=Machine)
    tracker: Tracker = field(default_factory=Tracker)
    debug: Debug = field(default_factory=Debug)


@dataclass
class Suite:
    """Several evaluation sets at once"""

    name: str = setting("none", "name of the suite, chosen by suite=NAME")
    root: str | None = setting(None, "folder that holds the sets, each as its archive unpacks")
    sets: list[str] = setting([],
        help="which sets, by the names of data=eval/NAME; missing ones are named and left out")


@dataclass
class Eval:
    """eval.py"""

    checkpoint: str = setting(MISSING, heading="What is evaluated",
        help="runs/NAME (its newest valid checkpoint), one of its checkpoints, timm:NAME, hf-hub:OWNER/NAME, "
             "or a folder that timm reads")
    images: Any = setting(None,
        help="predict these images (a file, a folder, or a list of them) instead of evaluating a data set")
    size: int | None = setting(None, low=1, unit="pixels", heading="How images are prepared",
        help="side of an image; null: as the model was trained for")
    crop_ratio: float | None = setting(None, low=0.01, high=1,
        help="side of the centre crop / shorter side after resizing; null: as the model was trained for, and "
             "1 for data=eval/c, whose images are already cropped")
    mode: str | None = setting(None, choices=(None, "crop", "squash"),
        help="crop: resize the shorter side and crop the centre; squash: resize to a square; null: as the "
             "model was trained for")
    interpolation: str | None = setting(None, choices=(None, "bicubic", "bilinear"),
        help="interpolation of the resize; null: as the model was trained for")
    batch: int | None = setting(None, low=1, unit="images",
        help="images of one forward pass; null: as in the run")
    workers: int | None = setting(None, low=0, unit="processes", heading="Hardware and speed",
        help="data workers of each rank; null: chosen from the CPU cores of this process")
    threads: int | None = setting(None, low=1, unit="threads",
        help="CPU threads of torch in each rank; null: chosen from the CPU cores")
    device: str = setting("auto", choices=DEVICES, help="auto: a GPU if there is one")
    precision: str = setting("fp32", choices=PRECISIONS, help="precision of the forward pass")
    channels_last: bool = setting(False, "channels_last memory format of images and weights")
    world_timeout: float = setting(10.0, low=0.01, unit="minutes",
        help="the evaluation stops and names the missing rank when a rank does not answer for so long")
    suite: Suite = field(default_factory=Suite)
    data: Data = field(default_factory=Data)

# fmt: on
