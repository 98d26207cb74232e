"""The pictures that a run draws: what stands in them, and that nothing in them is cut or covered."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from reconverge.config.settings import Data, Evaluate, Mix, Train
from reconverge.data import sources
from reconverge.report import pictures
from reconverge.training.evaluate import Result

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved in this test."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *path, **options: (figures.append(figure), save(figure, *path, **options)),
    )
    return figures


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    ("given", "ways", "loss"),
    [
        ({}, ["Mixup", "CutMix"], " (mixed images, smoothed labels)"),
        ({"cutmix": 0.0, "switch": 1.0}, ["Mixup"], " (mixed images, smoothed labels)"),
        ({"switch": 1.0, "smoothing": 0.0}, ["CutMix"], " (mixed images)"),
        ({"probability": 0.0}, [], " (smoothed labels)"),
        ({"mixup": 0.0, "cutmix": 0.0}, [], " (smoothed labels)"),
        (PLAIN, [], ""),
    ],
)
def test_what_the_training_loss_is_of(given, ways, loss):
    assert pictures.mixed_by(Mix(**given)) == ways
    assert pictures.trained_on(Train(mix=Mix(**given))) == loss


@pytest.mark.parametrize(
    ("given", "target", "caption", "said"),
    [
        ({"mixup": 0.0, "cutmix": 0.0}, [0.05, 0.95], "sky: 0.95", ["not mixed", "smoothing 0.1"]),
        ({}, [0.59, 0.41], "sea: 0.59\nsky: 0.41", ["mixed by Mixup or CutMix;", "smoothing 0.1"]),
        ({"probability": 0.5}, [0.95, 0.05], "sea: 0.95", ["with probability 0.5"]),
        (PLAIN, [1.0, 0.0], "sea: 1.00", ["not mixed"]),
        ({**PLAIN, "mixup": 1.0}, [0.0, 0.3, 0.7], "a long class …: 0.70\nsky: 0.30", ["mixed by Mixup;"]),
    ],
)
def test_the_first_batch_says_what_its_targets_are(drawn, tmp_path, given, target, caption, said):
    images, targets = torch.zeros(3, 3, 8, 8), torch.tensor([target] * 3)
    classes = ["sea", "sky", "a long class name"]
    pictures.first_batch(tmp_path, images, targets, classes, Data("d", "digits"), Mix(**given))
    (figure,) = drawn
    assert texts(figure) == [caption] * 3
    title = figure.texts[0].get_text()
    for part in [tmp_path.name[:50], "target class and its weight", *said]:
        assert part in title
    assert ("smoothing" in title) == (given.get("smoothing") != 0)


def result(labels, predicted, confidence):
    top1 = 100 * float((labels == predicted).mean())
    return Result(
        top1, 100.0, 0.0, 0.0, len(labels), predicted, confidence, confidence, np.arange(len(labels)), []
    )


def test_predictions_are_half_spread_and_half_the_most_confident_mistakes(drawn, tmp_path):
    source = sources.Synthetic(200, 7, "val")
    labels = source.labels(np.arange(200))
    predicted, confidence = labels.copy(), np.linspace(0.2, 0.8, 200)
    predicted[100:130] = (labels[100:130] + 1) % 7
    worse = result(labels, (labels + 1) % 7, confidence)
    results = {"raw": worse, "ema": result(labels, predicted, confidence)}
    pictures.predictions(tmp_path, source, Evaluate(size=8), results)
    (figure,) = drawn
    captions = texts(figure)
    assert len(captions) == 32
    assert captions[0] == "class00000 (20%)\nsynthetic image 0"
    for caption, sample in zip(captions[16:], range(129, 113, -1), strict=True):
        shown = f"class{predicted[sample]:05d} ({confidence[sample]:.0%})\ntrue: class{labels[sample]:05d}\n"
        assert caption.startswith(shown)
        assert caption.endswith(str(sample))
    colours = {"true:" in text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert colours == {True: pictures.RED, False: pictures.BLUE}
    title = figure.texts[0].get_text()
    assert "predictions of the EMA weights, top-1 85.00 % of 200 validation images" in title
    assert "first 16: spread evenly over the set; then the 16 most confident of 30 mistakes" in title


def test_few_images_or_mistakes():
    right, confidence = np.ones(100, bool), np.linspace(0, 1, 100)
    ids, said = pictures._chosen(right, confidence)
    assert (len(ids), ids[0], ids[-1]) == (32, 0, 99)
    assert "no mistakes" in said
    right[[3, 8]] = False
    ids, said = pictures._chosen(right, confidence)
    assert (len(ids), ids[16:]) == (18, [8, 3])
    assert said.endswith("; then all mistakes (2)")
    ids, said = pictures._chosen(right[:20], confidence[:20])
    assert (sorted(ids), ids[:2]) == (list(range(20)), [8, 3])
    assert said == "all images, the mistakes first"


def test_file_names_are_short(digits, shards, tmp_path):
    folder = sources.open_validation(
        Data("d", "folder", root=str(digits), cache=str(tmp_path)), [str(digit) for digit in range(10)]
    )
    assert pictures.file_name(folder.where(0)) == folder.path(0).name
    training, _ = sources.open_sources(Data("s", "shards", root=str(shards), cache=str(tmp_path)))
    name = pictures.file_name(training.where(0))
    assert name in training.where(0)
    assert "/" not in name
    assert "byte" not in name
    long = pictures.file_name("/data/val/ILSVRC2012_val_00012345.JPEG (sample 3)")
    assert long == "…val_00012345.JPEG"


def lines(*evaluated, every=2, steps=40):
    """metrics.jsonl of ten steps an epoch, with (step, raw top-1, EMA top-1) of the evaluations."""
    records = [{"step": step, "loss": 3 - step / 20, "lr": 1e-3} for step in range(every, steps + 1, every)]
    for step, raw, ema in evaluated:
        records.append({"step": step, "raw_top1": raw, "raw_loss": 2.0, "ema_top1": ema, "ema_loss": 2.5})
    return sorted(records, key=lambda record: record["step"])


def test_curves_cut_and_cover_nothing(drawn, tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    pictures.curves(folder, lines((10, 12.0, 3.0), (20, 91.0, 80.0), (40, 90.0, 100.0)), 10, Train(mix=Mix()))
    (figure,) = drawn
    loss, rate, accuracy = figure.axes
    assert figure.get_suptitle() == "my-run"
    for axes in figure.axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            x, y = line.get_data()
            assert left < min(x) <= max(x) < right
            assert low < min(y) <= max(y) < high
        assert all(tick == int(tick) for tick in axes.get_xticks())
        assert axes.get_legend() is None
    assert all(0 <= tick <= 100 for tick in accuracy.get_yticks())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "training (mixed images, smoothed labels)",
        "validation, raw weights",
        "validation, EMA weights",
        "best top-1: 100.00 % (EMA weights, epoch 4)",
    ]
    assert [line.get_data() for line in accuracy.lines if len(line.get_xdata()) == 1] == [([4.0], [100.0])]
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(legend.get_window_extent().overlaps(box) for box in boxes)
    width, height = figure.bbox.size
    for box in [*boxes, legend.get_window_extent()]:
        assert min(box.x0, box.y0) > 5
        assert box.x1 < width - 5
        assert box.y1 < height - 5
    sizes = [text.get_fontsize() for axes in (loss, rate) for text in axes.get_xticklabels()]
    assert min([*sizes, *(text.get_fontsize() for text in legend.get_texts())]) >= 8


def test_curves_of_one_evaluation_and_of_none(drawn, tmp_path):
    pictures.curves(tmp_path, lines((6, 50.0, 40.0), steps=6), 10, Train(mix=Mix(**PLAIN)))
    pictures.curves(tmp_path, lines(steps=6), 10, Train(mix=Mix(**PLAIN)))
    pictures.curves(tmp_path, [], 10, Train(mix=Mix()))
    pictures.curves(tmp_path, lines(steps=14), 10, Train(mix=Mix()))
    one, none, empty, longer = drawn
    assert len(one.axes) == 3
    assert all(line.get_marker() not in ("", "None") for line in one.axes[2].lines)
    assert any(tick != int(tick) for tick in one.axes[0].get_xticks())  # less than an epoch
    assert all(tick == int(tick) for tick in longer.axes[0].get_xticks())
    assert len(none.axes) == len(empty.axes) == 2
    assert [text.get_text() for text in none.legends[0].get_texts()] == ["training"]
    assert empty.legends == []
