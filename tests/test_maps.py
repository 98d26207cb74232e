"""Images with label maps: the bundled scenes, folders of images and maps, ADE20K as distributed."""

import json
import shutil
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from reconverge.base.errors import Exit, Stop
from reconverge.data import maps, scenes

COUNTS = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return scenes.written(tmp_path_factory.mktemp("cache"), COUNTS)


def test_scenes_are_golden(golden):
    lines = []
    for split, number in [("train", 0), ("train", 1), ("val", 0), ("val", 7)]:
        one = scenes.scene(split, number)
        digests = [sha256(one[part].tobytes()).hexdigest()[:16] for part in (0, 1, 3)]
        lines.append(f"{split} {number}: {one.shapes.tolist()} {' '.join(digests)}")
    golden("scenes.txt", "\n".join(lines))


def test_labels_boxes_and_masks_of_scenes_agree():
    """Every statement is checked pixel by pixel: the masks are disjoint, and labels and boxes follow."""
    seen = set()
    for number in range(30):
        one = scenes.scene("train", number)
        assert one.pixels.shape == (96, 96, 3)
        assert one.pixels.dtype == one.labels.dtype == np.uint8
        owners = one.masks.sum(0)
        assert owners.max() == 1
        assert len(one.shapes) == len(one.boxes) == len(one.masks) >= 1
        for y in range(96):
            for x in range(96):
                of = [shape + 1 for shape, mask in zip(one.shapes, one.masks, strict=True) if mask[y, x]]
                assert one.labels[y, x] == (of[0] if of else 0)
        for (left, top, right, bottom), mask in zip(one.boxes, one.masks, strict=True):
            ys, xs = np.nonzero(mask)
            assert (left, top, right, bottom) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        seen |= set(one.shapes.tolist())
    assert seen == set(range(5))


def test_training_and_validation_scenes_share_no_digit():
    inks = {split: {ink.tobytes() for ink in of} for split, of in scenes._inks().items()}
    assert (len(scenes._inks()["train"]), len(scenes._inks()["val"])) == (1438, 359)
    assert not inks["train"] & inks["val"]


