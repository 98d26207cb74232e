"""Print the table of models: parameters and multiply-adds counted now (nothing is allocated), beside the
published ones.
"""

import argparse
from pathlib import Path

from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit
from reconverge.base.terminal import say, table
from reconverge.config.settings import Model

HEADER = ("model", "px", "parameters, M", "published", "GMACs", "published", "top-1", "top-1 by 22K",
    "source", "recipes", "remark")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these: models of the table, or timm's names of others"
    )
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table, as in docs/models.md")


def main(arguments: argparse.Namespace) -> int:
    rows = counted(arguments.names)
    if arguments.markdown:
        for row in (HEADER, ["---"] * len(HEADER), *rows):
            say(f"| {' | '.join(row)} |")
    else:
        say(table(HEADER, rows))
    return Exit.DONE


def counted(names: list[str]) -> list[list[str]]:
    """One row a model and size of its images, under HEADER.

    Errors: Stop(USAGE) for a name that timm lacks too.
    """
    from reconverge.models.table import MODELS, find

    known, recipes = _settings(ROOT / "conf" / "model"), _recipes(ROOT / "conf" / "recipe")
    rows = []
    for name in names or MODELS:
        settings = known.get(name) or Model(name, "", 0.0, layer_scale=None, timm=name)
        spec = find(settings)
        knowing = ", ".join(recipe for recipe, sizes in recipes.items() if settings.size in sizes)
        for row in spec.published:
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
    """As the paper prints it: with one decimal at least, or `whole` where it is."""
    return "–" if number is None else f"{number:g}" if whole else f"{number:.2f}".removesuffix("0")


def _settings(folder: Path) -> dict[str, Model]:
    """Model name -> what its file in conf/model says, without stochastic depth and the size of the images."""
    import yaml

    contents = [yaml.safe_load(path.read_text()) for path in folder.rglob("*.yaml")]
    return {given["name"]: Model(**given | {"drop_path": 0.0, "image_size": None}) for given in contents}


def _recipes(folder: Path) -> dict[str, dict[str, float]]:
    """Recipe name -> its table of stochastic depth by size."""
    import yaml

    return {
        path.stem: yaml.safe_load(path.read_text())["recipe"]["drop_path"]
        for path in sorted(folder.glob("*.yaml"))
    }
