"""The report's figures, as text for a page: charts as SVG, pictures as data: addresses.

No text in them is anybody's but ours.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from reconverge.base.files import read_plain
from reconverge.report.numbers import Bin, Ran, curve, series, steps_per_epoch
from reconverge.report.pictures import named

THUMBNAIL = 160  # pixels, longer side of a picture of one image
POINTS = 1500  # of a line, at most: a point stands for the mean of the steps around it
SIZE = (4.4, 2.7)  # inches: as wide as a narrow screen, so that text keeps its size there

# The same bytes from the same numbers; text stays text, which is shorter, and can be searched and read aloud.
STYLE: Any = {"svg.hashsalt": "reconverge", "svg.fonttype": "none", "font.size": 9.0}

EMA: Any = {"linestyle": "-", "marker": "o"}
RAW: Any = {"linestyle": "--", "marker": "x"}


def colours(count: int) -> list[str]:
    """One a group, as CSS and matplotlib know them; ten that are easy to tell apart, else as many as are
    asked for.
    """
    table = (
        matplotlib.color_sequences["tab10"]
        if count <= 10
        else matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    )
    return [matplotlib.colors.to_hex(colour) for colour in table[:count]]


def curves(
    groups: Sequence[Sequence[Ran]], title: str, raw: str, ema: str | None = None, scale: float = 1
) -> Markup | None:
    """Over the epochs, what metrics.jsonl names `raw`, and dashed beside it where runs have `ema`; None if no
    run has either.

    Of several seeds the mean, a band of a standard deviation to either side, and each run as a faint line.
    """
    drawn = {key: [curve(group, key) for group in groups] for key in (raw, ema) if key}
    if not any(found for of_key in drawn.values() for found in of_key):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        both = ema is not None and any(drawn[ema])
        looks = {key: (RAW if key == raw else EMA) if both else {} for key in drawn}
        for key, of_key in drawn.items():
            for group, found, colour in zip(groups, of_key, colours(len(groups)), strict=True):
                if found is not None:
                    _line(axes, found.epochs, scale * found.mean, color=colour, linewidth=1.4, **looks[key])
                if found is not None and found.std is not None:
                    low, high = scale * (found.mean - found.std), scale * (found.mean + found.std)
                    axes.fill_between(
                        thinned(found.epochs),
                        thinned(low),
                        thinned(high),
                        color=colour,
                        alpha=0.2,
                        linewidth=0,
                    )
                    for run in group:
                        steps, values = np.array([*series(run, key).items()]).reshape(-1, 2).T
                        _line(
                            axes,
                            steps / steps_per_epoch(run),
                            scale * values,
                            color=colour,
                            alpha=0.3,
                            linewidth=0.7,
                        )
        if both:
            for look, label in ((EMA, "EMA"), (RAW, "raw")):
                axes.plot([], [], color="0.3", linewidth=1.4, markersize=4, label=label, **look)
            axes.legend(frameon=False, fontsize=8)
        axes.set_xlim(left=0)
        named(axes, title, "epoch")
        return svg(figure, raw, title)


def _line(axes: Any, x: np.ndarray, y: np.ndarray, **look: Any) -> None:
    marker = "." if len(x) == 1 else ""  # one point is no line
    axes.plot(
        thinned(x),
        thinned(y),
        **{"marker": marker, "markersize": 4, "markevery": max(1, len(thinned(x)) // 20), **look},
    )


def thinned(values: np.ndarray) -> np.ndarray:
    """At most POINTS means of neighbours; the last ones that fill no whole group are one of their own."""
    width = -(-len(values) // POINTS)
    return (
        values
        if width <= 1
        else np.add.reduceat(values, starts := np.arange(0, len(values), width))
        / np.diff([*starts, len(values)])
    )


def reliability(bins: Sequence[Bin], name: str) -> Markup:
    """Accuracy over confidence, and below it which share of the images is there."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], 3.8), layout="constrained")
        axes, shares = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        images, confidence, accuracy = np.array(bins).T
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
        axes.vlines(confidence, confidence, accuracy, color="C3", alpha=0.6, linewidth=1.2)
        axes.plot(confidence, accuracy, color="C0", marker="o", markersize=4, linewidth=1.2)
        shares.bar(confidence, images / images.sum(), width=1 / 20, color="C0", alpha=0.7)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlim(-0.03, 1.03)
        named(axes, "accuracy", "")
        named(shares, "share of the images", "confidence")
        return svg(figure, name, "reliability diagram")


def svg(figure: Figure, name: str, title: str) -> Markup:
    """A figure to stand in a page; `name` makes its identifiers its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def thumbnail(pixels: np.ndarray) -> str:
    """The address of an image, uint8 (H, W, 3)."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=90, subsampling=0)
    return _address("jpeg", file.getvalue())


def picture(path: Path) -> str | None:
    """The address of a PNG file; None if there is none. A link, or anything but a picture, is none: nothing
    else of this computer gets into a page.
    """
    if path.is_symlink() or not path.is_file():
        return None
    content = read_plain(path)
    return _address("png", content) if content.startswith(b"\x89PNG\r\n\x1a\n") else None


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
