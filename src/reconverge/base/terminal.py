"""All that is printed for a person: lines, tables, the panel at start, a live bar on a terminal and one plain
line an interval elsewhere. Imports no torch.
"""

import io
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from reconverge.base.launcher import HERE


class Terminal(Console):
    """A terminal, file or pipe.

    If nobody reads it any more (`train.py | head`), the training goes on without words.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = Terminal(soft_wrap=True, quiet=HERE.rank > 0)  # one rank speaks for all


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, emoji=False)


def panel(title: str, rows: Mapping[str, str]) -> None:
    """The start panel: a name and a text a row."""
    if not console.is_terminal:
        for name, text in rows.items():
            say(f"{name:<12} {text}")
        return
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text))
    console.print(Panel(table, title=Text(title), title_align="left", expand=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, as wide as they are; those of numbers alone to the right."""
    columns = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, *cells in zip(header, *rows, strict=True):
        numbers = all(re.fullmatch(r"[-–\d.,±% ]*", cell) for cell in cells)
        columns.add_column(Text(name), justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        columns.add_row(*map(Text, row))
    page = io.StringIO()
    Console(file=page, width=10_000, color_system=None).print(columns)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def mean_and_std(values: Sequence[float | None]) -> str:
    """The mean, and of more than one value ± the sample standard deviation; of those that are known and
    finite.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")


class Progress:
    """Steps start..end; `end` is where this process stops."""

    def __init__(self, start: int, end: int):
        self._start, self._end = start, end
        self._began = time.perf_counter()
        self._bar = Bar(BarColumn(20), TextColumn("{task.description}"), console=console)
        self._task = self._bar.add_task("", total=end, completed=start)
        if console.is_terminal:
            self._bar.start()

    def update(self, step: int, loss: float, lr: float, images_per_second: float, data_wait: float) -> None:
        """`data_wait`: share of the interval in which the host waited for images."""
        left = (time.perf_counter() - self._began) / max(1, step - self._start) * (self._end - step)
        line = (
            f"step {step}/{self._end}  loss {loss:.4f}  lr {lr:.3g}  {images_per_second:.0f} images/s  "
            f"data-wait {data_wait:.0%}  left {_duration(left)}"
        )
        if console.is_terminal:
            self._bar.update(self._task, completed=step, description=line)
        else:
            say(line)

    def close(self) -> None:
        if console.is_terminal:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (
        f"{days} d {hours} h"
        if days
        else f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds} s"
    )


class Meter:
    """Images/s, MB/s and time left of a pass over `total` bytes; a line now and then where there is no
    terminal.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total = what, max(1, total)
        self._images = self._bytes = 0
        self._began = self._said = time.perf_counter()
        self._bar = Bar(
            TextColumn(what),
            BarColumn(20),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total)

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if self._images:
            say(f"{self._what}: {self._line()}")

    def add(self, size: int, images: int = 1) -> None:
        self._images, self._bytes = self._images + images, self._bytes + size
        now = time.perf_counter()
        if now - self._said > (0.2 if console.is_terminal else 30):
            self._said = now
            self._bar.update(self._task, completed=self._bytes, description=self._line())
            if not console.is_terminal:
                say(f"{self._what}: {self._line()}")

    def _line(self) -> str:
        seconds = max(1e-6, time.perf_counter() - self._began)
        left = seconds * (self._total / max(1, self._bytes) - 1)
        return (
            f"{self._images} images, {self._images / seconds:.0f} images/s, {self._bytes / seconds / 1e6:.0f}"
            f" MB/s, left {_duration(max(0, left))}"
        )
