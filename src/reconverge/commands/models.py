"""Print the table of models: parameters and multiply-adds, counted and as published, accuracy and recipes.

Counting allocates no weights.
"""

import argparse
from pathlib import Path

from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="only these models: names of the table or of timm (default: the whole table)",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the page docs/models.md: Markdown, with a legend"
    )


def main(arguments: argparse.Namespace) -> int:
    rows = counted(arguments.names)
    if arguments.markdown:
        say(INTRODUCTION)
        for row in (HEADER, ["---"] * len(HEADER), *rows):
            say(f"| {' | '.join(row)} |")
    else:
        say(table(HEADER, rows))
    return Exit.DONE


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
