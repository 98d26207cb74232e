"""The report's figures, as text for a page: charts as SVG, pictures as data: addresses.

Names of classes, which may be any text, are drawn as they are: matplotlib escapes them, and reads no formula.
"""

import base64
import io
import re
import warnings
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
from reconverge.report.pictures import BLUE, EMA, RAW, RED, named, over_epochs, padded, percent_ticks, short

THUMBNAIL = 160  # pixels, longer side of a picture of one image
POINTS = 1500  # of a line, at most: a point stands for the mean of the steps around it
SIZE = (4.0, 2.6)  # inches: as wide as a narrow screen, so that text keeps its size there

# The same bytes from the same numbers; text stays text, which is shorter, and can be searched and read aloud.
STYLE: Any = {"svg.hashsalt": "reconverge", "svg.fonttype": "none", "font.size": 9.0}

# Ten that colour-blind people tell apart too: "petroff10", which matplotlib has since 3.10.
COLOURS = [
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581",
    "#92dadd",
]  # fmt: skip


def colours(count: int) -> list[str]:
    """One a group, as CSS and matplotlib know them."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    return [
        matplotlib.colors.to_hex(one) for one in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    ]


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
        figure = padded(SIZE, 0.08)
        axes, last = figure.subplots(), 0.0
        both = ema is not None and any(drawn[ema])
        looks = {key: (RAW if key == raw else EMA) if both else {} for key in drawn}
        for key, of_key in drawn.items():
            for group, found, colour in zip(groups, of_key, colours(len(groups)), strict=True):
                if found is None:
                    continue
                last = max([last, *found.epochs])
                _line(axes, found.epochs, scale * found.mean, color=colour, linewidth=1.4, **looks[key])
                if found.std is not None:
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
                        faint: Any = {"color": colour, "alpha": 0.3, "linewidth": 0.7}
                        _line(axes, steps / steps_per_epoch(run), scale * values, **faint)
        if both:
            for look, label in ((EMA, "EMA"), (RAW, "raw")):
                axes.plot([], [], color="0.3", linewidth=1.4, markersize=4, label=label, **look)
            # Below the chart, where it covers no line.
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        if raw.endswith("top1"):
            percent_ticks(axes)
        over_epochs(axes, last)
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


def reliability(bins: Sequence[Bin], confidence: np.ndarray, name: str) -> Markup:
    """Accuracy over confidence, of each of the bins; and below it how the confidence of the images, (N,), is
    spread.
    """
    with matplotlib.rc_context(STYLE):
        figure = padded((SIZE[0], 3.8), 0.08)
        axes, shares = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        _, sure, accuracy = np.array(bins).T
        axes.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1)
        axes.vlines(sure, sure, accuracy, color=RED, alpha=0.6, linewidth=1.2)
        axes.plot(sure, accuracy, color=BLUE, marker="o", markersize=4, linewidth=1.2)
        weights = np.full(len(confidence), 100 / len(confidence))
        shares.hist(confidence, np.linspace(0, 1, 16), weights=weights, color=BLUE, edgecolor="white")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlim(-0.03, 1.03)
        named(axes, "accuracy", "")
        named(shares, "images, %", "confidence")
        return svg(figure, name, "reliability diagram")


def confusions(matrix: np.ndarray, names: Sequence[str], name: str) -> tuple[Markup, float]:
    """A confusion matrix (true classes, predicted classes) of images; and how wide it is to be shown for its
    text to have its size, in CSS pixels.
    """
    names = [short(each) for each in names]
    cell, margin = 0.13 + 0.08 * len(str(matrix.max())), 0.5 + 0.08 * max(map(len, names))  # inches
    side = margin + len(matrix) * max(0.27, cell)
    with matplotlib.rc_context(STYLE):
        figure = padded((side, side), 0.08)
        axes = figure.subplots()
        shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        for true, predicted in np.argwhere(matrix).tolist():
            colour = "white" if shares[true, predicted] > 0.5 else "black"
            where: Any = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
            axes.text(predicted + 0.5, true + 0.5, str(matrix[true, predicted]), **where)
        places, steep = np.arange(len(names)) + 0.5, max(map(len, names)) > 2
        axes.set_xticks(places, names, rotation=90 if steep else 0, parse_math=False)
        axes.set_yticks(places, names, parse_math=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        with warnings.catch_warnings():
            # A script that this machine's font lacks: the browser has a font for it.
            warnings.filterwarnings("ignore", message="Glyph")
            return svg(figure, name, "confusion matrix"), 96 * side


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
