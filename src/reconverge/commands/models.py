"""Print the table of models: parameters and multiply-adds counted now (nothing is allocated), beside the
published ones.
"""

import argparse
from pathlib import Path

from reconverge.environment import ROOT
from reconverge.progress import say
from reconverge.settings import Model

HEADER = (
    "model",
    "px",
    "parameters, M",
    "published",
    "GMACs",
    "published",
    "top-1",
    "top-1 by 22K",
    "source",
    "recipes",
    "remark",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these: models of the table, or timm's names of others"
    )
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table, as in docs/models.md")


def run(arguments: argparse.Namespace) -> int:
    for line in table(arguments.names, arguments.markdown):
        say(line)
    return 0


def table(names: list[str], markdown: bool) -> list[str]:
    """Header and rows as lines of text: one row a model and size of its images.

    Errors: Stop(USAGE) for a name that timm lacks too.
    """
    from reconverge import models

    known, recipes = _settings(ROOT / "conf" / "model"), _recipes(ROOT / "conf" / "recipe")
    rows: list[tuple[str, ...]] = []
    for name in names or models.MODELS:
        settings = known.get(name) or Model(name, "", 0.0, layer_scale=None, timm=name)
        spec = models.find(settings)
        knowing = ", ".join(recipe for recipe, sizes in recipes.items() if settings.size in sizes)
        for row in spec.published:
            parameters, macs = spec.count(settings, row.size)
            sizes = (
                f"{parameters:.2f}",
                _printed(row.parameters, whole=True),
                f"{macs:.2f}",
                _printed(row.macs),
            )
            rows.append(
                (
                    name,
                    str(row.size),
                    *sizes,
                    _printed(row.top1),
                    _printed(row.top1_22k),
                    spec.source,
                    knowing,
                    row.note,
                )
            )
    if markdown:
        return [f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows)]
    widths = [max(len(row[column]) for row in (HEADER, *rows)) for column in range(len(HEADER))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (HEADER, *rows)
    ]


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
