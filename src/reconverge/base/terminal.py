"""All that is printed for a person: lines, tables, the panel at start, a live bar on a terminal and one plain
line an interval elsewhere. Imports no torch.
"""

import io
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from reconverge.base.launcher import HERE

BAR = 12  # columns of a live bar; a line of 60 columns keeps room for the step, the loss and the time left
GAP = "  "
EMPTY = ("", "-", "–")  # cells of a table that say nothing


console = Console(soft_wrap=True, quiet=HERE.rank > 0)  # one rank speaks for all


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, emoji=False)


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 thread, 2 threads; `plural` for a noun that takes more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def panel(title: str, rows: Mapping[str, str]) -> None:
    """The start panel: a name and a text a row; outside a terminal plain lines."""
    if not console.is_terminal:
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            say(f"{name:<{width}} {text}")
        return
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text))
    console.print(Panel(table, title=Text(title), title_align="left", expand=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, as wide as they are; those of numbers alone to the right. A column without any
    entry is left out.
    """
    filled = [any(row[number] not in EMPTY for row in rows) or not rows for number in range(len(header))]
    header, *rows = [
        [cell for cell, full in zip(row, filled, strict=True) if full] for row in (header, *rows)
    ]
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


class Line(ProgressColumn):
    """What a bar says beside itself: those of its `parts`, pairs of a text and its rank, that fit into the
    terminal. It is fitted anew whenever it is drawn, for a window may change its size.
    """

    def render(self, task: Task) -> Text:
        return Text(fitted(task.fields["parts"], console.width - BAR - 1), no_wrap=True)


def fitted(parts: Sequence[tuple[str, int]], width: int) -> str:
    """The texts that fit into `width` columns, in their order; the highest ranks are dropped first."""
    kept = list(parts)
    while len(kept) > 1 and len(GAP.join(text for text, _ in kept)) > width:
        kept.remove(max(kept, key=lambda part: part[1]))
    return GAP.join(text for text, _ in kept)[: max(0, width)]


class Progress:
    """Steps start..end; `end` is where this process stops."""

    def __init__(self, start: int, end: int):
        self._start, self._end = start, end
        self._began = time.perf_counter()
        self._measured: list[tuple[str, int]] = []  # in the last interval, with their ranks
        self._bar = Bar(BarColumn(BAR), Line(), console=console)
        self._task = self._bar.add_task("", total=end, completed=start, parts=self._parts(start))
        if console.is_terminal:
            self._bar.start()

    def step_done(self, step: int) -> None:
        """Only the bar moves; its numbers are those of the last interval."""
        if console.is_terminal:
            self._bar.update(self._task, completed=step, parts=self._parts(step))

    def update(self, step: int, loss: float, lr: float, images_per_second: float, data_wait: float) -> None:
        """`data_wait`: share of the interval in which the host waited for images."""
        self._measured = [
            (f"loss {loss:.4f}", 1),
            (f"lr {lr:.3g}", 4),
            (f"{images_per_second:.0f} images/s", 3),
            (f"data-wait {data_wait:.0%}", 5),
        ]
        if console.is_terminal:
            self.step_done(step)
        else:
            say(GAP.join(text for text, _ in self._parts(step)))

    def _parts(self, step: int) -> list[tuple[str, int]]:
        done = step - self._start
        left = (time.perf_counter() - self._began) / max(1, done) * (self._end - step)
        remaining = [(f"left {_duration(left)}", 2)] if done else []
        return [(f"step {step}/{self._end}", 0), *self._measured, *remaining]

    def close(self) -> None:
        if console.is_terminal:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days or hours:
        return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class Meter:
    """Images/s, MB/s and time left of a pass over `total` bytes; a line now and then where there is no
    terminal.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total = what, max(1, total)
        self._images = self._bytes = 0
        self._began = self._said = time.perf_counter()
        self._bar = Bar(BarColumn(BAR), Line(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=self._total, parts=[(what, 0)])

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
            self._bar.update(self._task, completed=self._bytes, parts=[(self._what, 0), *self._parts()])
            if not console.is_terminal:
                say(f"{self._what}: {self._line()}")

    def _line(self) -> str:
        return ", ".join(text for text, _ in self._parts())

    def _parts(self) -> list[tuple[str, int]]:
        seconds = max(1e-6, time.perf_counter() - self._began)
        left = seconds * (self._total / max(1, self._bytes) - 1)
        return [
            (counted(self._images, "image"), 2),
            (f"{self._images / seconds:.0f} images/s", 3),
            (f"{self._bytes / seconds / 1e6:.0f} MB/s", 4),
            (f"left {_duration(max(0, left))}", 1),
        ]
