"""One self-contained HTML page on one or several runs: top-1 (beside the published number, where there is
one), curves, predictions, confusions, calibration, settings and environment. Runs that differ only in seed
are averaged.
"""

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reconverge.base import files
from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.terminal import mean_and_std, say, table
from reconverge.config.settings import SCORES

if TYPE_CHECKING:  # it imports torch
    from reconverge.report.numbers import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs/NAME")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="default: runs/NAME/report.html; for several runs, report.html in this folder",
    )
    parser.add_argument("--open", action="store_true", help="show it in a browser")


def main(arguments: argparse.Namespace) -> int:
    from reconverge.report import numbers, page

    runs = numbers.read(arguments.runs)
    path = arguments.to or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    _write(path, page.html(runs))
    names = list(dict.fromkeys(SCORES[run.cfg.task][1] for run in runs))
    say(summary([numbers.row(group) for group in numbers.groups(runs)], " or ".join(names)))
    say(f"{path}")
    if arguments.open and not webbrowser.open(path.resolve().as_uri()):
        say("no browser was found to open it")
    return Exit.DONE


def _write(path: Path, text: str) -> None:
    """Errors: Stop."""
    try:
        files.write_whole(path, text)
    except OSError as error:
        stop = explain(error)
        raise Stop(
            stop.code if stop else Exit.USAGE,
            f"{path} cannot be written: {error.strerror}",
            "a file in a folder that exists, that this user may write and that has space left",
            "--to FILE.html",
        ) from None


def summary(rows: Sequence["Row"], score: str) -> str:
    """A row a group of runs, with mean ± (sample) standard deviation over its seeds; without the columns in
    which no row has anything. `score`: top-1 or mIoU.
    """
    heads = ["run", "step", f"raw {score}", f"EMA {score}", f"best {score}", "published", "left out",
        "images/s", "data-wait, %"]  # fmt: skip
    lines = []
    for row in rows:
        name = row.runs[0]
        if len(row.runs) > 1:
            name += f" ... {row.runs[-1]} (mean ± std of {row.counted})"
        step, best = "-" if row.step is None else str(row.step), [one.score for one in row.best]
        numbers = (row.scores["raw"], row.scores["ema"], best, row.speed, row.data_wait)
        raw, ema, highest, speed, wait = map(mean_and_std, numbers)
        damaged = ", ".join(map(str, sorted(set(row.left_out)))) if any(row.left_out) else "-"
        lines.append([name, step, raw, ema, highest, row.published or "-", damaged, speed, wait])
    kept = [column for column in zip(heads, *lines, strict=True) if set(column[1:]) != {"-"}]
    head, *lines = map(list, zip(*kept, strict=True))
    return table(head, lines)
