"""Pictures of what goes in and what comes out, drawn without being asked: first_batch.png, curves.png,
predictions.png.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from reconverge.base.files import anew
from reconverge.config.settings import SCORES, SEGMENT, Data, Evaluate, Mix, Train
from reconverge.data import transforms
from reconverge.data.sources import Source
from reconverge.run import reader
from reconverge.training.evaluate import Result

# Blue and vermilion after Okabe and Ito, which colour-blind people tell apart, dark enough for small text.
# What they say is also said by dashes, markers or words.
BLUE, RED = "#0062a3", "#bf4300"
EMA: Any = {"linestyle": "-", "marker": "o"}
RAW: Any = {"linestyle": "--", "marker": "x"}


def first_batch(
    folder: Path, images: Tensor, targets: Tensor, classes: Sequence[str], data: Data, mix: Mix
) -> None:
    """first_batch.png: up to 32 images of the first microbatch, as `seen` draws them."""
    title, path = f"{short(folder.name, 60)}: first microbatch", folder / "first_batch.png"
    seen(path, images[:32], targets[:32], classes, data, mix, title)


def seen(
    path: Path, images: Tensor, targets: Tensor, classes: Sequence[str], data: Data, mix: Mix, title: str
) -> None:
    """Images as the model sees them, normalised (N, 3, H, W), with the classes of their targets (N, classes).

    `mix` says how the targets came about.
    """
    captions = []
    for target in targets.cpu():
        weights, labels = target.topk(min(2, len(target)))
        # Label smoothing gives every class a little; a second class is named only where mixing put it there.
        named = [
            f"{short(classes[label])}: {weight:.2f}"
            for weight, label in zip(weights.tolist(), labels.tolist(), strict=True)
            if weight > mix.smoothing / len(target) + 0.005
        ]
        captions.append("\n".join(named))
    kinds = " or ".join(mixed_by(mix))
    chance = f" with probability {mix.probability:g}" if mix.probability < 1 else ""
    said = f"after augmentation, {f'mixed by {kinds}{chance}' if kinds else 'not mixed'}"
    smoothed = f"; the rest is label smoothing {mix.smoothing:g}" if mix.smoothing else ""
    title += f", as the model sees it\n{said}; above each image: target class and its weight{smoothed}"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    sheet(path, images.float().cpu() * std + mean, captions, title)


def mixed_by(mix: Mix) -> list[str]:
    """Which ways of mixing images these settings have."""
    both = bool(mix.mixup and mix.cutmix)
    shares = {
        "Mixup": mix.mixup and (1 - mix.switch if both else 1),
        "CutMix": mix.cutmix and (mix.switch if both else 1),
    }
    return [name for name, share in shares.items() if share and mix.probability]


def trained_on(cfg: Train) -> str:
    """How the training loss differs from the validation loss, in brackets after its name."""
    if cfg.task == SEGMENT:
        return ""
    parts = ["mixed images"] * bool(mixed_by(cfg.mix)) + ["smoothed labels"] * bool(cfg.mix.smoothing)
    return f" ({', '.join(parts)})" if parts else ""


def predictions(folder: Path, validation: Source, evaluate: Evaluate, results: dict[str, Result]) -> None:
    """predictions.png: 32 validation images, half of them spread over the set, half the mistakes that the
    better weights are most confident of; each with prediction, confidence, true class and file name.
    """
    weights, result = max(results.items(), key=lambda item: item[1].top1)
    labels, names = validation.labels(result.ids), validation.classes
    rows, which = _chosen(labels == result.predicted, result.confidence)
    captions, colours = [], []
    for row in rows:
        true, predicted = names[labels[row]], names[result.predicted[row]]
        confidence, where = result.confidence[row], validation.where(int(result.ids[row]))
        captions.append(captioned(predicted, confidence, where, None if predicted == true else true))
        colours.append(BLUE if predicted == true else RED)
    ids = result.ids[rows].tolist()
    kind = "EMA" if weights == "ema" else weights
    title = (
        f"{short(folder.name, 60)}: predictions of the {kind} weights, top-1 {result.top1:.2f} % of"
        f" {result.images} validation images\n{which}\n"
        "above each image: predicted class (confidence), the true class where it is another, file"
    )
    sheet(folder / "predictions.png", pixels(validation, ids, evaluate), captions, title, colours)


def _chosen(right: np.ndarray, confidence: np.ndarray) -> tuple[list[int], str]:
    """Up to 32 images of a set, which of them are predicted `right` and with which `confidence`; and in words
    which they are.
    """
    count = len(right)
    mistakes = sorted(np.flatnonzero(~right).tolist(), key=lambda sample: -confidence[sample])
    if count <= 2 * HALF:
        return mistakes + np.flatnonzero(right).tolist(), "all images, the mistakes first"
    spread = np.linspace(0, count - 1, HALF if mistakes else 2 * HALF).astype(np.int64).tolist()
    if not mistakes:
        return spread, f"{len(spread)} images spread evenly over the set; there are no mistakes"
    kept = mistakes[:HALF]
    few = len(kept) == len(mistakes)
    most = f"all mistakes ({len(kept)})" if few else f"the {HALF} most confident of {len(mistakes)} mistakes"
    return spread + kept, f"first {HALF}: spread evenly over the set; then {most}"


def captioned(predicted: str, confidence: float, where: str, true: str | None = None) -> str:
    """Predicted class with its confidence, the true class where it is another, and the file's name, a line
    each. `where`: as Source.where has it.
    """
    lines = [f"{short(predicted)} ({confidence:.0%})", true and f"true: {short(true)}", file_name(where)]
    return "\n".join(line for line in lines if line)


def file_name(where: str) -> str:
    """The end of an image's name, which tells it from its neighbours. `where`: as Source.where has it."""
    name = re.split("/|, ", re.sub(r"( at byte \d+)? \(sample \d+\)$", "", where))[-1]
    return name if len(name) <= 18 else "…" + name[-17:]


