"""From archives as people download them to shards: labels, counts and bytes against the source."""

import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from hashlib import sha256

import archives
import numpy as np
import pytest
from PIL import Image

from reconverge.base.errors import Stop
from reconverge.data.shards import open_shards
from reconverge.prepare import scatter
from reconverge.prepare.make import Options, prepare

TRAIN = archives.pictures(archives.SYNSETS, 7, seed=1)
VAL = archives.pictures(archives.SYNSETS, 3, seed=2, val=True, odd=False)
GOOD = archives.pictures(archives.SYNSETS, 7, seed=1, odd=False)


def digests(folder):
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def content(folder, split):
    """(key, synset, bytes) of every sample, read by tarfile."""
    about = json.loads((folder / "dataset.json").read_text())
    found = []
    for shard in about["splits"][split]["shards"]:
        with tarfile.open(folder / shard["name"]) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        for name, data in files.items():
            if not name.endswith(".cls"):
                key = os.path.splitext(name)[0]
                found.append((key, about["classes"][int(files[f"{key}.cls"])]["synset"], data))
    return sorted(found)


def expected(pictures, key=lambda picture: picture.name):
    return sorted((key(picture), picture.synset, picture.data) for picture in pictures)


FORMS = {
    "official": archives.official,
    "kaggle": archives.kaggle,
    "kaggle_zip": archives.kaggle_zip,
    "class_folders": archives.class_folders,
    "flat_val": archives.flat_val,
    "huggingface": archives.huggingface,
    "fall11": lambda folder, train, val: archives.fall11(folder, train),
    "winter21": lambda folder, train, val: archives.winter21(folder, train),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_keeps_labels_counts_and_bytes(form, reconverge, tmp_path):
    source = FORMS[form](tmp_path / "source", TRAIN, VAL)
    code, said = reconverge("prepare", source, "--to", tmp_path / "made", "--shard-mb", "0.02")
    assert code == 0, said
    folders = form in ("class_folders", "flat_val")
    key = (lambda picture: f"{picture.synset}/{picture.name}") if folders else (lambda picture: picture.name)
    assert content(tmp_path / "made", "train") == expected(TRAIN, key)
    about = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert len(about["splits"]["train"]["shards"]) > 2
    assert about["splits"]["train"]["images"] == len(TRAIN)
    if form not in ("fall11", "winter21"):
        flat = form == "flat_val"
        assert content(tmp_path / "made", "val") == expected(
            VAL, key if folders and not flat else lambda picture: picture.name
        )
    synsets = [entry["synset"] for entry in about["classes"]]
    assert synsets == sorted(synsets)
    assert len(synsets) == (1000 if form == "huggingface" else 3)
    assert {entry["synset"]: entry["name"] for entry in about["classes"]}[
        "n02119789"
    ] == "kit fox, Vulpes macrotis"
    assert about["class_list"]["name"] == {"fall11": "fall11", "winter21": "winter21"}.get(
        form, about["dataset"]
    )
    assert about["class_list"]["sha256"] == sha256("\n".join(synsets).encode()).hexdigest()
    assert not (tmp_path / "made" / ".preparing").exists()
    # What is odd is named, and kept byte for byte.
    odd = {
        (entry.get("key") or entry["name"]).rpartition("/")[2]: " ".join(entry["odd"])
        for entry in map(json.loads, (tmp_path / "made" / "report.jsonl").read_text().splitlines())
    }
    words = {
        "cmyk": "CMYK",
        "png": "PNG, named .jpg",
        "exif": "EXIF",
        "truncated": "truncated",
        "empty": "empty",
        "garbage": "unreadable",
    }
    assert {picture.name for picture in TRAIN if picture.odd} <= set(odd)
    for picture in TRAIN:
        if picture.odd:
            assert words[picture.odd] in odd[picture.name]
        else:
            assert picture.name not in odd
    if about["dataset"] != "folder":
        assert "but the published set has" in said
    # And again, into another folder: the same bytes, dataset.json included.
    assert (
        reconverge("prepare", source, "--to", tmp_path / "again", "--shard-mb", "0.02", "--jobs", "1")[0] == 0
    )
    assert digests(tmp_path / "again") == digests(tmp_path / "made")
    assert reconverge("check", tmp_path / "made")[0] == 0


def test_what_cannot_be_read_is_dropped_only_when_asked(reconverge, tmp_path):
    source = archives.fall11(tmp_path / "source", TRAIN)
    assert reconverge("prepare", source, "--to", tmp_path / "made", "--drop-unreadable")[0] == 0
    kept = [picture for picture in TRAIN if picture.odd not in ("truncated", "empty", "garbage")]
    assert content(tmp_path / "made", "train") == expected(kept)
    about = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert about["dropped"] == 3
    code, said = reconverge("prepare", source, "--to", tmp_path / "all")
    assert (
        code,
        "of which unreadable: 3 (training stops at an unreadable image: prepare with --drop-unreadable"
        in said,
    ) == (0, True), said


@pytest.mark.parametrize(
    "kind", ["absolute", "dotdot", "symlink", "hardlink", "device", "fifo", "bomb", "huge"]
)
def test_hostile_members_are_refused(kind, reconverge, tmp_path):
    source = archives.hostile(tmp_path / "source", kind)
    code, said = reconverge("prepare", source, "--to", tmp_path / "made")
    assert code == 65, said
    assert "fall11_whole.tar" in said or kind == "bomb"
    assert not (tmp_path / "made" / "dataset.json").exists()


def test_shards_are_indexed_where_they_are(reconverge, tmp_path):
    source = archives.webdataset_shards(tmp_path / "source", GOOD, VAL)
    before = digests(source)
    code, said = reconverge("prepare", source, "--to", source, "--as", "folder")
    assert code == 0, said
    assert {name: digest for name, digest in digests(source).items() if name.endswith(".tar")} == before
    train, val = open_shards(source, None)
    order = sorted(archives.SYNSETS)
    found = sorted(
        (train.index.key(sample), order[int(train.labels(np.array(sample)))], train.read(sample))
        for sample in range(len(train))
    )
    assert found == expected(GOOD)
    assert len(val) == len(VAL)
    assert reconverge("check", source)[0] == 0


def test_shards_are_found_through_a_link_and_split_by_the_words_of_their_names(reconverge, tmp_path):
    source = archives.webdataset_shards(tmp_path / "source", GOOD, VAL)
    shards = sorted(source.glob("*.tar"))
    train, val = (
        [path for path in shards if "train" in path.name],
        [path for path in shards if "train" not in path.name],
    )
    for number, path in enumerate(train):  # words that hold "test" and "val"
        path.rename(source / f"latest-interval-{number}.tar")
    for number, path in enumerate(val):
        path.rename(source / f"validation{number}.tar")
    (source / "test-0.tar").write_bytes(b"not looked at")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    code, said = reconverge("prepare", source, "--to", tmp_path / "link" / "made")
    assert (code, "left out: 1 shards of a test split" in said) == (0, True), said
    found = open_shards(tmp_path / "link" / "made", None)
    assert [len(source) for source in found] == [len(GOOD), len(VAL)]
    assert found[0].read(0)
    code, said = reconverge("prepare", source, "--to", tmp_path / "other", "--as", "imagenet1k")
    assert code == 0, said
    with pytest.raises(Stop, match="data=shards"):
        open_shards(tmp_path / "link" / "made", "imagenet1k")


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset leaves its shards open
def test_webdataset_and_timm_read_our_shards(reconverge, tmp_path):
    import webdataset
    from timm.data.readers.reader_wds import ReaderWds

    source = archives.official(tmp_path / "source", GOOD, VAL)
    assert reconverge("prepare", source, "--to", tmp_path / "made", "--shard-mb", "0.02")[0] == 0
    train, _ = open_shards(tmp_path / "made", "imagenet1k")
    ours = sorted(
        (train.index.key(sample), int(train.labels(np.array(sample))), train.read(sample))
        for sample in range(len(train))
    )
    urls = [str(path) for path in sorted((tmp_path / "made").glob("train-*.tar"))]
    theirs = sorted(
        (sample["__key__"], int(sample["cls"]), sample["jpg"])
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    )
    assert theirs == ours
    reader = ReaderWds(
        str(tmp_path / "made"), split=f"train-{{000000..{len(urls) - 1:06d}}}.tar|{len(train)}"
    )
    pixels = sorted((label, image.tobytes()) for image, label in reader)
    assert pixels == sorted(
        (label, Image.open(io.BytesIO(data)).convert("RGB").tobytes()) for _, label, data in ours
    )
    del reader
    gc.collect()


def test_killed_at_any_time_and_started_again_it_gives_the_same_bytes(tmp_path, monkeypatch):
    """A process of its own, killed ten times: the shards, the index and dataset.json are those of an
    uninterrupted one.
    """
    pictures = archives.pictures(archives.SYNSETS, 60, seed=5)
    source = archives.winter21(tmp_path / "source", pictures)
    monkeypatch.setattr(scatter, "MEMORY", (40_000, 40_000))  # some thirty commits

    def start(to):
        options = Options(shard_mb=0.1, hold_out=0, resize=None, quality=90, drop_unreadable=False)
        process = multiprocessing.get_context("fork").Process(
            target=prepare, args=(source, to, None, 2, options)
        )
        process.start()
        return process

    process = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    random, kills, seen = np.random.Generator(np.random.PCG64(3)), 0, set()
    journal = tmp_path / "killed" / ".preparing" / "journal.json"
    while kills < 10:  # each a random while after the journal has moved on
        process = start(tmp_path / "killed")
        while True:
            state = journal.read_text() if journal.exists() else None
            if state is not None and state not in seen:
                break
            assert process.is_alive(), "it was finished before the tenth kill"
            time.sleep(0.0005)
        time.sleep(float(random.uniform(0, 0.02)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen.add(state)
        kills += 1
    process = start(tmp_path / "killed")
    process.join()
    assert process.exitcode == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert content(tmp_path / "whole", "train") == expected(pictures)


@pytest.mark.parametrize("form", ["official", "winter21", "kaggle_zip", "huggingface"])
def test_a_source_that_was_cut_off_is_named(form, reconverge, tmp_path):
    source = FORMS[form](tmp_path / "source", GOOD, VAL)
    path = {
        "official": source / "ILSVRC2012_img_train.tar",
        "huggingface": source / "data" / "train_images_1.tar.gz",
    }.get(form, source)
    whole = path.read_bytes()
    for cut in (len(whole) * 2 // 3, len(whole) // 3 // 512 * 512):
        path.write_bytes(whole[:cut])
        code, said = reconverge("prepare", source, "--to", tmp_path / f"made{cut}")
        assert code == 65, said
        assert path.name in said


def test_hold_out_and_lossy_copy(reconverge, tmp_path):
    source = archives.fall11(tmp_path / "source", archives.pictures(archives.SYNSETS, 40, seed=3, odd=False))
    code, said = reconverge(
        "prepare", source, "--to", tmp_path / "made", "--hold-out", "20", "--resize", "32", "--quality", "80"
    )
    assert code == 0, said
    train, val = open_shards(tmp_path / "made", "imagenet22k")
    assert len(train) + len(val) == 120
    assert 10 < len(val) < 40
    assert "lossy" in train.notes[-1]
    assert min(Image.open(io.BytesIO(train.read(0))).size) == 32


def test_files_of_others_are_not_replaced(reconverge, tmp_path):
    source = archives.class_folders(tmp_path / "source", GOOD, VAL)
    theirs = tmp_path / "made" / "train-000000.tar"
    theirs.parent.mkdir()
    theirs.write_bytes(b"precious")
    code, said = reconverge("prepare", source, "--to", tmp_path / "made")
    assert (code, "contains train-000000.tar" in said) == (2, True)
    assert theirs.read_bytes() == b"precious"
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]


def test_a_split_without_images_is_refused(reconverge, tmp_path):
    source = archives.fall11(tmp_path / "source", GOOD)
    code, said = reconverge("prepare", source, "--to", tmp_path / "made", "--hold-out", "0.001")
    assert (code, "the split val has no image" in said) == (2, True)


@pytest.mark.parametrize(
    "text", ["\ufeffImageId,PredictionString\n", "Id,Label\nx,y\n", "ImageId,PredictionString\nx,\n"]
)
def test_a_list_of_labels_with_other_columns_is_damaged(reconverge, tmp_path, text):
    """A mark at the beginning of the text, as some editors leave it, is none of them."""
    source = archives.kaggle(tmp_path / "source", GOOD, VAL)
    (path,) = source.rglob("LOC_val_solution.csv")
    if text.startswith("\ufeff"):
        path.write_bytes(text.encode()[:3] + path.read_bytes())
    else:
        path.write_text(text)
    code, said = reconverge("prepare", source, "--to", tmp_path / "made")
    assert (code, "LOC_val_solution.csv" in said) == (
        (0, False) if text.startswith("\ufeff") else (65, True)
    ), said


@pytest.mark.parametrize(
    "names", [("a_b.jpeg", "a_b.jpg"), ("a.b.jpg", "a.c.jpg", "a_b.jpg")], ids=["side by side", "apart"]
)
def test_two_files_that_would_share_a_key_are_named(names, reconverge, tmp_path):
    source = archives.class_folders(tmp_path / "source", GOOD, VAL)
    folder = source / "train" / archives.SYNSETS[0]
    for name, picture in zip(names, VAL, strict=False):
        (folder / name).write_bytes(picture.data)
    code, said = reconverge("prepare", source, "--to", tmp_path / "made")
    assert (code, f"two images of train have the key {folder.name}/a_b" in said) == (65, True), said


def test_images_with_any_suffix_that_training_reads_are_prepared(reconverge, tmp_path):
    folder = tmp_path / "source" / "train" / "a"
    folder.mkdir(parents=True)
    forms = {".jpe": "JPEG", ".JFIF": "JPEG", ".mpo": "JPEG", ".pgm": "PPM", ".jp2": "JPEG2000"}
    for number, (suffix, name) in enumerate(forms.items()):
        Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30) + number).save(
            folder / f"{number}{suffix}", name
        )
    shutil.copytree(folder, folder.parent / "b")
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    assert code == 0, said
    assert sorted(data for _, synset, data in content(tmp_path / "made", "train") if synset == "b") == sorted(
        path.read_bytes() for path in folder.iterdir()
    )
    lines = (tmp_path / "made" / "report.jsonl").read_text().splitlines()
    odd = [(json.loads(line)["key"], json.loads(line)["odd"]) for line in lines]
    assert odd == [(f"{name}/2_mpo", ["JPEG, named .mpo"]) for name in "ab"]


def test_a_part_of_the_archives_is_not_taken_for_something_else(reconverge, tmp_path):
    official = archives.official(tmp_path / "official", GOOD, VAL)
    classes = tmp_path / "unpacked"
    with tarfile.open(official / "ILSVRC2012_img_train.tar") as archive:
        archive.extractall(classes, filter="data")
    (official / "ILSVRC2012_img_train.tar").unlink()
    for source in (official, classes):
        code, said = reconverge("prepare", source, "--to", tmp_path / "made")
        assert (code, "ILSVRC2012_img_train.tar as published" in said) == (66, True), said
    shards = archives.webdataset_shards(tmp_path / "shards", GOOD, VAL)
    code, said = reconverge("prepare", next(shards.glob("*.tar")), "--to", tmp_path / "made")
    assert (code, "the folder that contains them" in said) == (2, True), said


def test_class_folders_without_train_are_told_where_they_belong(reconverge, photographs, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(photographs / "train", flat)
    code, said = reconverge("prepare", flat, "--to", tmp_path / "made", "--hold-out", "20")
    assert code == 66
    assert f"{flat}: class folders (n00000000, n00000001, n00000002), but no folder train/" in said
    assert f"mkdir {flat}/train and move the class folders into it" in said
    for folder in list(flat.iterdir()):  # as advised
        (flat / "train").mkdir(exist_ok=True)
        folder.rename(flat / "train" / folder.name)
    assert reconverge("prepare", flat, "--to", tmp_path / "made", "--hold-out", "20")[0] == 0


def test_wrong_input(reconverge, tmp_path):
    source = archives.official(tmp_path / "source", GOOD, VAL)
    (tmp_path / "empty").mkdir()
    assert reconverge("prepare", tmp_path / "empty", "--to", tmp_path / "a")[0] == 66
    assert reconverge("prepare", tmp_path / "nowhere", "--to", tmp_path / "a")[0] == 66
    assert reconverge("prepare", source, "--to", tmp_path / "a", "--jobs", "0")[0] == 2
    assert reconverge("prepare", source, "--to", tmp_path / "a", "--shard-mb", "0")[0] == 2
    before = sorted(source.iterdir())
    code, said = reconverge("prepare", source, "--to", source)
    assert (code, "is the same folder as SOURCE" in said, sorted(source.iterdir())) == (2, True, before)
    assert reconverge("prepare", source, "--to", tmp_path / "b")[0] == 0
    code, said = reconverge("prepare", source, "--to", tmp_path / "b")
    assert (code, "finished data set" in said) == (2, True)
    code, said = reconverge("prepare", source, "--to", tmp_path / "d", "--hold-out", "20")
    assert (code, "validation images" in said) == (2, True)
    assert reconverge("check", tmp_path / "empty")[0] == 66
    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no archive")
    code, said = reconverge("prepare", source, "--to", tmp_path / "e")
    assert (code, "devkit" in said) == (65, True)
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    code, said = reconverge("prepare", source, "--to", tmp_path / "c")
    assert (code, "devkit" in said) == (66, True)


def shard(path, names):
    """A tar file of members; an image has the pixels of its own, a .cls the label 0 or 1 in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = iter(GOOD * 9)
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            data = b"%d" % (number // 2 % 2) if name.endswith("cls") else next(pictures).data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_keys_with_dots_are_refused_before_anything_is_written(reconverge, tmp_path):
    names = [f"2024.05.{number:03d}.{suffix}" for number in range(6) for suffix in ("jpg", "cls")]
    shard(tmp_path / "a" / "train-0.tar", names)
    code, said = reconverge("prepare", tmp_path / "a", "--to", tmp_path / "made")
    assert code == 65, said
    assert "2024.05.000.jpg and 2024.05.001.jpg are two images of one sample" in " ".join(said.split())
    assert not (tmp_path / "made" / "dataset.json").exists()
    plain = [f"x{number}.{suffix}" for number in range(4) for suffix in ("jpg", "cls")]
    shard(tmp_path / "b" / "train-0.tar", plain + names)
    assert reconverge("prepare", tmp_path / "b", "--to", tmp_path / "made2")[0] == 65


def test_names_in_shards_are_read_by_webdatasets_rule(reconverge, tmp_path):
    names = ["a/x.input.JPG", "a/x.input.cls", "y.jpg", "y.cls", "y.mask.png", "z.one.cls", "z.two.jpeg"]
    names += ["x.a.b.jpg", "x.a.cls", "README", ".hidden.jpg", "y.json", "d/._x.jpg"]
    shard(tmp_path / "source" / "train-0.tar", names)
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    assert code == 0, said
    train, _ = open_shards(tmp_path / "made", None, validation=False)
    assert [train.index.key(sample) for sample in range(len(train))] == ["a/x", "y", "z", "x"]
    with tarfile.open(tmp_path / "source" / "train-0.tar") as archive:
        for sample, name in enumerate(["a/x.input.JPG", "y.jpg", "z.two.jpeg", "x.a.b.jpg"]):
            assert train.read(sample) == archive.extractfile(name).read()
    said = " ".join(said.split())
    assert "train: the first key is a/x, its image a .jpg, its label 0" in said
    assert "members that are not used: 1 ., 1 ._x.jpg, 1 .hidden.jpg, 1 .json, 1 .mask.png" in said
    lines = [json.loads(line) for line in (tmp_path / "made" / "report.jsonl").read_text().splitlines()]
    left = {line["name"].rpartition(", ")[2] for line in lines if line["fate"] == "left out"}
    assert left == {"README", ".hidden.jpg", "y.json", "d/._x.jpg", "y.mask.png"}


def test_shards_without_images_are_refused(reconverge, tmp_path):
    shard(tmp_path / "source" / "train-0.tar", ["a.txt", "b.heic"])
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made")
    assert (code, "without any image" in said) == (66, True), said
    assert not (tmp_path / "made" / "dataset.json").exists()
