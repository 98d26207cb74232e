"""Class folders: links that go round, a damaged index in the cache, and what is said about the files."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Data
from reconverge.data import image, suitable
from reconverge.data.folder import differences, open_folder
from reconverge.data.shards import open_shards
from reconverge.data.sources import open_sources


def classes(root, names=("a", "b"), count=4, suffix="png", **options):
    """root/NAME/0.png ..., each image with its own pixels."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.arange(20 * 30 * 3).reshape(20, 30, 3) * (3 + label + 7 * number) % 251
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.{suffix}", **options)
    return root


def samples(source):
    return [(source.index.key(sample), int(source.labels(np.array(sample)))) for sample in range(len(source))]


EXPECTED = [(f"{name}/{number}.png", label) for label, name in enumerate("ab") for number in range(4)]


@pytest.mark.parametrize(
    "links",
    [
        {"a/loop": ".."},
        {"a/loop": "."},
        {"a/x": "../b"},
        {"b/x": "../a", "a/y": "../../train"},
        {"a/up": "../..", "b/up": "../.."},
    ],
    ids=str,
)
def test_links_that_go_round_change_neither_number_nor_labels(links, reconverge, tmp_path):
    train = classes(tmp_path / "source" / "train")
    for path, target in links.items():
        (train / path).symlink_to(target)
    source = open_folder(train, tmp_path / "cache")
    assert samples(source) == EXPECTED
    (said,) = [note for note in source.notes if "links left out" in note]
    assert f"read already: {len(links)} (the first is {min(links)}" in said
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    assert code == 0, said
    made, _ = open_shards(tmp_path / "made", None, validation=False)
    assert sorted(samples(made)) == [(f"{key[:-4]}_png", label) for key, label in EXPECTED]
    report = (tmp_path / "made" / "report.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["name"] for line in report) == sorted(f"train/{path}" for path in links)


def test_links_to_folders_elsewhere_are_followed_once(tmp_path):
    classes(tmp_path / "elsewhere", ("c",))
    train = classes(tmp_path / "train")
    (train / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (train / "a" / "zagain").symlink_to(tmp_path / "elsewhere" / "c")
    source = open_folder(train, tmp_path / "cache")
    assert len(source) == 12
    assert ("a/more/c/0.png", 0) in samples(source)
    assert any("the first is a/zagain" in note for note in source.notes)


def test_one_folder_as_two_classes_is_refused(tmp_path):
    train = classes(tmp_path / "train")
    (train / "c").symlink_to("a")
    with pytest.raises(Stop, match="same folder") as stopped:
        open_folder(train, tmp_path / "cache")
    assert stopped.value.code == Exit.USAGE


def spoil_labels(rows, page):
    table = np.load(rows, mmap_mode="r+")
    table["label"] = 1 - table["label"]
    table.flush()


DAMAGE = {
    "labels": spoil_labels,
    "rows cut off": lambda rows, page: os.truncate(rows, 100),
    "rows empty": lambda rows, page: os.truncate(rows, 0),
    "rows missing": lambda rows, page: rows.unlink(),
    "page cut off": lambda rows, page: os.truncate(page, 60),
    "page empty": lambda rows, page: os.truncate(page, 0),
    "page of another kind": lambda rows, page: page.write_text("[]"),
    "class names": lambda rows, page: page.write_text(page.read_text().replace('["a", "b"]', '["b", "a"]')),
    "fingerprint": lambda rows, page: page.write_text(page.read_text().replace(rows.stem, "0" * 64)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_again(damage, tmp_path, capsys):
    train = classes(tmp_path / "train")
    first = open_folder(train, tmp_path / "cache")
    assert samples(first) == EXPECTED
    (rows,), (page,) = (tmp_path / "cache").rglob("*.npy"), (tmp_path / "cache").rglob("*.json")
    DAMAGE[damage](rows, page)
    again = open_folder(train, tmp_path / "cache")
    assert (samples(again), again.fingerprint, again.classes) == (EXPECTED, first.fingerprint, ["a", "b"])
    assert "is damaged; the folder is listed again" in " ".join(capsys.readouterr().out.split())
    stamp = page.stat().st_mtime_ns
    assert samples(open_folder(train, tmp_path / "cache")) == EXPECTED
    assert page.stat().st_mtime_ns == stamp  # only once


def turned(orientation):
    exif = Image.Exif()
    exif[image.ORIENTATION] = orientation
    return exif


def test_what_is_not_used_as_it_is_is_counted_and_said_once(reconverge, tmp_path):
    train = classes(tmp_path / "source" / "train")
    classes(tmp_path / "source" / "train", ("c",), 3, "jpg", exif=turned(6))
    classes(tmp_path / "source" / "train", ("d",), 2, "jpg", exif=turned(1))
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(train / "a" / "wide.png")
    (train / "a" / "list.txt").write_text("x")
    (train / "b" / "y.tga").write_text("x")
    clear = Image.new("RGBA", (30, 20), (9, 9, 9, 0))
    clear.save(train / "a" / "clear.png")
    clear.convert("RGB").save(
        train / "b" / "moves.gif", save_all=True, append_images=[Image.new("RGB", (30, 20))]
    )
    (train / "b" / ".ipynb_checkpoints").mkdir()
    for hidden in (".ipynb_checkpoints/0.png", "._1.png"):
        shutil.copy(train / "b" / "0.png", train / "b" / hidden)
    (train / ".git").mkdir()
    os.mkfifo(train / "a" / "pipe.png")  # whoever opens it waits for ever
    shutil.copy(train / "b" / "0.png", train / "stray.png")
    notes = open_folder(train, tmp_path / "cache").notes
    for count, kind in ((3, image.TURNED), (1, image.WIDE), (1, image.TRANSPARENT), (1, image.ANIMATED)):
        assert f"{count} images of 16 that were looked at {kind}" in notes
    assert (
        "files left out because they are not images: 3 (.png, .tga, .txt; the first is a/list.txt)" in notes
    )
    assert f"hidden files and folders of {train} left out: 3 (the first is .git)" in notes
    assert f"files beside the class folders of {train} left out: 1 (the first is stray.png)" in notes
    assert len(notes) == 7
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    said = " ".join(said.split())
    assert code == 0, said
    for count, kind in ((3, image.TURNED), (1, image.WIDE), (1, image.TRANSPARENT), (1, image.ANIMATED)):
        assert f"{count} images {kind}" in said
    report = [json.loads(line) for line in (tmp_path / "made" / "report.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in report if line["fate"] == "left out") == [
        "train/.git",
        "train/a/list.txt",
        "train/a/pipe.png",
        "train/b/._1.png",
        "train/b/.ipynb_checkpoints/0.png",
        "train/b/y.tga",
        "train/stray.png",
    ]
    made, _ = open_shards(tmp_path / "made", None, validation=False)
    assert len(made) == 16
    assert [note for note in made.notes if "images" in note] == [
        f"train: 1 images {image.WIDE}",
        f"train: 3 images {image.TURNED}",
        f"train: 1 images {image.ANIMATED}",
        f"train: 1 images {image.TRANSPARENT}",
    ]


def test_prepare_refuses_validation_folders_of_no_class(reconverge, tmp_path):
    classes(tmp_path / "source" / "train")
    classes(tmp_path / "source" / "val", ("a", "bb"))
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    assert (code, "val: folders that are not names of classes: bb" in said) == (65, True), said


def test_a_folder_one_level_too_high_is_named(reconverge, train, tmp_path):
    root = tmp_path / "source"
    classes(root / "train" / "photos")
    classes(root / "val" / "photos")
    code, said = reconverge("prepare", root, "--to", tmp_path / "made")
    assert (code, "one level too high" in said) == (2, True), said
    options = ["data=folder", f"data.root={root}", "steps=1", "batch=4", "microbatch=2"]
    assert train(*options, "run=one") == 2
    classes(root / "train" / "more", ("c",))
    notes = open_folder(root / "train", tmp_path / "cache").notes
    assert any("one level too high" in note for note in notes)


def test_images_of_one_colour_only_are_named(reconverge, tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for number in range(3):
                path = tmp_path / "source" / split / name / f"{number}.png"
                Image.new("RGB", (20, 20), (number, 9, 9)).save(path)
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    assert (code, "every image is of one colour only" in " ".join(said.split())) == (0, True), said
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "source" / "train" / "a" / "0.png").unlink()
    classes(tmp_path / "other", ("a",), 1)
    shutil.copy(tmp_path / "other" / "a" / "0.png", tmp_path / "source" / "train" / "a" / "0.png")
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    assert "train: every image" not in " ".join(said.split())


def test_validation_images_that_are_trained_on_are_named(tmp_path, cache):
    classes(tmp_path / "one")
    classes(tmp_path / "two", count=9)
    notes = {}
    for name in ("one", "two"):
        data = Data("folder", "folder", root=str(tmp_path), train="two", val=name, cache=str(cache / name))
        notes[name] = " ".join(suitable.doubts(*open_sources(data)))
    assert "the validation images are the training images" in notes["two"]
    assert "at least 8 of 8 validation images are training images too" in notes["one"]
    for number in range(4):
        other = np.full((20, 30, 3), number, np.uint8)
        other[:, :15] = 77
        Image.fromarray(other).save(tmp_path / "one" / "a" / f"{number}.png")
        Image.fromarray(other[::-1, ::-1]).save(tmp_path / "one" / "b" / f"{number}.png")
    data = Data("folder", "folder", root=str(tmp_path), train="two", val="one", cache=str(cache / "new"))
    assert suitable.doubts(*open_sources(data)) == []


def test_broken_headers_are_refused_before_training(train, tmp_path):
    root = tmp_path / "source"
    for split in ("train", "val"):
        classes(root / split, count=8)
    broken = root / "val" / "b" / "3.png"
    good = broken.read_bytes()
    broken.write_bytes(b"x" * len(good))
    options = ["data=folder", f"data.root={root}", f"data.cache={tmp_path / 'cache'}", "steps=1", "batch=4"]
    options += ["microbatch=2", "augment.size=32", "evaluate.size=32", "evaluate_every=never"]
    assert train(*options, "run=one") == 65
    broken.write_bytes(good)  # repaired in place: the folder's time is the same
    assert train(*options, "run=one") == 0


def test_the_files_in_which_two_listings_differ(tmp_path):
    train, cache = classes(tmp_path / "train"), tmp_path / "cache"
    first = open_folder(train, cache)
    assert differences(cache, first.fingerprint, first.fingerprint) == []
    (train / "a" / "1.png").unlink()
    (train / "a" / "é.png").write_bytes((train / "a" / "2.png").read_bytes())
    old = (train / "b" / "0.png").stat().st_size
    with open(train / "b" / "0.png", "ab") as file:
        file.write(b"more")
    second = open_folder(train, cache)
    assert differences(cache, first.fingerprint, second.fingerprint) == [
        "a/1.png is gone",
        "a/é.png is new",
        f"b/0.png had {old} bytes and now has {old + 4}",
    ]
    # Another order of the classes gives the same files other labels.
    third = open_folder(train, cache, ["b", "a"])
    said = differences(cache, second.fingerprint, third.fingerprint)
    assert len(said) == 8
    assert all(text.endswith("has another label") for text in said)
    # A listing of another machine is not there, and no path is taken for a fingerprint.
    np.save(tmp_path / "planted.npy", np.zeros(1))
    for unknown in ("0" * 64, "../../planted", "None"):
        assert differences(cache, unknown, first.fingerprint) == []
