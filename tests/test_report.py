"""reconverge report: its numbers against others worked out by hand or slowly, and its page, read as a browser
reads it.
"""

import html
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import webbrowser
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require, trained
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error

from reconverge import commands
from reconverge.base import imagenet
from reconverge.commands.report import summary
from reconverge.config import published
from reconverge.report import charts, numbers
from reconverge.report.numbers import Ran
from reconverge.run import reader
from reconverge.run.predictions import Predictions
from reconverge.training.clock import Clock
from reconverge.training.evaluate import calibration_error


@pytest.fixture(scope="module")
def seeds(digits, tmp_path_factory, cache):
    """runs/s0 and runs/s1, which the seed tells apart, and runs/lr, which has another learning rate too; two
    epochs each.
    """
    folder = tmp_path_factory.mktemp("seeds")
    given = [f"data.root={digits}", "steps=14", "log_every=2", "evaluate_every=0"]
    for arguments in (["run=s0", "seed=0"], ["run=s1", "seed=1"], ["run=lr", "seed=1", "optim.lr=1e-3"]):
        runs = trained(folder, cache, *given, *arguments)
    return runs


@pytest.fixture
def runs(seeds):
    """A copy of them, to be reported and harmed."""
    shutil.copytree(seeds, "runs")
    return Path("runs")


