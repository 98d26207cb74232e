"""Pictures of what goes in and what comes out, drawn without being asked: first_batch.png, curves.png,
predictions.png.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from reconverge.config.settings import Data, Evaluate
from reconverge.data import transforms
from reconverge.data.sources import Source
from reconverge.training.evaluate import Result


def first_batch(folder: Path, images: Tensor, targets: Tensor, classes: Sequence[str], data: Data) -> None:
    """first_batch.png: up to 32 images of the first microbatch, as `seen` draws them."""
    seen(
        folder / "first_batch.png",
        images[:32],
        targets[:32],
        classes,
        data,
        "first microbatch, augmented and mixed, as the model sees it",
    )


def seen(path: Path, images: Tensor, targets: Tensor, classes: Sequence[str], data: Data, title: str) -> None:
    """Images as the model sees them, normalised (N, 3, H, W), with the classes of their mixed targets (N,
    classes).
    """
    captions = []
    for target in targets.cpu():
        weights, labels = target.topk(min(2, len(target)))
        # Label smoothing gives every class a little; a second class is named only where mixing put it there.
        named = [
            (w, c)
            for w, c in zip(weights.tolist(), labels.tolist(), strict=True)
            if w > 2 * float(target.min()) + 1e-6
        ]
        captions.append("\n".join(f"{weight:.0%} {_short(classes[label])}" for weight, label in named))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    sheet(path, images.float().cpu() * std + mean, captions, title)


def predictions(folder: Path, validation: Source, evaluate: Evaluate, results: dict[str, Result]) -> None:
    """predictions.png: 32 validation images, spread over the set, with their true class in green or, in red,
    what the better weights say in its place.
    """
    weights, result = max(results.items(), key=lambda item: item[1].top1)
    rows, classes = np.unique(np.linspace(0, result.images - 1, 32).astype(np.int64)), validation.classes
    ids = result.ids[rows]
    pairs = zip(validation.labels(ids), result.predicted[rows], strict=True)
    named = [(_short(classes[true]), _short(classes[said]), true == said) for true, said in pairs]
    captions = [true if right else f"{said}\nis {true}" for true, said, right in named]
    colours = ["green" if right else "crimson" for *_, right in named]
    title = (
        f"validation: {weights} weights, top-1 {result.top1:.2f} % of {result.images} images; red: said, and"
        " what it is"
    )
    sheet(folder / "predictions.png", pixels(validation, ids.tolist(), evaluate), captions, title, colours)


def pixels(source: Source, ids: Iterable[int], evaluate: Evaluate) -> Tensor:
    """Samples as a model is evaluated on them, (N, 3, H, W) in 0..1."""
    transform = transforms.evaluation(evaluate)
    images = np.stack([transform(source.read(sample)) for sample in ids])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


CELL, CAPTION = 128, 34  # pixels: side of an image, height of the caption above it
COLUMNS = 8  # images in a row


def sheet(
    path: Path, images: Tensor, captions: Sequence[str], title: str, colours: Sequence[str] | None = None
) -> None:
    """Images (N, 3, H, W) in 0..1 as one picture in one pair of axes: a pair for each image would take a
    second to draw.
    """
    colours = colours or ["black"] * len(images)
    cells = torch.nn.functional.interpolate(images.clamp(0, 1), size=(CELL, CELL), mode="nearest-exact")
    rows = -(-len(cells) // COLUMNS)
    canvas = np.ones((rows * (CELL + CAPTION), COLUMNS * (CELL + 8), 3), np.float32)
    figure = Figure(figsize=(canvas.shape[1] / 100, canvas.shape[0] / 100 + 0.4), dpi=100)
    axes = figure.add_axes((0, 0, 1, canvas.shape[0] / 100 / figure.get_figheight()))
    axes.axis("off")
    for number, (cell, caption, colour) in enumerate(zip(cells, captions, colours, strict=True)):
        top, left = number // COLUMNS * (CELL + CAPTION) + CAPTION, number % COLUMNS * (CELL + 8) + 4
        canvas[top : top + CELL, left : left + CELL] = cell.permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
        axes.text(
            left + CELL / 2,
            top - 4,
            caption,
            ha="center",
            va="bottom",
            fontsize=8,
            linespacing=1.0,
            color=colour,
            parse_math=False,
        )
    axes.imshow(canvas, interpolation="nearest")
    figure.suptitle(title, fontsize=11, y=0.995)
    with warnings.catch_warnings():
        # Class names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path)


def curves(folder: Path, records: Sequence[dict[str, Any]], steps_per_epoch: int) -> None:
    """curves.png: loss, learning rate, top-1 of raw and EMA weights, over epochs, from the lines of
    metrics.jsonl.
    """
    figure = Figure(figsize=(12, 3.4), dpi=100, layout="constrained")
    loss, rate, accuracy = figure.subplots(1, 3)

    def series(axes: Any, key: str, label: str, colour: str, marker: str = "") -> None:
        points = [(record["step"] / steps_per_epoch, record[key]) for record in records if key in record]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                label=label,
                color=colour,
                marker=marker or ("." if len(points) < 3 else ""),
                markersize=4,
                linewidth=1.4,
            )

    series(loss, "loss", "training (mixed, smoothed)", "grey")
    series(loss, "raw_loss", "validation, raw", "C0", "o")
    series(loss, "ema_loss", "validation, EMA", "C1", "o")
    series(rate, "lr", "", "C2")
    series(accuracy, "raw_top1", "raw", "C0", "o")
    series(accuracy, "ema_top1", "EMA", "C1", "o")
    for axes, title in ((loss, "loss"), (rate, "learning rate"), (accuracy, "top-1, %")):
        named(axes, title, "epoch")
        if axes is not rate and axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=9)
    best = max(
        [record.get("ema_top1", 0) for record in records] + [record.get("raw_top1", 0) for record in records],
        default=0,
    )
    if best > 90:  # the last percents are what one looks for
        accuracy.set_ylim(80, 100.5)
    figure.savefig(folder / "curves.png")


def plan(path: Path, epochs: Sequence[float], rates: Sequence[float], layers: Mapping[int, float]) -> None:
    """The learning rate over the epochs, and, of more than one layer, the share of it that each takes (layer
    -> lr scale).
    """
    figure = Figure(figsize=(10, 3.4), dpi=100, layout="constrained")
    schedule, *scales = figure.subplots(1, 1 + (len(layers) > 1), squeeze=False)[0]
    schedule.plot(epochs, rates, color="C2", linewidth=1.4)
    named(schedule, "learning rate of the head" if scales else "learning rate", "epoch")
    for axes in scales:
        axes.bar(list(layers), list(layers.values()), color="C2")
        axes.xaxis.get_major_locator().set_params(integer=True)
        named(axes, "lr scale", "layer, from the stem to the head")
    figure.savefig(path)


def named(axes: Any, title: str, x: str) -> None:
    """The looks of a chart: its title, what is along x, a grid."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
