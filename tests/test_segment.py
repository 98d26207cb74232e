"""Training of segmenters: task=segment on some of the bundled scenes, as folders of images and label maps."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import _main, weights
from PIL import Image

from reconverge.config import published
from reconverge.config.settings import Optim
from reconverge.data import scenes
from reconverge.training.clock import Clock
from reconverge.training.optim import learning_rate

JOB = [
    "task=segment", "data=maps", "model=timm", "model.timm=test_convnext", "model.drop_path=0.3", "batch=16",
    "microbatch=4", "epochs=2", "optim.warmup_steps=1", "segment.channels=16", "segment.scale=[0.5,2.0]",
    "segment.distort=true", "augment.size=64", "augment.flip=0.5", "threads=1", "workers=0", "log_every=1",
    "save_every=0", "evaluate_every=never",
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return scenes.written(tmp_path_factory.mktemp("scenes"), {"train": 32, "val": 6})


@pytest.fixture
def segment(drawn, monkeypatch):
    """train.py task=segment in this process: its exit code."""
    return lambda *arguments: _main("train", [*JOB, f"data.root={drawn}", *arguments], monkeypatch)


def lines(run, name="record.jsonl"):
    return [json.loads(line) for line in (Path("runs") / run / name).read_text().splitlines()]


def evaluated(run):
    return [line for line in lines(run, "metrics.jsonl") if "raw_miou" in line]


def slow_scores(pairs, classes):
    """mIoU, pixel accuracy and mean accuracy in percent of (prediction, label map), pixel by pixel."""
    both, of_prediction, of_label = ([0] * classes for _ in range(3))
    for prediction, labels in pairs:
        for mine, true in zip(prediction.ravel().tolist(), labels.ravel().tolist(), strict=True):
            of_prediction[mine] += 1
            of_label[true] += 1
            both[mine] += mine == true
    union = [of_prediction[c] + of_label[c] - both[c] for c in range(classes)]
    ious = [both[c] / union[c] for c in range(classes) if union[c]]
    accuracies = [both[c] / of_label[c] for c in range(classes) if of_label[c]]
    means = [sum(ious) / len(ious), sum(both) / sum(of_label), sum(accuracies) / len(accuracies)]
    return [100 * mean for mean in means]


def test_a_run_evaluates_draws_and_says_its_miou(segment, drawn, capsys):
    assert segment("run=a", "steps=2", "evaluate_every=0") == 0
    said = capsys.readouterr().out
    assert "UPerNet on test_convnext, " in said
    (line,) = evaluated("a")
    assert f"mIoU      {line['raw_miou']:.2f} %" in said
    with np.load("runs/a/outcomes.npz") as file:  # all six images are kept
        predicted = {int(name.rpartition("/")[2]): file[name] for name in file if "/shown/" in name}
        confusion = file["raw/confusion"]
    truth = []
    for path in sorted((drawn / "maps" / "val").glob("*.png")):
        with Image.open(path) as image:
            truth.append(np.asarray(image))
    assert sorted(predicted) == list(range(6))
    expected = slow_scores([(predicted[number], truth[number]) for number in range(6)], 6)
    found = [line[f"raw_{name}"] for name in ("miou", "pixel_accuracy", "mean_accuracy")]
    assert found == pytest.approx(expected)
    assert confusion.sum() == sum(one.size for one in truth)
    for name in ("first_batch", "predictions", "curves"):
        with Image.open(f"runs/a/{name}.png") as picture:
            assert min(picture.size) > 200


def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_does_not(segment):
    assert segment("run=whole") == 0
    assert segment("run=parts", "steps=3") == 0
    assert segment("run=parts", "workers=1") == 0
    assert lines("whole") == lines("parts")
    assert len(lines("whole")) == 4
    assert weights("whole") == weights("parts")
    assert weights("whole", "optimizer") == weights("parts", "optimizer")


def test_two_ranks_give_the_bits_and_the_miou_of_one_by_tree(segment, drawn, launch):
    given = ["steps=2", "reduce=tree", "evaluate_every=0"]
    assert segment("run=one", *given) == 0
    process = launch(2, "run=two", f"data.root={drawn}", *given, settings=JOB)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert lines("one") == lines("two")
    assert evaluated("one") == evaluated("two")
    assert weights("one") == weights("two")


def test_what_does_not_know_segmenters_says_so(segment, evaluate, reconverge, capsys):
    assert segment("run=a", "steps=1") == 0
    assert evaluate("checkpoint=runs/a") == 2
    assert "eval.py does not know segmenters yet" in capsys.readouterr().err
    commands = (
        ["export", "runs/a", "--to", "timm"],
        ["batch", "runs/a", "--step", "1"],
        ["bench", "model", "task=segment"],
    )
    for command in commands:
        code, said = reconverge(*command)
        assert (code, "does not know segmenters yet" in said) == (2, True)


def test_views_change_the_evaluation_alone(segment):
    assert segment("run=plain", "steps=1", "evaluate_every=0") == 0
    views = ["segment.window=64", "segment.stride=40", "segment.scales=[0.75,1.25]", "segment.flip=true"]
    assert segment("run=other", "steps=1", "evaluate_every=0", *views) == 0
    assert weights("plain") == weights("other")
    assert evaluated("plain") != evaluated("other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=in1k", "model=convnext_t"], "recipe=in1k with task=segment"),
        (["mix.mixup=0.1"], "mix.mixup belongs to task=classify"),
        (["evaluate.size=64"], "evaluate.size belongs to task=classify"),
        (["segment.window=64"], "segment.window=64 with segment.stride=0"),
        (["segment.scale=[2.0]"], "two numbers above 0"),
        (["segment.scales=[]"], "one number or more"),
        (["data=digits", "data.root=null"], "task=segment with data=digits"),
        (["model.timm=vit_tiny_patch16_224", "model.image_size=64"], "four stages"),
        (["optim.warmup_steps=40"], "a warm-up shorter than the schedule"),
    ],
)  # fmt: skip
def test_refused(segment, arguments, said, capsys):
    assert segment("run=a", *arguments) == 2
    captured = capsys.readouterr()
    assert said in " ".join((captured.out + captured.err).split())
    assert not Path("runs/a").exists()


def test_label_maps_are_no_classification(drawn, train, capsys):
    assert train("data=maps", f"data.root={drawn}") == 2
    assert "task=classify with data=maps" in capsys.readouterr().err
    assert train("segment.channels=64") == 2
    assert "segment.channels belongs to task=segment" in capsys.readouterr().err


# ---- as published ------------------------------------------------------------------------------------------

# Appendix A.3 and the official configurations, typed by hand: learning rate, stochastic depth, mIoU with one
# scale (Table 7).
PUBLISHED = {
    ("ade20k", "convnext_t"): (1e-4, 0.4, 46.0),
    ("ade20k", "convnext_s"): (1e-4, 0.3, 48.7),
    ("ade20k", "convnext_b"): (1e-4, 0.4, 49.1),
    ("ade20k_22k", "convnext_b"): (1e-4, 0.4, 52.6),
    ("ade20k_22k", "convnext_l"): (1e-4, 0.4, 53.2),
    ("ade20k_22k", "convnext_xl"): (8e-5, 0.4, 53.6),
}
# crop, longest side of the resize, stride of the windows
SIZES = {"ade20k": (512, 2048, 341), "ade20k_22k": (640, 2560, 426)}


@pytest.mark.parametrize(("recipe", "model"), PUBLISHED)
def test_the_recipe_is_as_published(recipe, model, compose):
    given = ["task=segment", f"recipe={recipe}", f"model={model}", "data=ade20k", "data.root=/data"]
    cfg = compose(*given)
    lr, drop_path, miou = PUBLISHED[recipe, model]
    crop, longest, stride = SIZES[recipe]
    optim, segment = cfg.optim, cfg.segment
    assert (optim.lr, cfg.model.drop_path, cfg.recipe.expected[model]) == (lr, drop_path, miou)
    assert (cfg.batch, cfg.schedule_steps, optim.warmup_steps, optim.min_lr) == (16, 160_000, 1500, 0.0)
    assert optim.warmup_lr == pytest.approx(1e-6 * lr, rel=0.3)
    assert (optim.schedule, optim.layer_decay, optim.layer_groups) == ("poly", 0.9, "stage_wise")
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip) == ([0.9, 0.999], 1e-8, 0.05, None)
    assert (cfg.augment.size, cfg.augment.flip, cfg.ema.decay) == (crop, 0.5, None)
    assert (segment.resize, segment.scale, segment.distort) == ([longest, crop], [0.5, 2.0], True)
    assert (segment.window, segment.stride, segment.scales, segment.flip) == (crop, stride, [1.0], False)
    assert segment.channels == 512
    assert published.departures(cfg) == []
    changed = compose(*given, "segment.scales=[0.5,1.0]", "segment.window=0", "segment.stride=0")
    assert {key for key, *_ in published.departures(changed)} == {
        "segment.scales", "segment.window", "segment.stride",
    }  # fmt: skip


def test_the_schedule_in_steps(segment):
    given = ["schedule_steps=3", "optim.warmup_steps=2", "optim.lr=8e-3", "optim.warmup_lr=0"]
    assert segment("run=a", *given) == 0
    rates = [line["lr"] for line in lines("a", "metrics.jsonl")]
    assert rates == pytest.approx([0, 0.5 * 8e-3 * 2 / 3, 8e-3 / 3])


def mmcv_rate(iteration):
    """mmcv 1: PolyLrUpdaterHook with power 1 and min_lr 0, inside LrUpdaterHook's linear warm-up."""
    base, ratio, warmup, length = 1e-4, 1e-6, 1500, 160_000
    coefficient = (1 - iteration / length) ** 1.0
    regular = (base - 0.0) * coefficient + 0.0
    if iteration < warmup:
        k = (1 - iteration / warmup) * (1 - ratio)
        return regular * (1 - k)
    return regular


def test_the_schedule_is_mmcvs():
    optim = Optim(lr=1e-4, min_lr=0.0, warmup_lr=1e-10, warmup_steps=1500, schedule="poly")
    clock = Clock(1263, 160_000, 1500, 160_000, 0, None, 1, 1.0)
    for step in (0, 1, 749, 1499, 1500, 1501, 80_000, 159_999):
        assert learning_rate(optim, step, clock) == pytest.approx(mmcv_rate(step), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_reaches_its_miou(seed, monkeypatch):
    assert _main("train", ["task=segment", f"seed={seed}", "run=demo", "threads=1"], monkeypatch) == 0
    assert max(line["raw_miou"] for line in evaluated("demo")) >= 75