@pytest.fixture
def command(monkeypatch, capsys):
    def command(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["reconverge", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out if not ended.value.code else said.err

    return command


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, runs of spaces as one."""

    def __init__(self, path):
        super().__init__()
        self.tags, self._text = [], []
        self.feed(Path(path).read_text())
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] != "style":
            self._text.append(text)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.fixture
def ran(compose):
    """A run of ten steps an epoch with these lines of metrics.jsonl."""

    def ran(records, *arguments, name="a", comparison=None, reason="done"):
        cfg = compose("data=synthetic", *arguments)
        status = {
            "reason": reason,
            "step": 40,
            "total": 10 * cfg.epochs,
            "summary": "",
            "comparison": comparison,
            "time": "2026-11-26T00:00:00",
        }
        return Ran(
            name, Path(name), cfg, ["x", "y"], records, status, {"facts": {"data": {"train": "1"}}}, None
        )

    return ran


def test_mean_and_deviation_over_seeds(ran):
    def one(seed, raw, ema, speeds):
        lines = [
            {"step": 10 * (n + 1), "images_per_second": speed, "data_wait": speed / 1000}
            for n, speed in enumerate(speeds)
        ]
        return ran(
            [
                *lines,
                {"step": 20, "raw_top1": 1.0, "ema_top1": 2.0},
                {"step": 40, "raw_top1": raw, "ema_top1": ema},
            ],
            f"seed={seed}",
            name=f"s{seed}",
        )

    group = [
        one(0, 90.0, 91.0, [100, 300, 200]),
        one(1, 92.0, 91.0, [5, 10]),
        one(2, 97.0, 94.0, [1, 2, 1000]),
    ]
    assert numbers.groups(group) == [group]
    row = numbers.row(group)
    assert (row.runs, row.step) == (["s0", "s1", "s2"], 40)
    assert row.scores == {"raw": [90.0, 92.0, 97.0], "ema": [91.0, 91.0, 94.0]}
    assert row.speed == [200, 7.5, 2]
    assert row.data_wait == pytest.approx([20, 0.75, 0.2])
    # mean 93, deviations -3, -1, 4: (9 + 1 + 16) / 2 = 13; mean 92, deviations -1, -1, 2: 6 / 2 = 3
    said = summary([row], "top-1").splitlines()
    assert "93.00 ± 3.61" in said[1]
    assert "92.00 ± 1.73" in said[1]
    assert "mean ± std of 3" in said[1]
    # One that is still on its way is not averaged with those that are further.
    late = ran([{"step": 20, "raw_top1": 1.0, "ema_top1": 2.0}], "seed=3", name="s3")
    assert numbers.row([*group, late]).scores == row.scores
    assert "mean ± std of 3 of 4)" in summary([numbers.row([*group, late])], "top-1")


def test_curves_of_several_seeds(ran):
    one = ran(
        [{"step": step, "loss": loss} for step, loss in ((5, 3.0), (10, 2.0), (15, math.nan), (20, 1.0))],
        "seed=0",
    )
    other = ran(
        [{"step": step, "loss": loss} for step, loss in ((10, 4.0), (15, 4.0), (20, None))]
        + [{"step": 30, "lr": 1.0}],
        "seed=1",
    )
    both = numbers.curve([one, other], "loss")
    assert both.epochs.tolist() == [1.0]  # steps 5 and 15 are of one alone, and step 20 has no number
    assert both.mean.tolist() == [3.0]
    assert both.std.tolist() == pytest.approx([math.sqrt(2)])
    alone = numbers.curve([one], "loss")
    assert (alone.epochs.tolist(), alone.mean.tolist(), alone.std) == ([0.5, 1.0, 2.0], [3.0, 2.0, 1.0], None)
    assert numbers.curve([one, other], "lr").mean.tolist() == [1.0]  # of the one that has it
    assert numbers.curve([one, other], "grad_norm") is None


def test_which_runs_are_one_group(ran):
    runs = [
        ran([], "seed=0", name="a"),
        ran([], "seed=1", "workers=3", "log_every=7", name="b"),  # the machine's
        ran([], "seed=1", name="b again"),  # a seed that comes again is no other sample
        ran([], "seed=2", "optim.lr=1e-3", name="lr"),
        ran([], "seed=3", "steps=7", name="short"),
        ran([], "seed=4", name="other images")._replace(environment={"facts": {"data": {"train": "2"}}}),
        ran([], "seed=2", name="c"),
    ]
    assert [[run.name for run in group] for group in numbers.groups(runs)] == [
        ["a", "b", "c"],
        ["b again"],
        ["lr"],
        ["short"],
        ["other images"],
    ]
    assert dict(numbers.differing([runs[0], runs[1], runs[3]])) == {
        "seed": [0, 1, 2],
        "workers": [None, 3, None],
        "log_every": [10, 7, 10],
        "optim.lr": [runs[0].cfg.optim.lr, runs[0].cfg.optim.lr, 1e-3],
    }
    assert numbers.differing([runs[0]]) == []


@pytest.fixture
def said():
    """Of 300 images in 7 classes, of which one has no image and one is never right."""
    random = np.random.Generator(np.random.PCG64(3))
    labels = random.choice([0, 1, 2, 4, 5, 6], 300)
    logits = random.normal(size=(300, 7)) + 3 * np.eye(7)[labels] * (labels != 4)[:, None]
    logits[labels == 4, 4] = -9
    logits[:20, 0] += 100  # probabilities of exactly 1
    probabilities = torch.from_numpy(logits).softmax(1)
    confidence, predicted = probabilities.max(1)
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), reduction="none"
    )
    return Predictions(labels, predicted.numpy(), confidence.numpy(), losses.numpy()), probabilities


def test_classes_and_confusions_by_plain_counting(said):
    found, _ = said
    pairs = list(zip(found.labels.tolist(), found.predicted.tolist(), strict=True))
    images, right = Counter(true for true, _ in pairs), Counter(true for true, said in pairs if true == said)
    classes = numbers.worst_classes(found)
    assert {of.label: (of.images, of.right) for of in classes} == {
        label: (images[label], right[label]) for label in images
    }
    assert [of.accuracy for of in classes] == sorted(right[label] / images[label] for label in images)
    assert classes[0].label == 4
    assert 3 not in {of.label for of in classes}
    counted = Counter(pair for pair in pairs if pair[0] != pair[1])
    confused = numbers.confusions(found)
    assert {(true, said): count for true, said, count in confused} == counted
    assert [count for *_, count in confused] == sorted(counted.values(), reverse=True)
    assert numbers.confusions(Predictions(found.labels, found.labels, found.confidence, found.losses)) == []


def test_the_confusion_matrix_by_plain_counting(said):
    found, _ = said
    matrix = numbers.confusion_matrix(found, 7)
    counted = Counter(zip(found.labels.tolist(), found.predicted.tolist(), strict=True))
    assert {(true, at): matrix[true, at] for true, at in np.argwhere(matrix).tolist()} == counted
    chart, width = charts.confusions(matrix, ["a", "b", "c", "d" * 20, "$\\frac{1}$", "<b>", "g"], "x")
    texts = [html.unescape(text) for text in re.findall("<text[^>]*>([^<]*)</text>", chart)]
    assert Counter(texts) >= Counter(map(str, counted.values()))
    assert {"d" * 13 + "…", "$\\frac{1}$", "<b>", "true class", "predicted class"} <= set(texts)
    assert 200 < width < 500


def test_the_best_evaluation(ran):
    lines = [
        {"step": 10, "raw_top1": 50.0, "ema_top1": 70.0},
        {"step": 15, "loss": 1.0},
        {"step": 20, "raw_top1": 80.0, "ema_top1": 60.0},
        {"step": 30, "raw_top1": 80.0, "ema_top1": 75.0},
    ]
    assert reader.best(lines) == (20, "raw", 80.0)
    assert reader.best(lines[:2]) == (10, "ema", 70.0)
    assert reader.best(lines[1:2]) is None
    said = summary([numbers.row([ran(lines)])], "top-1").splitlines()
    assert said[0].split("  ")[-1] == "best top-1"  # neither published nor a speed: no columns of dashes
    assert said[1].split() == ["a", "30", "80.00", "75.00", "80.00"]


def test_calibration_by_torchmetrics_and_by_plain_counting(said):
    found, probabilities = said
    bins = numbers.reliability(found)
    expected = multiclass_calibration_error(
        probabilities, torch.from_numpy(found.labels), num_classes=7, n_bins=15
    )
    right = torch.from_numpy(found.labels == found.predicted)
    counted = calibration_error(torch.from_numpy(found.confidence), right)
    assert counted == pytest.approx(100 * float(expected), rel=1e-6)  # it counts in float32
    by_bins = sum(of.images * abs(of.accuracy - of.confidence) for of in bins) / 300
    assert counted == pytest.approx(100 * by_bins, rel=1e-6)
    assert (found.confidence == 1).sum() >= 20
    places = {}
    for confidence, true, said_class in zip(found.confidence, found.labels, found.predicted, strict=True):
        places.setdefault(int(confidence * 15), []).append((confidence, true == said_class))
    assert len(bins) == len(places) > 10
    for of, place in zip(bins, sorted(places), strict=True):
        sure, right = zip(*places[place], strict=True)
        assert of.images == len(sure)
        assert of.confidence == pytest.approx(statistics.mean(map(float, sure)))
        assert of.accuracy == pytest.approx(sum(right) / len(right))


def test_best_and_worst_images(said):
    found, _ = said
    best, worst = numbers.extremes(found, 12)
    ranked = sorted(range(300), key=lambda image: found.losses[image])
    assert (best, worst) == (ranked[:12], ranked[::-1][:12])
    few = Predictions(*(column[:5] for column in found))
    assert [len(images) for images in numbers.extremes(few, 12)] == [2, 2]
    assert not set(numbers.extremes(few, 12)[0]) & set(numbers.extremes(few, 12)[1])
    one = Predictions(*(column[:1] for column in found))
    assert numbers.extremes(one, 12) == ([0], [0])


def test_many_points_are_thinned_to_means():
    values = np.arange(4000.0)
    thin = charts.thinned(values)  # three to a point
    assert len(thin) == 1334
    assert thin[:2].tolist() == [1.0, 4.0]
    assert thin[-1] == 3999.0
    assert charts.thinned(values[:1500]).tolist() == values[:1500].tolist()


def test_the_verdict_is_the_sentence_of_the_last_line(train, ran):
    given = ["model=convnext_atto", "recipe=in1k", "augment.size=32", "evaluate.size=32"]
    assert train("run=p", *given, "steps=1", "evaluate_every=0") == 0
    (run,) = numbers.read([Path("runs/p")])
    assert numbers.verdict(run) == "not comparable: no top-1 of convnext_atto with recipe=in1k is published"
    assert numbers.verdict(run) in run.status["summary"]
    assert numbers.row([run]).published is None

    recipe = ["model=convnext_t", "recipe=in1k"]
    imagenet, cfg = (range(1_281_167), range(50_000)), ran([], *recipe).cfg
    clock = Clock.of(cfg, 1_281_167)
    within = published.comparison(cfg, clock.total, clock.total, *imagenet, {"raw": 80.0, "ema": 82.2})
    assert within == "published 82.1 ± 0.2 %: within the noise band (+0.10)"
    for sentence in (within, published.comparison(cfg, clock.total, 7, range(120), range(30), {})):
        assert numbers.verdict(ran([], *recipe, comparison=sentence)) == sentence
    assert (
        numbers.verdict(ran([], *recipe, reason="running"))
        == "not compared with the published number: the run has not finished"
    )
    assert numbers.verdict(ran([])) == "recipe=demo has no published number to compare with"
    assert numbers.row([ran([], *recipe)]).published == "82.1 ± 0.2"


# ---- the page ----------------------------------------------------------------------------------------------


def test_three_runs(runs, command, capsys):
    code, said = command("runs/s0", "runs/s1", "runs/lr")
    assert code == 0
    last = {
        name: json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("s0", "s1", "lr")
    }
    top1 = [last[name]["raw_top1"] for name in ("s0", "s1")]
    expected = f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}"
    (row,) = [line for line in said.splitlines() if line.startswith("s0 ... s1 (mean ± std of 2)")]
    assert expected in row
    assert f"{last['lr']['ema_top1']:.2f}" in next(
        line for line in said.splitlines() if line.startswith("lr ")
    )
    assert said.splitlines()[-1] == "report.html"

    page = Page("report.html")
    assert expected in page.text
    assert f"{last['s1']['ema_top1']:.2f} % top-1, EMA weights" in page.text
    assert page.count("svg") == 7 + 3 * 2
    assert page.count("img") == 3 * (12 + 12 + 1)
    assert page.count("script") == page.count("link") == 0
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    text = Path("report.html").read_text()
    referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {one or other for one, other in referred} <= set(identifiers)
    assert not [
        address
        for address in re.findall(r"https?://[^\"'<> ]+", text)
        if not address.startswith("http://www.w3.org/")
    ]
    assert "Runs that differ only in seed are averaged" in page.text
    assert "training loss (mixed images, smoothed labels)" in page.text
    assert "seed 0 1 1 optim.lr" in page.text.partition("Settings in which the runs differ")[2]

    command("runs/s0", "runs/s1", "runs/lr", "--to", "again.html")
    assert Path("again.html").read_bytes() == Path("report.html").read_bytes()


def test_the_best_evaluation_is_named_beside_the_last(runs, command):
    run = runs / "s0"
    metrics = (run / "metrics.jsonl").read_text()
    assert command("runs/s0")[0] == 0
    assert "Evaluated after step 14 (epoch 2). No evaluation was better." in Page(run / "report.html").text
    better = json.dumps({"step": 7, "raw_top1": 99.5, "ema_top1": 1.0})
    (run / "metrics.jsonl").write_text(better + "\n" + metrics)
    assert command("runs/s0")[0] == 0
    page = Page(run / "report.html").text
    assert "step 14 (epoch 2). Best: 99.50 % by the raw weights after step 7 (epoch 1). recipe" in page
    (run / "checkpoints" / "step-00000007").mkdir(exist_ok=True)
    assert command("runs/s0")[0] == 0
    assert "(epoch 1), saved in checkpoints/step-00000007 ." in Page(run / "report.html").text


def test_one_run_is_its_own_page_and_is_opened(runs, command, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    code, said = command("runs/s0/checkpoints", "--open")
    assert code == 0
    assert said.splitlines()[-1] == str((runs / "s0" / "report.html").resolve())
    assert opened == [(runs / "s0" / "report.html").resolve().as_uri()]
    page = Page(runs / "s0" / "report.html")
    environment = json.loads((runs / "s0" / "environment.json").read_text())
    assert environment["starts"][0]["command"] in " ".join(page._text)
    assert f"torch {environment['packages']['torch']}" in page.text
    assert "R1 re-run, R2 resume, R3 data-elastic; not R4 weight-elastic" in page.text
    assert "recipe=demo has no published number to compare with" in page.text
    assert "optim.lr 0.003 peak learning rate" in page.text.partition("All settings")[2]
    assert "recipe.drop_path" not in page.text
    assert not list((runs / "s0").glob(".report*"))


def test_the_images_are_the_best_and_the_worst(runs, command, digits):
    assert command("runs/s0")[0] == 0
    with np.load("runs/s0/outcomes.npz") as file:
        labels, ema, raw = file["labels"], file["ema/predicted"], file["raw/predicted"]
        kind = "ema" if (ema == labels).sum() > (raw == labels).sum() else "raw"
        losses, predicted = file[f"{kind}/losses"], file[f"{kind}/predicted"]
    order = np.argsort(losses)
    paths = sorted((digits / "val").glob("*/*"))
    titles = [
        attributes["title"]
        for tag, attributes in Page("runs/s0/report.html").tags
        if tag == "figure" and "title" in attributes
    ]
    assert [title.partition(" (")[0] for title in titles[:12]] == [str(paths[image]) for image in order[:12]]
    assert [title.partition(" (")[0] for title in titles[12:]] == [
        str(paths[image]) for image in order[::-1][:12]
    ]
    worst = order[-1]
    assert predicted[worst] != labels[worst]
    assert f"predicted {predicted[worst]} , true {labels[worst]}" in Page("runs/s0/report.html").text


HOSTILE = [
    "<script>alert(1)</script",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}{% raw %}",
    "$\\frac{1}$&amp;",
    "' onload='alert(1)",
]


def test_hostile_names_are_only_text(digits, train, command):
    """Of classes, of the run's folder and in the command; they reach no tag, no attribute and no formula."""
    for split in ("train", "val"):
        for label, folder in enumerate(sorted((digits / split).iterdir())):
            shutil.copytree(folder, Path("evil") / split / f"{label}{HOSTILE[label % 5].replace('/', '')}")
    assert train("run=evil", "steps=1", "evaluate_every=0", "data.root=evil") == 0
    Path("runs/evil").rename("runs/" + "<b onclick=alert(1)>")
    assert command("runs/<b onclick=alert(1)>", "--to", "evil.html")[0] == 0
    page = Page("evil.html")
    assert page.count("script") == 0
    assert page.count("b") == 2  # the two numbers
    assert not [
        attributes for _, attributes in page.tags if {"onerror", "onclick", "onload"} & set(attributes)
    ]
    assert "<b onclick=alert(1)>" in page.text
    for label, name in enumerate(HOSTILE):
        assert f"{label}{name.replace('/', '')}" in page.text
    assert page.count("img") == 12 + 12 + 1


def test_a_thousand_classes_by_their_names(runs, command):
    random = np.random.Generator(np.random.PCG64(5))
    labels = np.repeat(np.arange(1000), 5)
    predicted = np.where(random.random(5000) < 0.8, labels, random.integers(0, 1000, 5000))
    predicted[:5] = 1  # tench is a goldfish, always
    columns = {
        "ema/predicted": predicted,
        "ema/confidence": random.random(5000),
        "ema/losses": random.random(5000),
    }
    np.savez(runs / "s0" / "outcomes.npz", step=14, fingerprint="f", labels=labels, **columns)
    (runs / "s0" / "classes.txt").write_text("".join(f"{name}\n" for name in imagenet.imagenet1k()))
    assert command("runs/s0")[0] == 0
    page = Page("runs/s0/report.html")
    assert "the 30 worst of 1000" in page.text
    table = page.text.partition("class images accuracy, %")[2]
    assert table.startswith(" tench, Tinca tinca 5 0.0 ")
    assert "tench, Tinca tinca goldfish, Carassius auratus 5 100.0" in page.text
    assert "No images are shown" in page.text
    assert "Confusion matrix" not in page.text
    assert page.count("img") == 1


@pytest.mark.parametrize(
    ("arguments", "lacks", "said"),
    [
        (
            ["steps=7", "evaluate_every=never"],
            ["validation loss", "top-1, %"],
            ["Not evaluated.", "no outcomes.npz"],
        ),
        (["steps=1"], [], ["evaluated"]),
        (
            ["steps=3", "ema.decay=null"],
            [],
            ["top-1, raw weights", "Predictions of the raw weights for 30 validation images"],
        ),
        (
            ["steps=1", "data.val=null", "evaluate_every=never"],
            ["validation loss", "top-1, %"],
            ["Not evaluated."],
        ),
    ],
)
def test_runs_that_lack_something(train, command, arguments, lacks, said):
    assert train("run=odd", "evaluate_every=0", *arguments) == 0
    code, printed = command("runs/odd")
    assert code == 0
    assert printed.splitlines()[1].startswith("odd")
    page = Page("runs/odd/report.html")
    for part in said:
        assert part in page.text or part == "evaluated"
    assert page.count("svg") == 7 - len(lacks) + 2 * (not lacks)
    for title in lacks:
        assert title in page.text.partition("because nothing is logged: ")[2].partition(".")[0]
    assert ("EMA, %" in page.text) == (not {"ema.decay=null", "evaluate_every=never"} & set(arguments))
    assert "published, %" not in page.text
    assert "published" not in printed


def test_a_run_in_progress_and_its_seeds(runs, command):
    """Nothing of it is complete yet: its last line is half written, its first evaluation still to come."""
    run = runs / "s1"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = [line for line in lines if "loss" in json.loads(line)][:2]
    (run / "metrics.jsonl").write_text("".join(early) + lines[2][:15])
    (run / "status.json").write_text(
        json.dumps(
            json.loads((run / "status.json").read_text()) | {"reason": "running", "step": 4, "summary": ""}
        )
    )
    (run / "outcomes.npz").unlink()
    shutil.rmtree(run / "checkpoints")
    code, said = command("runs/s0", "runs/s1", "--to", "now.html")
    assert code == 0
    assert "s0 ... s1 (mean ± std of 1 of 2)" in said
    assert "±" not in said.splitlines()[1].partition(")")[2].partition("-")[0].split()[1]
    page = Page("now.html")
    assert "running step 4 of 28" in page.text
    (run / "metrics.jsonl").write_text("")  # before the first line
    assert command("runs/s1")[0] == 0
    assert Page(run / "report.html").count("svg") == 0


def test_the_images_are_gone_or_others(runs, command, digits, tmp_path):
    config = runs / "s0" / "config.yaml"
    config.write_text(config.read_text().replace(f"root: {digits}", f"root: {tmp_path}/gone"))
    assert command("runs/s0")[0] == 0
    page = Page("runs/s0/report.html")
    assert f"No images are shown: no folder {tmp_path}/gone/val." in page.text
    assert page.count("img") == 1
    shutil.copytree(digits, "gone")
    next(Path("gone/val/0").iterdir()).unlink()
    assert command("runs/s0")[0] == 0
    assert "the validation images have changed" in Page("runs/s0/report.html").text


def damage(name, change):
    def harm(run):
        (run / name).write_bytes(change((run / name).read_bytes()))

    return harm


def other_labels(run):
    with np.load(run / "outcomes.npz") as file:
        arrays = dict(file)
    np.savez(run / "outcomes.npz", **arrays | {"labels": arrays["labels"] + 1})


def fewer_losses(run):
    with np.load(run / "outcomes.npz") as file:
        arrays = dict(file)
    np.savez(run / "outcomes.npz", **arrays | {"raw/losses": arrays["raw/losses"][1:]})


@pytest.mark.parametrize(
    ("harm", "arguments", "code", "said"),
    [
        (None, ["runs/none"], 66, "runs/none is neither a run nor"),
        (None, ["runs"], 66, "is neither a run nor"),
        (None, [], 2, "RUN"),
        (None, ["runs/s0", "runs/s1", "runs/../runs/s0/checkpoints"], 2, "twice"),
        (None, ["runs/s0", "--to", "nowhere/x.html"], 66,
            "nowhere/x.html cannot be written: No such file or directory"),
        (None, ["runs/s0", "--to", "."], 66, ". cannot be written: it is a folder"),
        (None, ["runs/s0", "--to", "x" * 300], 2, "cannot be written: File name too long"),
        (lambda run: (run / "metrics.jsonl").unlink(), ["runs/s0"], 66, "has no metrics.jsonl"),
        (lambda run: (run / "status.json").unlink(), ["runs/s0"], 66, "status.json"),
        (damage("metrics.jsonl", lambda text: text.replace(b"{", b"[", 1)), ["runs/s0"], 65, "metrics.jsonl"),
        (damage("metrics.jsonl", lambda text: b"[1]\n" + text), ["runs/s0"], 65, "a line without a step"),
        (damage("metrics.jsonl", lambda text: text + b'{"step": 99, "loss": "low"}\n'), ["runs/s0"], 65,
            "loss is not a number"),
        (damage("metrics.jsonl", lambda text: b"\xff" + text), ["runs/s0"], 65, "metrics.jsonl"),
        (damage("environment.json", lambda text: text[:-20]), ["runs/s0"], 65, "environment.json"),
        (damage("status.json", lambda text: b"{}"), ["runs/s0"], 65, "reason"),
        (damage("config.yaml", lambda text: text[:200] + b"\n]["), ["runs/s0"], 65, "config.yaml"),
        (damage("outcomes.npz", lambda text: text[:-100]), ["runs/s0"], 65, "outcomes.npz"),
        (damage("outcomes.npz", lambda text: b""), ["runs/s0"], 65, "outcomes.npz"),
        (damage("outcomes.npz", lambda text: b"text"), ["runs/s0"], 65, "outcomes.npz"),
        (damage("outcomes.npz", lambda text: text[:300] + bytes([text[300] ^ 1]) + text[301:]), ["runs/s0"],
            65, "outcomes.npz"),
        (other_labels, ["runs/s0"], 65, "among the 10 of classes.txt"),
        (fewer_losses, ["runs/s0"], 65, "columns of 30, 30, 30, 29 images"),
    ],
)  # fmt: skip
def test_wrong_input(runs, command, harm, arguments, code, said):
    if harm:
        harm(runs / "s0")
    ended, err = command(*arguments)
    assert ended == code
    assert said in err
    assert "Traceback" not in err
    if arguments:
        assert [line[:11].strip() for line in err.splitlines()[-3:]] == ["given", "allowed", "change"]
    assert not list(Path().rglob("*.html"))
    assert not list(Path().rglob(".*.new"))


def test_a_full_disk(runs, command, small_disk):
    (small_disk / "rest").write_bytes(b"0" * 1_950_000)
    code, err = command("runs/s0", "--to", small_disk / "page.html")
    assert code == 74
    assert "cannot be written: No space left on device" in err
    assert [path.name for path in small_disk.iterdir()] == ["rest"]


# ---- in a browser ------------------------------------------------------------------------------------------

# A window is at least 500 pixels wide, a frame as wide as it is told; it keeps the page's own policy, by
# which no script may run in it.
FRAME = """<title></title>
<iframe srcdoc="{page}" style="width: {width}px; height: 2000px; border: 0"></iframe>
<script>
onload = () => {{
  const {{ contentWindow, contentDocument }} = document.querySelector("iframe");
  contentDocument.querySelectorAll("details").forEach(part => part.open = true);
  const boxes = [...contentDocument.querySelectorAll("svg, img")].map(part => part.getBoundingClientRect());
  const sizes = boxes.map(box => [box.width, box.height]), inner = contentWindow.innerWidth;
  document.title = JSON.stringify({{ inner, page: contentDocument.documentElement.scrollWidth, sizes }});
}};
</script>"""


@pytest.fixture
def chromium(tmp_path):
    """chromium(option, page, width, dark): its output, and what it logged."""
    browser = shutil.which("chromium")
    require("chromium", browser, "chromium is not installed (apt-get install chromium)")

    def chromium(option, page, width, dark=False):
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--v=0",
        ]
        flags += [
            f"--user-data-dir={tmp_path}/profile",
            f"--window-size={width},2400",
            f"--blink-settings=preferredColorScheme={int(not dark)}",
        ]
        ended = subprocess.run(
            [browser, *flags, option, Path(page).resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout, ended.stderr

    return chromium


@pytest.mark.slow  # a browser takes seconds to start
@pytest.mark.parametrize("names", [["s0"], ["s0", "s1", "lr"]], ids=["one", "three"])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(runs, command, chromium, names, width):
    assert command(*(runs / name for name in names), "--to", "page.html")[0] == 0
    dom, log = chromium("--dump-dom", "page.html", width)
    assert "CONSOLE" not in log
    assert len(re.findall("<svg", dom)) == 7 + 2 * len(names)

    Path("frame.html").write_text(FRAME.format(page=html.escape(Path("page.html").read_text()), width=width))
    dom, log = chromium("--dump-dom", "frame.html", 1500)
    assert "CONSOLE" not in log
    measured = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert measured["inner"] == measured["page"] == width
    assert len(measured["sizes"]) == 7 + len(names) * (2 + 25)
    assert all(across > 50 and down > 50 for across, down in measured["sizes"])

    grounds = []
    for dark in (False, True):
        chromium("--screenshot=shown.png", "page.html", width, dark)
        with Image.open("shown.png") as shown:
            pixels = np.asarray(shown.convert("L")).astype(float)
        assert pixels.std() > 20
        grounds.append(pixels[:, :4].mean())  # left of everything
    assert grounds[0] > 200 > 60 > grounds[1]
