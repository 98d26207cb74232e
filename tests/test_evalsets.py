"""The published evaluation sets in the layout of their archives; the scores are compared with a slow loop and
with values computed by hand.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, trained
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms as tv

from reconverge.base.errors import Stop
from reconverge.config.settings import Evaluate, Model
from reconverge.evaluation import sets
from reconverge.evaluation.figures import published_accuracy
from reconverge.models import create
from reconverge.prepare.make import Options, prepare

# As the authors of ImageNet-C publish them: AlexNet's mean errors.
ALEXNET = """gaussian_noise .886428, shot_noise .894468, impulse_noise .922640, defocus_blur .819880,
glass_blur .826268, motion_blur .785948, zoom_blur .798360, snow .866816, frost .826572, fog .819324,
brightness .564592, contrast .853204, elastic_transform .646056, pixelate .717840, jpeg_compression .606500"""
NORMALISE = tv.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
TRANSFORM = tv.Compose(
    [tv.Resize(32, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(32), tv.ToTensor(), NORMALISE]
)


@pytest.fixture(scope="module")
def learned(digits, tmp_path_factory, cache):
    """runs/a: trained long enough to predict some digits right."""
    return trained(
        tmp_path_factory.mktemp("learned"),
        cache,
        f"data.root={digits}",
        "run=a",
        "epochs=3",
        "evaluate_every=never",
    )


@pytest.fixture
def run(learned):
    shutil.copytree(learned, "runs")
    return Path("runs/a")


@pytest.fixture
def logits(run):
    """The raw weights' logits of an image file, by plain torch and torchvision."""
    net = create.model(Model("convnext_atto", "atto", 0.0), 10, 1).eval()
    net.load_state_dict(load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors"))

    def logits(path):
        with torch.no_grad():
            return net(TRANSFORM(Image.open(path).convert("RGB"))[None])[0].tolist()

    return logits


def written(run, name):
    (path,) = run.glob(f"eval-{name}-*.json")
    return json.loads(path.read_text())


def answer(logits, among):
    return max(among, key=lambda label: logits[label])


def percent(answers):
    answers = list(answers)
    return 100 * sum(answers) / len(answers)


@pytest.mark.parametrize("name", ["a", "r"])
def test_of_some_classes_the_answer_is_chosen_among_these(
    name, run, digits, logits, evaluate, tmp_path, capsys
):
    kept = ["2", "3", "5", "7"]
    for label in kept:
        shutil.copytree(digits / "train" / label, tmp_path / "set" / label)
    assert (
        evaluate(
            "checkpoint=runs/a", f"data=eval/{name}", f"data.root={tmp_path}/set", "workers=0", "batch=7"
        )
        == 0
    )
    files = sorted((tmp_path / "set").rglob("*.png"))
    right = [answer(logits(path), map(int, kept)) == int(path.parent.name) for path in files]
    found = written(run, name)
    assert found["raw"]["top1"] == pytest.approx(percent(right))
    assert found["raw"]["images"] == len(files) == 48
    assert percent(right) > percent(
        answer(logits(path), range(10)) == int(path.parent.name) for path in files
    )  # otherwise the test has no effect
    for label in kept:
        of_class = [hit for hit, path in zip(right, files, strict=True) if path.parent.name == label]
        assert found["raw"]["per_class"][label] == pytest.approx(percent(of_class))
    assert f"48 images of eval/{name} (but the published set has " in capsys.readouterr().out


def test_a_set_may_lie_in_shards(run, digits, evaluate, tmp_path):
    for label in "2357":
        shutil.copytree(digits / "train" / label, tmp_path / "set" / "train" / label)
    prepare(
        tmp_path / "set",
        tmp_path / "shards",
        None,
        1,
        Options(shard_mb=200, hold_out=0, resize=None, quality=90, drop_unreadable=False),
    )
    assert evaluate("checkpoint=runs/a", "data=eval/a", f"data.root={tmp_path}/shards", "workers=0") == 0
    of_shards = written(run, "a")["raw"]
    next(run.glob("eval-a-*")).unlink()
    assert evaluate("checkpoint=runs/a", "data=eval/a", f"data.root={tmp_path}/set/train", "workers=0") == 0
    of_folder = written(run, "a")["raw"]
    assert of_shards["per_class"] == of_folder["per_class"]
    assert of_shards["loss"] == pytest.approx(of_folder["loss"], rel=1e-12)


def test_v2_is_named_by_number_and_sketch_by_class(run, digits, logits, evaluate, tmp_path):
    """The digits' classes are called 0 to 9: given other names, V2's folders still say which is which."""
    (run / "classes.txt").write_text("".join(f"n{label:08d}\n" for label in range(10)))
    for label in range(10):
        shutil.copytree(digits / "val" / str(label), tmp_path / "sketch" / f"n{label:08d}")
    expected = percent(
        answer(logits(path), range(10)) == int(path.parent.name) for path in (digits / "val").rglob("*.png")
    )
    assert evaluate("checkpoint=runs/a", "data=eval/v2", f"data.root={digits}/val", "workers=0") == 0
    assert written(run, "v2")["raw"]["top1"] == pytest.approx(expected)
    assert evaluate("checkpoint=runs/a", "data=eval/sketch", f"data.root={tmp_path}/sketch", "workers=0") == 0
    assert written(run, "sketch")["raw"]["top1"] == pytest.approx(expected)


def test_real_labels_are_sets_and_an_empty_one_does_not_count(run, digits, logits, evaluate, tmp_path):
    files = sorted((digits / "val").rglob("*.png"))
    order = np.random.default_rng(0).permutation(len(files))  # names in another order than the classes
    labels = [None] * len(files)
    for number, path in zip(order, files, strict=True):
        folder = tmp_path / "imagenet" / "val" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"ILSVRC2012_val_{number + 1:08d}.png")
        labels[number] = [[], [int(path.parent.name)], [0, 1, 2], [answer(logits(path), range(10))]][
            number % 4
        ]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    options = ["checkpoint=runs/a", "data=eval/real", f"data.root={tmp_path}/imagenet", "workers=0"]
    assert evaluate(*options, f"data.labels={tmp_path}/real.json") == 0
    counted = [
        (answer(logits(path), range(10)), labels[number])
        for number, path in zip(order, files, strict=True)
        if labels[number]
    ]
    assert written(run, "real")["raw"]["real"] == pytest.approx(
        percent(label in those for label, those in counted)
    )
    assert len(counted) == 22
    assert evaluate(*options) == 66
    (tmp_path / "real.json").write_text(json.dumps([[]] * len(labels)))
    assert evaluate(*options, f"data.labels={tmp_path}/real.json") == 65
    (tmp_path / "real.json").write_text("[[1], 2")
    assert evaluate(*options, f"data.labels={tmp_path}/real.json") == 65
    (tmp_path / "real.json").write_text(json.dumps(labels[:-1]))
    assert evaluate(*options, f"data.labels={tmp_path}/real.json") == 78


def test_the_rule_of_real_by_hand():
    assert sets.real_accuracy([{1, 2}, set(), {3}], np.array([2, 0, 1]), np.array([3, 4, 9])) == 50.0
    assert sets.real_accuracy([{1}], np.array([0]), np.array([1])) == 100.0


def test_mce_by_hand():
    alexnet = {
        name: float(error) for name, error in (pair.split() for pair in ALEXNET.replace("\n", " ").split(","))
    }
    assert alexnet == sets.ALEXNET
    assert sets.mce({name: 100 * error for name, error in alexnet.items()}) == pytest.approx(100)
    half = {name: 50 * error for name, error in alexnet.items()}
    assert sets.mce(half | {"fog": 81.9324}) == pytest.approx((14 * 50 + 100) / 15)


def corrupted(digits, to, corruptions, groups=None):
    """CORRUPTION/SEVERITY/CLASS: noise that grows with the severity, another for each corruption; five images
    each.
    """
    for number, name in enumerate(corruptions):
        for severity in range(1, 6):
            random = np.random.default_rng((number, severity))
            for path in sorted((digits / "val").rglob("*.png"))[number % 6 :: 6]:
                image = np.asarray(Image.open(path)).astype(float)
                noisy = image + random.normal(0, 25 * severity, image.shape)
                folder = to / (groups or {}).get(name, "") / name / str(severity) / path.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / path.name)


def errors_by(logits, folder):
    """Percent of wrong answers of one corruption: the mean over the severities."""
    shares = []
    for severity in sorted(folder.iterdir()):
        files = list(severity.rglob("*.png"))
        shares.append(percent(answer(logits(path), range(10)) != int(path.parent.name) for path in files))
    return sum(shares) / 5


@pytest.mark.slow
def test_corruptions_and_the_row_of_the_paper(run, digits, logits, evaluate, tmp_path, capsys):
    alexnet = {
        name: float(error) for name, error in (pair.split() for pair in ALEXNET.replace("\n", " ").split(","))
    }
    groups = {
        name: group
        for group, part in (("noise", "noise"), ("blur", "blur"))
        for name in alexnet
        if name.endswith(part)
    }
    corrupted(digits, tmp_path / "all" / "imagenet-c", alexnet, groups)
    corrupted(digits, tmp_path / "all" / "imagenet-c-bar", sets.C_BAR)
    shutil.copytree(digits / "val", tmp_path / "all" / "imagenet" / "val")
    assert evaluate("checkpoint=runs/a", "suite=robustness", f"suite.root={tmp_path}/all", "workers=0") == 0
    said = capsys.readouterr().out
    assert "left out, because the folder does not exist" in said
    assert "sketch" in said
    found = json.loads(next(run.glob("eval-robustness-*.json")).read_text())["sets"]
    places = {name: tmp_path / "all" / "imagenet-c" / groups.get(name, "") / name for name in alexnet}
    errors = {name: errors_by(logits, path) for name, path in places.items()}
    for name, error in errors.items():
        assert found["c"]["raw"][name] == pytest.approx(error)
    expected = sum(error / alexnet[name] for name, error in errors.items()) / 15
    assert found["c"]["raw"]["mce"] == pytest.approx(expected)
    assert found["c"]["raw"]["mean_error"] == pytest.approx(sum(errors.values()) / 15)
    bars = [errors_by(logits, tmp_path / "all" / "imagenet-c-bar" / name) for name in sets.C_BAR]
    assert found["c_bar"]["raw"]["mean_error"] == pytest.approx(sum(bars) / 10)
    assert found["imagenet1k"]["raw"]["images"] == 30
    heads, raw = [line for line in said.splitlines() if line.startswith(("percent", "raw  "))][-2:]
    assert heads == "percent  imagenet1k (top-1)  c (mCE)  c_bar (mean error)"
    assert raw.split()[1:] == [
        f"{found['imagenet1k']['raw']['top1']:.1f}",
        f"{expected:.1f}",
        f"{sum(bars) / 10:.1f}",
    ]


def test_images_that_are_cropped_already_are_not_cropped_again():
    from reconverge.config.settings import Data

    settings = Evaluate(224, 0.875)
    assert sets.settings_of(Data("c", "evaluation", dataset="c"), settings, []).crop_ratio == 1
    assert sets.settings_of(Data("c", "evaluation", dataset="c"), settings, ["crop_ratio"]) == settings
    assert sets.settings_of(Data("a", "evaluation", dataset="a"), settings, []) == settings


def test_published_figures_are_found():
    assert published_accuracy("convnext_t", Evaluate(224, 0.875)) == (
        "Table 8",
        {"imagenet1k": 82.1, "c": 53.2, "c_bar": 40.0, "a": 24.2, "r": 47.2, "sketch": 33.8},
    )
    who, figures = published_accuracy("convnext_tiny.fb_in1k", Evaluate(224, 0.875))
    assert (who, figures["imagenet1k"], figures["real"], figures["v2"]) == ("timm", 82.066, 87.309, 70.93)
    assert published_accuracy("convnext_atto", Evaluate(32, 1.0))[1] == {}


def test_wrong_input(run, digits, evaluate, capsys, tmp_path):
    for severity in range(4):
        (tmp_path / "noise" / "gaussian_noise" / str(severity)).mkdir(parents=True)
    for arguments, code, said in (
        (["data=eval/a"], 2, "data.root"),
        (["data=eval/a", f"data.root={tmp_path}/nothing"], 66, "no folder"),
        (["data=eval/c", f"data.root={tmp_path}"], 66, "gaussian_noise (4 severities)"),
        (["data=eval/nothing", f"data.root={digits}"], 2, "eval/sketch"),
        (["suite=robustness"], 2, "suite.root"),
        (["suite=robustness", f"suite.root={tmp_path}"], 66, "none of the sets"),
        (["suite=robustness", f"suite.root={digits}", "suite.sets=[z]"], 2, "sketch"),
        (["suite=robustness", f"suite.root={digits}", "images=x.png"], 2, "one of data=, suite= and images="),
        (["images=nothing"], 66, "does not exist"),
        (["images=3"], 66, "does not exist"),
        (["images=[3]"], 2, "images=FOLDER"),
        (["data=eval/sketch", f"data.root={tmp_path}/strange"], 2, "folders that are not names of classes"),
        (["data=eval/a", f"data.root={tmp_path}/strange"], 78, "are not classes of the model"),
    ):
        (tmp_path / "strange" / "cat").mkdir(parents=True, exist_ok=True)
        shutil.copy(next(digits.rglob("*.png")), tmp_path / "strange" / "cat")
        assert evaluate("checkpoint=runs/a", *arguments) == code, arguments
        assert said in capsys.readouterr().err, arguments
    assert evaluate("checkpoint=timm:convnext_tiny.fb_in1k") == 2
    assert "data=imagenet1k" in capsys.readouterr().err


def test_they_are_not_trained_on(compose):
    with pytest.raises(Stop, match=r"for eval\.py only"):
        compose("data=eval/a", "data.root=/path")


def test_predictions_of_images_without_labels(run, digits, logits, evaluate):
    """A folder, read at any depth, and single files; by the EMA weights, the last in the list."""
    assert evaluate("checkpoint=runs/a", f"images={digits}/val", "workers=0") == 0
    with open(run / "predictions.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines] == [
        str(path) for path in sorted((digits / "val").rglob("*.png"))
    ]
    net = create.model(Model("convnext_atto", "atto", 0.0), 10, 1).eval()
    net.load_state_dict(load_file(sorted((run / "checkpoints").iterdir())[-1] / "ema.safetensors"))
    for line in lines[::7]:
        with torch.no_grad():
            probabilities = net(TRANSFORM(Image.open(line["image"]).convert("RGB"))[None])[0].softmax(0)
        values, labels = probabilities.topk(5)
        assert [line[f"class{place}"] for place in range(1, 6)] == [str(label) for label in labels.tolist()]
        assert [float(line[f"probability{place}"]) for place in range(1, 6)] == pytest.approx(
            values.tolist(), abs=2e-6
        )
    with Image.open(run / "predicted.png") as sheet:
        assert sheet.size[0] > 500
    files = ",".join(line["image"] for line in lines[:3])
    assert evaluate("checkpoint=runs/a", f"images=[{files}]", "workers=0") == 0
    assert len((run / "predictions.csv").read_text().splitlines()) == 4
    Path("broken.png").write_bytes(b"no image")
    assert evaluate("checkpoint=runs/a", "images=broken.png", "workers=0") == 65


def test_the_docs_name_every_corruption():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert all(f"`{name}`" in text for name in (*sets.ALEXNET, *sets.C_BAR))