def test_the_files_of_scenes_say_what_the_scenes_are(drawn):
    source, validation = maps.open_folders(drawn, drawn.parent)
    assert (len(source), len(validation)) == (6, 3)
    assert source.classes == ["photograph", "disc", "square", "diamond", "triangle", "star"]
    for split, of in (("train", source), ("val", validation)):
        coco = json.loads((drawn / "annotations" / f"instances_{split}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in coco["categories"]}
        for number in range(len(of)):
            one = scenes.scene(split, number)
            with Image.open(of.path(number)) as image:
                assert np.array_equal(np.asarray(image), one.pixels)
            assert np.array_equal(of.target(number), one.labels)
            mine = [entry for entry in coco["annotations"] if entry["image_id"] == number]
            assert [names[entry["category_id"]] for entry in mine] == [scenes.SHAPES[i] for i in one.shapes]
            for entry, box, mask in zip(mine, one.boxes, one.masks, strict=True):
                x, y, width, height = entry["bbox"]
                assert [x, y, x + width, y + height] == box.tolist()
                assert entry["area"] == mask.sum()
                flat, value = [], 0  # COCO's run lengths, read back pixel by pixel, column after column
                for length in entry["segmentation"]["counts"]:
                    flat += [value] * length
                    value = 1 - value
                assert np.array_equal(np.array(flat, bool).reshape(96, 96, order="F"), mask)


@pytest.mark.parametrize("change", ["remove", "flip", "add"])
def test_damaged_scenes_are_written_again(change, tmp_path, capsys):
    root = scenes.written(tmp_path, {"train": 2, "val": 1})
    path = root / "maps" / "train" / "00001.png"
    good = path.read_bytes()
    if change == "remove":
        path.unlink()
    elif change == "flip":
        path.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
    else:
        shutil.copy(path, path.with_name("00009.png"))
    assert scenes.written(tmp_path, {"train": 2, "val": 1}) == root
    assert path.read_bytes() == good
    assert not path.with_name("00009.png").exists()
    assert "are written again" in capsys.readouterr().out
    scenes.written(tmp_path, {"train": 2, "val": 1})
    assert "written again" not in capsys.readouterr().out


# ---- folders -----------------------------------------------------------------------------------------------

PALETTE = [200, 0, 0, 0, 200, 0, 0, 0, 200] + [7] * (256 * 3 - 9)


def pairs(root, values=((0, 1), (1, 2)), split="train", size=(20, 30), mode="L", folders=("images", "maps")):
    """An image and a map for each entry of `values`; the map has these values, half of the rows each."""
    for folder in folders:
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for number, (upper, lower) in enumerate(values):
        pixels = (np.arange(size[0] * size[1] * 3).reshape(*size, 3) * (3 + 7 * number)) % 251
        Image.fromarray(pixels.astype(np.uint8)).save(root / folders[0] / split / f"{number}.jpg")
        labels = np.full(size, upper, np.uint8)
        labels[size[0] // 2 :] = lower
        image = Image.fromarray(labels)
        if mode == "P":
            image = Image.frombytes("P", image.size, labels.tobytes())
            image.putpalette(PALETTE)
        image.convert(mode).save(root / folders[1] / split / f"{number}.png")
    return root


def opened(root, tmp_path, **options):
    return maps.open_folders(root, tmp_path / "cache", val=options.pop("val", None), **options)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_classes_are_found_and_numbered_in_order(mode, tmp_path):
    root = pairs(tmp_path / "data", [(7, 0), (255, 128), (0, 0)], mode=mode)
    pairs(root, [(128, 255)], "val", mode=mode)
    training, validation = opened(root, tmp_path, val="val")
    assert training.classes == validation.classes == ["0", "7", "128"]
    assert [np.unique(training.target(i)).tolist() for i in range(3)] == [[0, 1], [2, 255], [0]]
    assert training.target(0).shape == (20, 30)
    assert (training.target(0)[:10] == 1).all()
    assert validation.target(0)[0, 0] == 2
    assert training.pixels == [300 + 600, 300, 300]
    said = " ".join(training.notes)
    assert "train: 16.7% of the pixels have no class and are ignored" in said
    assert "val: no pixel of 2 of 3 classes: 0, 7" in " ".join(validation.notes)
    assert training.labels(np.array([0, 2])).tolist() == [0, 0]
    assert training.where(1) == f"{root}/images/train/1.jpg (sample 1)"


def test_names_and_another_ignored_value(tmp_path):
    root = pairs(tmp_path / "data", [(1, 2), (0, 1)])
    (root / "classes.txt").write_text("cat\ndog\n")
    training, _ = opened(root, tmp_path, ignore=0)
    assert training.classes == ["cat", "dog"]
    assert np.unique(training.target(0)).tolist() == [0, 1]
    assert np.unique(training.target(1)).tolist() == [0, 255]


def test_black_and_white_masks_need_a_word(tmp_path):
    root = pairs(tmp_path / "data", [(0, 255)])
    with pytest.raises(Stop, match="one class, 0, beside the ignored value 255") as error:
        opened(root, tmp_path)
    assert error.value.code == Exit.USAGE
    assert opened(root, tmp_path, ignore=None)[0].classes == ["0", "255"]


def test_what_is_listed_is_kept_until_a_folder_or_the_names_change(tmp_path, monkeypatch):
    root = pairs(tmp_path / "data")
    first, _ = opened(root, tmp_path)
    listed = []
    monkeypatch.setattr(maps, "decoded", lambda data, real=maps.decoded: listed.append(1) or real(data))
    again, _ = opened(root, tmp_path)
    assert not listed
    assert again.fingerprint == first.fingerprint
    assert again.notes == first.notes
    pairs(root, [(0, 1), (1, 2), (2, 0)])
    more, _ = opened(root, tmp_path)
    assert len(listed) == 3
    assert len(more) == 3
    assert more.fingerprint != first.fingerprint
    (root / "classes.txt").write_text("a\nb\nc\n")
    assert opened(root, tmp_path)[0].fingerprint != more.fingerprint


def test_changed_files_are_named_when_they_are_read(tmp_path):
    root = pairs(tmp_path / "data")
    source, _ = opened(root, tmp_path)
    path = root / "maps" / "train" / "1.png"
    good = path.read_bytes()
    path.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
    with pytest.raises(Stop, match=r"1\.png \(map of sample 1\) have changed") as error:
        source.target(1)
    assert error.value.code == Exit.NOT_COMPARABLE
    path.unlink()
    with pytest.raises(Stop, match="does not exist any more") as error:
        source.target(1)
    assert error.value.code == Exit.MISSING


def save(root, name, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(root / "maps" / "train" / name)


WRONG = {
    "size": (
        lambda root: save(root, "1.png", np.zeros((30, 20), np.uint8)),
        Exit.DAMAGED,
        r"1\.png has 20 x 30 pixels, but its image .*1\.jpg has 30 x 20",
    ),
    "unknown": (
        lambda root: save(root, "1.png", np.full((20, 30), 9, np.uint8)),
        Exit.DAMAGED,
        r"1 wrong label map: .*1\.png has the unknown value 9 \(600 pixels\)",
    ),
    "three": (
        lambda root: save(root, "1.png", np.zeros((20, 30, 3), np.uint8)),
        Exit.DAMAGED,
        r"1\.png: a map with three channels",
    ),
    "wide": (
        lambda root: save(root, "1.png", np.zeros((20, 30), np.uint16)),
        Exit.DAMAGED,
        r"1\.png: a map with 16 bits per pixel",
    ),
    "cut": (
        lambda root: (root / "maps/train/1.png").write_bytes((root / "maps/train/1.png").read_bytes()[:50]),
        Exit.DAMAGED,
        r"1 wrong label map: .*1\.png: ",
    ),
    "jpeg": (
        lambda root: shutil.copy(root / "images/train/1.jpg", root / "maps/train/1.png"),
        Exit.DAMAGED,
        r"1\.png: a JPEG file, but a label map is a PNG file",
    ),
    "no map": (
        lambda root: (root / "maps/train/1.png").unlink(),
        Exit.MISSING,
        r"1 images without a label map: .*images/train/1\.jpg",
    ),
    "no image": (
        lambda root: (root / "images/train/1.jpg").unlink(),
        Exit.MISSING,
        r"1 label maps without an image: .*maps/train/1\.png",
    ),
    "no folder": (lambda root: shutil.rmtree(root / "maps"), Exit.MISSING, "no folder .*maps/train"),
    "twice": (
        lambda root: shutil.copy(root / "images/train/1.jpg", root / "images/train/1.jpeg"),
        Exit.USAGE,
        "have the same name but for the suffix",
    ),
    "names": (
        lambda root: (root / "classes.txt").write_text("a\nb\nb\n"),
        Exit.USAGE,
        "3 lines, of which 2 are different",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_named(wrong, tmp_path):
    root = pairs(tmp_path / "data")
    (root / "classes.txt").write_text("a\nb\nc\n")
    opened(root, tmp_path)
    change, code, said = WRONG[wrong]
    change(root)
    with pytest.raises(Stop, match=said) as error:
        opened(root, tmp_path / "new")
    assert error.value.code == code


def test_all_wrong_maps_are_counted_and_values_of_validation_too(tmp_path):
    root = pairs(tmp_path / "data")
    pairs(root, [(0, 3), (4, 1), (0, 1)], "val")
    with pytest.raises(Stop, match=r"2 wrong label maps: .*0\.png .*value 3 .*1\.png .*value 4"):
        opened(root, tmp_path, val="val")


def test_what_is_left_out_is_counted(tmp_path):
    root = pairs(tmp_path / "data")
    (root / "images/train/README.md").write_text("x")
    (root / "maps/train/.hidden").write_text("x")
    (note,) = opened(root, tmp_path)[0].notes
    assert "are read already: 2 (the first is images/train/README.md)" in note


def test_an_unreadable_image_is_known_before_training(tmp_path):
    root = pairs(tmp_path / "data")
    (root / "images/train/1.jpg").write_bytes(b"nothing")
    source, _ = opened(root, tmp_path)
    assert list(source.broken) == ["train/1.jpg"]


def test_ade20k_as_distributed(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    folders = "images", "annotations"
    pairs(root, [(0, 150), (1, 2)], "training", folders=folders)
    pairs(root, [(3, 0)], "validation", folders=folders)
    names = [f"{number}\t0.1\t5\t5\t0\tname{number}, other" for number in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *names]) + "\n")
    training, validation = maps.open_ade20k(root, tmp_path / "cache")
    assert (len(training.classes), training.classes[0], training.classes[149]) == (150, "name1", "name150")
    assert [np.unique(training.target(i)).tolist() for i in (0, 1)] == [[149, 255], [0, 1]]
    assert np.unique(validation.target(0)).tolist() == [2, 255]
    assert "training: 2 images, but the published set has 20210" in training.notes
    pairs(root, [(0, 151)], "training", folders=folders)
    with pytest.raises(Stop, match="unknown value 151"):
        maps.open_ade20k(root, tmp_path / "new")
    (root / "objectInfo150.txt").unlink()
    with pytest.raises(Stop) as error:
        maps.open_ade20k(root, tmp_path / "new")
    assert error.value.code == Exit.MISSING
