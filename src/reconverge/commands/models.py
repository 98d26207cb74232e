"""Print the table of models: parameters and multiply-adds, counted and as published, accuracy and recipes.

With --task segment it is the table of the paper's segmenters.

Counting allocates no weights.
"""

import argparse
from pathlib import Path

from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say, table
from reconverge.config.settings import Model

HEADER = ("model=", "px", "params, M", "params, M (paper)", "GMACs", "GMACs (paper)", "top-1 (paper)",
    "top-1 with 22K (paper)", "source", "recipes", "remark")  # fmt: skip
INTRODUCTION = """\
# Models

This table lists the models of the paper by the name that the command line takes, such as
`python train.py model=convnext_t`. It is written by `reconverge models --markdown > docs/models.md`; a test
keeps it current. `reconverge models NAME` counts any other model of timm.

| column | meaning |
| --- | --- |
| model= | name on the command line; `roadmap/...` are the steps of [the roadmap](roadmap.md) |
| px | side of the square training and evaluation images, in pixels |
| params, M | millions of parameters with 1000 classes: counted in the model that this code builds |
| params, M (paper) | the same as printed in the paper or its code |
| GMACs | billions of multiply-adds of one forward pass of one image (1 GMAC is 2 GFLOPs): counted here |
| GMACs (paper) | the same as printed in the paper, which calls them FLOPs |
| top-1 (paper) | published top-1 accuracy on ImageNet-1K in percent, trained on ImageNet-1K alone |
| top-1 with 22K (paper) | the same, pre-trained on ImageNet-22K and fine-tuned on ImageNet-1K |
| source | where the published numbers stand; tables are those of arXiv 2201.03545 |
| recipes | recipes that have values for a model of this size and train at this image size |
| remark | why a count differs from the printed number, or what else is published |

A dash means that nothing is published. `recipe=demo` trains at 32 px, so it is in no row.
`recipe=finetune` is listed at its default of 224 px; `augment.size=` and `evaluate.size=` change it.
For the models `roadmap/...` use `recipe=in1k_roadmap`, which has no EMA, because EMA harms models with
BatchNorm.
"""

SEGMENT_HEADER = ("backbone", "pre-training", "crop, px", "params, M", "params, M (paper)", "GMACs",
    "GMACs (paper)", "mIoU, multi-scale (paper)", "mIoU, single-scale (paper)", "mIoU, multi-scale (mmseg)",
    "mIoU, single-scale (mmseg)")  # fmt: skip