def pixels(source: Source, ids: Iterable[int], evaluate: Evaluate) -> Tensor:
    """Samples as a model is evaluated on them, (N, 3, H, W) in 0..1."""
    transform = transforms.evaluation(evaluate)
    images = np.stack([transform(source.read(sample)) for sample in ids])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


CELL, LINE = 128, 13  # pixels: side of an image, height of a line of the caption above it
COLUMNS = 8  # images in a row
HALF = 2 * COLUMNS  # of the images of predictions.png


def sheet(
    path: Path, images: Tensor, captions: Sequence[str], title: str, colours: Sequence[str] | None = None
) -> None:
    """Images (N, 3, H, W) in 0..1 as one picture in one pair of axes: a pair for each image would take a
    second to draw.
    """
    colours = colours or ["black"] * len(images)
    cells = torch.nn.functional.interpolate(images.clamp(0, 1), size=(CELL, CELL), mode="nearest-exact")
    rows, above = -(-len(cells) // COLUMNS), 8 + LINE * max(1 + text.count("\n") for text in captions)
    canvas = np.ones((rows * (CELL + above) + 4, COLUMNS * (CELL + 8), 3), np.float32)
    head = 0.18 + 0.2 * (1 + title.count("\n"))  # inches
    figure = Figure(figsize=(canvas.shape[1] / 100, canvas.shape[0] / 100 + head), dpi=100)
    axes = figure.add_axes((0, 0, 1, canvas.shape[0] / 100 / figure.get_figheight()))
    axes.axis("off")
    for number, (cell, caption, colour) in enumerate(zip(cells, captions, colours, strict=True)):
        top, left = number // COLUMNS * (CELL + above) + above, number % COLUMNS * (CELL + 8) + 4
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
    figure.text(0.5, 1 - 0.1 / figure.get_figheight(), title, ha="center", va="top", parse_math=False)
    with warnings.catch_warnings():
        # Class names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        _save(figure, path)


def curves(folder: Path, records: Sequence[dict[str, Any]], steps_per_epoch: int, cfg: Train) -> None:
    """curves.png: loss, learning rate and, where there are evaluations, the score (top-1 or mIoU) of raw and
    EMA weights, over epochs, from the lines of metrics.jsonl.
    """
    key, name = SCORES[cfg.task]
    best = reader.best(records)
    figure = padded((12, 3.9) if best else (9, 3.9), 0.12)
    loss, rate, *accuracy = figure.subplots(1, 3 if best else 2)

    def series(axes: Any, key: str, label: str, colour: str, **look: Any) -> None:
        points = [(record["step"] / steps_per_epoch, record[key]) for record in records if key in record]
        if points:
            x, y = zip(*points, strict=True)
            look = {"marker": "." if len(points) < 3 else "", "markersize": 5, "linewidth": 1.4, **look}
            axes.plot(x, y, label=label, color=colour, **look)

    series(loss, "loss", f"training{trained_on(cfg)}", "grey")
    series(loss, "raw_loss", "validation, raw weights", BLUE, **RAW)
    series(loss, "ema_loss", "validation, EMA weights", RED, **EMA)
    series(rate, "lr", "", "black")
    handles, labels = loss.get_legend_handles_labels()
    for axes in accuracy:
        series(axes, f"raw_{key}", "", BLUE, **RAW)
        series(axes, f"ema_{key}", "", RED, **EMA)
        assert best, "else there are no such axes"
        at, weights = best.step / steps_per_epoch, "EMA" if best.kind == "ema" else best.kind
        ring = {"marker": "o", "fillstyle": "none", "markersize": 14, "linestyle": "", "color": "black"}
        handles += axes.plot([at], [best.score], **ring)
        labels.append(f"best {name}: {best.score:.2f} % ({weights} weights, epoch {round(at, 2):g})")
        percent_ticks(axes)
    last = max((record["step"] for record in records), default=0) / steps_per_epoch
    for axes, title in zip((loss, rate, *accuracy), ("loss", "learning rate", f"{name}, %"), strict=False):
        named(axes, title, "epoch")
        over_epochs(axes, last)
    if handles:
        # Below the charts, where it covers no line.
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(short(folder.name, 100), fontsize=12, parse_math=False)
    _save(figure, folder / "curves.png")


def percent_ticks(axes: Any) -> None:
    """No mark above 100 % or below 0, where there are no values."""
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if max(0, low) <= tick <= min(100, high)])
    axes.set_ylim(low, high)


