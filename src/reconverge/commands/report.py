"""One self-contained page of one or several runs: what they came to beside the published number, curves,
predictions, confusions, calibration, environment, and in what the runs differ. Runs that differ in their seed
alone are averaged.
"""

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reconverge.data import files
from reconverge.errors import Exit, Stop, explain
from reconverge.progress import say
from reconverge.sweep import percent

if TYPE_CHECKING:  # it imports torch
    from reconverge.report import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs/NAME")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="default: runs/NAME/report.html, of several runs report.html here",
    )
    parser.add_argument("--open", action="store_true", help="show it in a browser")


def run(arguments: argparse.Namespace) -> int:
    from reconverge import page, report

    runs = report.read(arguments.runs)
    path = arguments.to or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    _write(path, page.html(runs))
    say(table([report.row(group) for group in report.groups(runs)]))
    say(f"{path}")
    if arguments.open and not webbrowser.open(path.resolve().as_uri()):
        say("no browser was found that opens it")
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


def table(rows: Sequence["Row"]) -> str:
    """A row a group of runs, with mean ± (sample) standard deviation over its seeds."""
    lines = [["run", "step", "raw top-1", "EMA top-1", "published", "images/s", "data-wait, %"]]
    for row in rows:
        name = (
            row.runs[0]
            if len(row.runs) == 1
            else f"{row.runs[0]} ... {row.runs[-1]} (mean ± std of {row.counted})"
        )
        top1 = [percent(row.top1[kind]) for kind in ("raw", "ema")]
        step = "-" if row.step is None else str(row.step)
        lines.append([name, step, *top1, row.published or "-", percent(row.speed), percent(row.data_wait)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )
