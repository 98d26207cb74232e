"""Damaged images in evaluations: known early, left out when asked, with their number; and in predictions."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from reconverge.run import predictions


@pytest.fixture
def copy(photographs, tmp_path):
    """The photographs, with one of the twelve validation images cut in the middle, its header unharmed."""
    shutil.copytree(photographs, tmp_path / "photographs")
    path = tmp_path / "photographs" / "val" / "n00000001" / "002.JPEG"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return tmp_path / "photographs"


def options(root):
    return [f"data.root={root}", "augment.size=32", "evaluate.size=32", "batch=8", "microbatch=4"]


def lines(run):
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


def test_a_damaged_validation_image_is_named_before_the_first_evaluation(copy, train, capfd):
    arguments = [*options(copy), "epochs=40", "evaluate_every=280", "save_every=280", "log_every=1", "run=a"]
    assert train(*arguments) == 65
    said = " ".join(capfd.readouterr().err.split())
    assert "damaged validation images" in said
    assert "n00000001/002.JPEG" in said
    assert all(line["step"] < 280 and "raw_top1" not in line for line in lines("a"))


def test_left_out_when_asked_with_its_number_beside_the_top1(copy, train, evaluate, capfd):
    arguments = [*options(copy), "steps=3", "evaluate_every=3", "save_every=3", "run=a"]
    assert train(*arguments, "data.on_bad_image=substitute") == 0
    assert "(without 1 damaged image)" in " ".join(capfd.readouterr().out.split())
    (line,) = [line for line in lines("a") if "raw_top1" in line]
    assert line["left_out"] == 1
    _, _, kinds = predictions.load(Path("runs/a/outcomes.npz"))
    labels, predicted = kinds["raw"].labels, kinds["raw"].predicted
    assert labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert line["raw_top1"] == pytest.approx(100 * np.mean(labels == predicted))

    assert evaluate("checkpoint=runs/a", "workers=0") == 0
    assert "(1 damaged ones left out)" in " ".join(capfd.readouterr().out.split())
    (path,) = Path("runs/a").glob("eval-*.json")
    found = json.loads(path.read_text())
    assert (found["images"], len(found["left_out"])) == (11, 1)
    assert "n00000001/002.JPEG" in found["left_out"][0]
    assert found["raw"]["top1"] == pytest.approx(line["raw_top1"])

    # The same images without the damaged one have the same top-1.
    (copy / "val" / "n00000001" / "002.JPEG").unlink()
    path.unlink()
    assert evaluate("checkpoint=runs/a", "workers=0") == 0
    (path,) = Path("runs/a").glob("eval-*.json")
    alone = json.loads(path.read_text())
    assert (alone["images"], alone["left_out"]) == (11, [])
    assert alone["raw"]["per_class"] == found["raw"]["per_class"]
    assert alone["raw"]["loss"] == pytest.approx(found["raw"]["loss"], rel=1e-6)


def test_predictions_name_broken_photographs_and_keep_the_others(digits, train, evaluate, tmp_path, capfd):
    assert train(f"data.root={digits}", "run=a", "steps=2") == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, path in enumerate(sorted((digits / "val").rglob("*.png"))[:4]):
        shutil.copy(path, photos / f"{number}.png")
    assert evaluate("checkpoint=runs/a", f"images={photos}", "workers=0") == 0
    with open("runs/a/predictions.csv") as file:
        before = list(csv.DictReader(file))
    (photos / "1b.png").write_bytes(b"no image")
    (photos / "2b.jpg").write_bytes(b"")
    (photos / "3b.jpg").symlink_to("nowhere")
    (photos / "folder.png").mkdir()
    capfd.readouterr()
    assert evaluate("checkpoint=runs/a", f"images={photos}", "workers=0") == 65
    assert "3 of 7 images could not be read" in " ".join(capfd.readouterr().err.split())
    with open("runs/a/predictions.csv") as file:
        after = list(csv.DictReader(file))
    good = [line for line in after if not line["error"]]
    assert [line["image"] for line in good] == [line["image"] for line in before]
    assert [line["class1"] for line in good] == [line["class1"] for line in before]
    assert [float(line["probability1"]) for line in good] == pytest.approx(
        [float(line["probability1"]) for line in before], abs=2e-6
    )
    broken = [(Path(line["image"]).name, line["class1"]) for line in after if line["error"]]
    assert broken == [("1b.png", ""), ("2b.jpg", ""), ("3b.jpg", "")]


def test_the_report_says_how_many_images_an_evaluation_left_out(copy, train, reconverge):
    arguments = [*options(copy), "steps=3", "evaluate_every=3", "save_every=3", "run=a"]
    assert train(*arguments, "data.on_bad_image=substitute") == 0
    code, said = reconverge("report", "runs/a")
    head, row, *_ = said.splitlines()
    assert code == 0
    assert row[head.index("left out") :].split()[0] == "1"
    page = " ".join(Path("runs/a/report.html").read_text().split())
    assert "without 1 damaged image." in page
    assert "damaged images left out: 1" in page


def test_a_repaired_image_is_named_where_the_run_is_resumed(copy, photographs, train, capfd):
    arguments = [*options(copy), "steps=3", "evaluate_every=3", "save_every=1", "log_every=1", "run=a"]
    assert train(*arguments) == 65
    small, whole = (root / "val" / "n00000001" / "002.JPEG" for root in (copy, photographs))
    sizes = [path.stat().st_size for path in (small, whole)]
    shutil.copy(whole, small)
    small.parent.touch()  # reconverge lists a folder again when it has changed
    capfd.readouterr()
    assert train(*arguments) == 78
    said = " ".join(capfd.readouterr().err.split())
    assert f"other validation images (n00000001/002.JPEG had {sizes[0]} bytes and now has {sizes[1]})" in said
    assert "training images" not in said.partition("now")[0]
    assert "resume_allow=[data]" in said
    assert train(*arguments, "resume_allow=[data]") == 0
