"""Print the table of models: parameters and multiply-adds counted now (nothing is allocated), beside the published ones."""

import argparse
from pathlib import Path

from reconverge.environment import ROOT
from reconverge.progress import say
from reconverge.settings import Model

HEADER = ("model", "parameters, M", "published", "GMACs at 224 px", "published", "top-1", "source", "recipes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table, as in docs/models.md")


def run(arguments: argparse.Namespace) -> int:
    for line in table(arguments.markdown):
        say(line)
    return 0


def table(markdown: bool) -> list[str]:
    from reconverge.models import MODELS

    models, known = _settings(ROOT / "conf" / "model"), _recipes(ROOT / "conf" / "recipe")
    rows = [HEADER]
    for name, spec in MODELS.items():
        parameters, macs = spec.count(models[name])
        recipes = ", ".join(recipe for recipe, table in known.items() if models[name].size in table)
        top1 = "–" if spec.top1 is None else f"{spec.top1:.1f}"
        rows.append((name, f"{parameters:.2f}", f"{spec.parameters:g}", f"{macs:.2f}", f"{spec.macs:g}", top1, spec.source, recipes))
    if markdown:
        return [f"| {' | '.join(row)} |" for row in (HEADER, tuple("---" for _ in HEADER), *rows[1:])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _settings(folder: Path) -> dict[str, Model]:
    """Model name -> what its file in conf/model says."""
    import yaml

    return {path.stem: Model(drop_path=0.0, **yaml.safe_load(path.read_text())) for path in folder.glob("*.yaml")}


def _recipes(folder: Path) -> dict[str, dict[str, float]]:
    """Recipe name -> its table of stochastic depth by size."""
    import yaml

    return {path.stem: yaml.safe_load(path.read_text())["recipe"]["drop_path"] for path in sorted(folder.glob("*.yaml"))}