SEGMENT_INTRODUCTION = """\

## Semantic segmentation

`reconverge models --task segment` prints this table: UPerNet on ADE20K (Table 4 of the paper; single-scale
mIoU from Table 7), with the cost counted in the model that this code builds. Training is not there yet.

| column | meaning |
| --- | --- |
| backbone | the classifier whose four stages UPerNet uses |
| pre-training | data of the backbone's initial weights: ImageNet-1K (in1k) or ImageNet-22K (in22k) |
| crop, px | side of the training images; costs are those of one image of crop x 4 crop pixels |
| params, M | millions of parameters with 150 classes and the auxiliary head, counted |
| GMACs | billions of multiply-adds of convolutions and linear layers, without the auxiliary head: counted |
| mIoU (paper) | published mean intersection over union on the validation images, in percent |
| mIoU (mmseg) | the same when OpenMMLab trained with these settings; the difference shows the noise |

The published multiply-adds are up to 1 larger than those counted here; norms, activations, pooling and
resizing are not counted. The model consists of these parts:

- **Backbone**: any model of timm with four stages at the strides 4, 8, 16 and 32, such as ConvNeXt, Swin or
  ResNet. Models of one resolution (ViT, isotropic ConvNeXt) are refused. The classifier's last norm and head
  are removed, and each output gets a new layer norm over its channels, with eps 1e-6.
- **Decoder**: UPerNet of segmentation-models-pytorch with 512 channels, whose results equal those of
  mmsegmentation and transformers. An auxiliary head looks at the third stage in training; its loss counts
  0.4. Both classifiers have Dropout2d with rate 0.1 before them.
- **Loss**: cross-entropy of each pixel, summed and divided by all pixels of the batch. Ignored pixels (255)
  add 0 and count in the divisor, as in the published code.
- **Initial weights**: of the backbone, those of `init=`. The convolutions of the heads are drawn from
  Kaiming's normal distribution (fan out), the two classifiers from a normal distribution with std 0.01, as in
  mmsegmentation, by keys of the seed.
- **Reproducibility**: masks of dropout and stochastic depth are drawn by keys. Adaptive pooling and bilinear
  resizing are two matrix products each, and the loss is computed on rows of pixels, so a step
  uses no operation of torch's list of non-deterministic CUDA operations but convolutions, for which torch
  chooses deterministic algorithms. This was tested on the CPU, by the names of the operations. BatchNorm
  follows microbatch 0, as in classifiers.
- **Layer decay**: `optim.layer_groups=stage_wise`, with 0.9 in the published runs. The heads have the
  learning rate of the recipe. The blocks of the stages are 3 to 6 layers below them (T), or 9 to 12 (S to
  XL), and the stem and the downsampling layers are one layer lower still.
- **Files**: the authors' segmentation files and those of mmsegmentation 1 (UPerNet on ConvNeXt) load by their
  names. A classifier in any layout of `init=` loads as the backbone.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="only these models: names of the table or of timm (default: the whole table)",
    )
    parser.add_argument(
        "--task",
        choices=("classify", "segment"),
        help="classify (default): the table of classifiers; segment: the paper's segmenters on ADE20K",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the page docs/models.md: Markdown, with a legend"
    )


def main(arguments: argparse.Namespace) -> int:
    tables = []
    if arguments.task != "segment":
        tables.append((INTRODUCTION, HEADER, counted(arguments.names)))
    if arguments.task == "segment" or (arguments.markdown and not (arguments.task or arguments.names)):
        tables.append((SEGMENT_INTRODUCTION, SEGMENT_HEADER, segmenters(arguments.names)))
    for introduction, header, rows in tables:
        if arguments.markdown:
            say(introduction)
            for row in (header, ["---"] * len(header), *rows):
                say(f"| {' | '.join(row)} |")
        else:
            say(table(header, rows))
    return Exit.DONE


def segmenters(names: list[str]) -> list[list[str]]:
    """One row for each published segmenter, or for those with these backbones.

    Errors: Stop(USAGE) for a backbone that Table 4 does not have.
    """
    from reconverge.models import segmentation

    published = segmentation.published()
    known = list(dict.fromkeys(row.backbone for row in published))
    if unknown := [name for name in names if name not in known]:
        raise Stop(
            Exit.USAGE,
            f"reconverge models --task segment {' '.join(unknown)}",
            f"the backbones of Table 4: {', '.join(known)}",
            "one of these names, or none for the whole table",
        )
    files, rows = _settings(ROOT / "conf" / "model"), []
    for row in published:
        if not names or row.backbone in names:
            parameters, macs = segmentation.count(files[row.backbone], row.crop)
            costs = [f"{parameters:.2f}", f"{row.parameters:g}", f"{macs:.1f}", f"{row.macs:g}"]
            rows.append([row.backbone, row.pretrained, str(row.crop), *costs, *map(_printed, row[5:])])
    return rows


def counted(names: list[str]) -> list[list[str]]:
    """One row of the table for each model and image size.

    Errors: Stop(USAGE) for a name that neither the table nor timm has.
    """
    from reconverge.models.table import MODELS, find

    files, recipes = _settings(ROOT / "conf" / "model"), _recipes(ROOT / "conf" / "recipe")
    typed = {settings.name: name for name, settings in files.items()}  # model.name -> what follows model=
    rows = []
    for name in names or [typed[name] for name in MODELS]:
        name = typed.get(name, name)
        settings = files.get(name) or Model(name, "", 0.0, layer_scale=None, timm=name)
        spec = find(settings)
        for row in spec.published:
            knowing = ", ".join(
                recipe
                for recipe, (pixels, sizes) in recipes.items()
                if settings.size in sizes and pixels == row.size
            )
            parameters, macs = spec.count(settings, row.size)
            sizes = [
                f"{parameters:.2f}",
                _printed(row.parameters, whole=True),
                f"{macs:.2f}",
                _printed(row.macs),
            ]
            accuracy = [_printed(row.top1), _printed(row.top1_22k)]
            rows.append([name, str(row.size), *sizes, *accuracy, spec.source, knowing, row.note])
    return rows


def _printed(number: float | None, whole: bool = False) -> str:
    """A number as the paper prints it: with at least one decimal, or with none if `whole` and an integer."""
    return "–" if number is None else f"{number:g}" if whole else f"{number:.2f}".removesuffix("0")


def _settings(folder: Path) -> dict[str, Model]:
    """What follows model= -> the settings of that file in conf/model, without drop_path and image_size."""
    import yaml

    contents = {
        path.relative_to(folder).with_suffix("").as_posix(): yaml.safe_load(path.read_text())
        for path in folder.rglob("*.yaml")
    }
    return {name: Model(**given | {"drop_path": 0.0, "image_size": None}) for name, given in contents.items()}


def _recipes(folder: Path) -> dict[str, tuple[int, dict[str, float]]]:
    """Recipe name -> side of its training images in pixels, and its drop_path rates by model size."""
    import yaml

    contents = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))}
    return {
        name: (given["augment"]["size"], given["recipe"]["drop_path"]) for name, given in contents.items()
    }