def over_epochs(axes: Any, last: float) -> None:
    """The axis of epochs, from 0 to `last`; in whole epochs where it is longer than one."""
    if last > 0:
        axes.set_xlim(-0.02 * last, 1.03 * last)
    if last > 1:
        axes.xaxis.get_major_locator().set_params(integer=True)


def plan(path: Path, epochs: Sequence[float], rates: Sequence[float], layers: Mapping[int, float]) -> None:
    """The learning rate over the epochs, and, of more than one layer, the share of it that each takes (layer
    -> lr scale).
    """
    figure = padded((10, 3.4), 0.12)
    schedule, *scales = figure.subplots(1, 1 + (len(layers) > 1), squeeze=False)[0]
    schedule.plot(epochs, rates, color="C2", linewidth=1.4)
    named(schedule, "learning rate of the head" if scales else "learning rate", "epoch")
    over_epochs(schedule, max(epochs, default=0))
    for axes in scales:
        axes.bar(list(layers), list(layers.values()), color="C2")
        axes.xaxis.get_major_locator().set_params(integer=True)
        named(axes, "lr scale", "layer, from the stem to the head")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with anew(path) as draft:
        figure.savefig(draft)


def padded(size: tuple[float, float], pad: float) -> Figure:
    """A figure that leaves `pad` free around its charts, so that no text touches the edge; in inches."""
    return Figure(figsize=size, dpi=100, layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad))


def named(axes: Any, title: str, x: str) -> None:
    """The looks of a chart: its title, what is along x, a grid."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
