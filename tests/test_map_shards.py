"""Images with label maps in shards: prepared, read, checked, and trained on."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import conftest
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Data
from reconverge.data import samples, suitable
from reconverge.data.order import Order, Windows
from reconverge.data.shards import MapShards, open_evaluation, open_shards
from reconverge.data.stage import Stage
from reconverge.evaluation import sets
from reconverge.prepare import label_maps, scatter
from reconverge.prepare.make import Options, prepare

NAMES = ["road", "tree", "sky"]


def encoded(image, form):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def values_of(label_map):
    """The values of all pixels of a map, by Pillow."""
    return np.array(Image.open(io.BytesIO(label_map)))


def pair(random, values=(0, 1, 2, 255), form="JPEG", mode="L", sides=(20, 70)):
    """Bytes of an image of smooth content, and of a map of the same size with some of these values."""
    height, width = (int(side) for side in random.integers(*sides, 2))
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
    labels = np.array(values, np.uint8)[random.integers(0, len(values), (5, 5))]
    label_map = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    if mode == "P":
        label_map = Image.frombytes("P", label_map.size, label_map.tobytes())
        label_map.putpalette([int(value) for value in random.integers(0, 256, 768)])
    return encoded(coarse.resize((width, height), Image.Resampling.BICUBIC), form), encoded(label_map, "PNG")


def write(root, split, name, image, label_map, folders=("images", "maps")):
    for folder, path, data in (
        (folders[0], name, image),
        (folders[1], name.rpartition(".")[0] + ".png", label_map),
    ):
        (root / folder / split / path).parent.mkdir(parents=True, exist_ok=True)
        (root / folder / split / path).write_bytes(data)


def source_of(root, counts=(24, 6), seed=3):
    """A folder of images and maps, with several sizes, formats, folders, and names with dots."""
    random = np.random.Generator(np.random.PCG64(seed))
    for split, count in zip(("train", "val"), counts, strict=True):
        for number in range(count):
            suffix, form = [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".png", "PNG")][number % 3]
            name = (
                f"{'city/' if number % 4 == 0 else ''}{number:02d}{'.b' if number % 5 == 0 else ''}{suffix}"
            )
            write(root, split, name, *pair(random, form=form, mode="LP"[number % 2]))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return root


def expected(root, split):
    """Key -> suffix, bytes of the image, bytes of the map: read from the source by the rules of the page."""
    found = {}
    for path in (root / "images" / split).rglob("*.*"):
        below = path.relative_to(root / "images" / split)
        key = str(below.parent / below.stem.replace(".", "_"))
        suffix = {".jpg": "jpg", ".JPEG": "jpg", ".png": "png"}[path.suffix]
        label_map = root / "maps" / split / below.parent / f"{below.stem}.png"
        found[key] = suffix, path.read_bytes(), label_map.read_bytes()
    return found


def content(made, split):
    """Key -> suffix, bytes of the image, bytes of the map, in the order of the shards; read by tarfile."""
    about, found = json.loads((made / "dataset.json").read_text()), {}
    for shard in about["splits"][split]["shards"]:
        data = (made / shard["name"]).read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [(member.name, archive.extractfile(member).read()) for member in archive]
        assert len(members) == 2 * shard["images"]
        for (image, pixels), (label_map, values) in zip(members[::2], members[1::2], strict=True):
            key, suffix = image.rsplit(".", 1)
            assert label_map == f"{key}.seg.png"
            assert key not in found
            found[key] = suffix, pixels, values
    return found


def digests(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def made_of(source, to, **options):
    defaults = {"shard_mb": 0.005, "hold_out": 0, "resize": None, "quality": 90, "drop_unreadable": False}
    return prepare(source, to, None, 2, Options(**defaults | options))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(tmp_path_factory.mktemp("pairs") / "source")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    to = tmp_path_factory.mktemp("pairs") / "made"
    made_of(source, to)
    return to


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


# ---- prepare -----------------------------------------------------------------------------------------------


def test_shards_hold_the_bytes_of_images_and_maps_and_a_second_run_writes_the_same(reconverge, tmp_path):
    source = source_of(tmp_path / "source")
    (source / "images" / "train" / "README").write_text("x")
    command = ["prepare", source, "--shard-mb", "0.005"]
    code, said = reconverge(*command, "--to", tmp_path / "made", "--jobs", "3")
    assert code == 0, said
    assert "images with label maps: 3 classes, named by classes.txt; ignored value: 255" in said
    assert "task=segment data=shards" in said
    for split in ("train", "val"):
        assert content(tmp_path / "made", split) == expected(source, split)
    about = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert about["dataset"] == "maps"
    assert [entry["name"] for entry in about["classes"]] == NAMES
    assert about["label_maps"] == {"values": [0, 1, 2], "ignored_values": [255]}
    for split, images in (("train", 24), ("val", 6)):
        part = about["splits"][split]
        assert part["images"] == images
        assert len(part["shards"]) > 1
        counts: Counter[int] = Counter()
        for *_, label_map in expected(source, split).values():
            counts.update(values_of(label_map).ravel().tolist())
        assert part["pixels"] == [counts[0], counts[1], counts[2]]
        assert part["unlabelled"] == counts[255] > 0
    (line,) = map(json.loads, (tmp_path / "made" / "report.jsonl").read_text().splitlines())
    assert (line["name"], line["fate"]) == ("images/train/README", "left out")
    assert not (tmp_path / "made" / ".preparing").exists()
    assert reconverge(*command, "--to", tmp_path / "again", "--jobs", "1")[0] == 0
    assert digests(tmp_path / "again") == digests(tmp_path / "made")
    code, said = reconverge("check", tmp_path / "made")
    assert (code, "no fault" in said) == (0, True), said


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset leaves its shards open
def test_webdataset_reads_the_same_samples(source, made):
    import webdataset

    for split in ("train", "val"):
        urls = [str(path) for path in sorted(made.glob(f"{split}-*.tar"))]
        found = {}
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            (suffix,) = {"jpg", "png"} & set(sample)
            found[sample["__key__"]] = suffix, sample[suffix], sample["seg.png"]
        assert found == expected(source, split)


NAME = st.text("ab.-é", min_size=1, max_size=4).filter(lambda name: name.strip(".-") and name[0] != ".")


@settings(max_examples=12)
@given(
    names=st.lists(NAME, min_size=2, max_size=9, unique_by=lambda name: name.replace(".", "_")),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.001, 0.004, 1.0]),
)
def test_any_pairs_come_back_in_the_order_of_the_shards(names, seed, size, tmp_path_factory):
    root = tmp_path_factory.mktemp("any")
    random = np.random.Generator(np.random.PCG64(seed))
    for number, name in enumerate(names):
        values = [[0, 1, 2], [7, 200], [255, 7]][number % 3]
        write(root / "source", "train", f"{name}.png", *pair(random, values, "PNG", "LP"[number % 2]))
    about = made_of(root / "source", root / "made", shard_mb=size)
    kept, there = content(root / "made", "train"), expected(root / "source", "train")
    assert kept == there
    (opened, _) = open_shards(root / "made", None, validation=False)
    assert [opened.index.key(sample) for sample in range(len(opened))] == list(kept)
    classes = sorted({value for *_, data in there.values() for value in values_of(data).flat} - {255})
    assert opened.classes == [entry["name"] for entry in about["classes"]] == [str(one) for one in classes]
    for sample, (_, image, label_map) in enumerate(kept.values()):
        assert opened.read(sample) == image
        assert opened.read_map(sample) == label_map
        values = values_of(label_map)
        labels = opened.target(sample)
        assert (labels.dtype, labels.shape) == (np.uint8, values.shape)
        for label, value in enumerate(classes):
            assert ((labels == label) == (values == value)).all()
        assert ((labels == 255) == (values == 255)).all()


def test_ade20k_as_distributed(reconverge, tmp_path):
    root, random = tmp_path / "ADEChallengeData2016", np.random.Generator(np.random.PCG64(1))
    for split, number in (("training", 1), ("training", 2), ("validation", 1)):
        name = f"ADE_{split[:5]}_{number:08d}.jpg"
        write(root, split, name, *pair(random, (0, 1, 150)), folders=("images", "annotations"))
    lines = ["Idx\tRatio", *[f"{number}\t0.1\t5\t5\t0\tname{number}, other" for number in range(1, 151)]]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    code, said = reconverge("prepare", root, "--to", tmp_path / "made")
    assert code == 0, said
    assert "150 classes, named by objectInfo150.txt; ignored value: 0" in said
    assert "train: 2 images, but the published set has 20210" in said
    train, val = open_shards(tmp_path / "made", None)
    assert (train.classes[0], train.classes[149], len(train), len(val)) == ("name1", "name150", 2, 1)
    assert "val: 1 images, but the published set has 2000" in val.notes
    for source in (train, val):
        for sample in range(len(source)):
            values = values_of(source.read_map(sample)).astype(int)
            assert np.array_equal(source.target(sample), (values - 1) % 256)
        labels = np.concatenate([source.target(sample).ravel() for sample in range(len(source))])
        assert source.pixels == np.bincount(labels, minlength=256)[:150].tolist()
    assert sorted(content(tmp_path / "made", "train")) == ["ADE_train_00000001", "ADE_train_00000002"]
    code, said = reconverge("prepare", root, "--to", tmp_path / "no", "--ignore", "3", "--resize", "64")
    assert (code, "--resize, --ignore with ADE20K" in said) == (2, True), said
    shutil.rmtree(root / "images" / "validation")
    code, said = reconverge("prepare", root, "--to", tmp_path / "no")
    assert (code, "no folder" in said, "images/validation" in said) == (66, True, True), said


def test_values_without_a_class_as_asked(reconverge, tmp_path):
    random = np.random.Generator(np.random.PCG64(1))
    for number in range(3):
        write(tmp_path / "source", "train", f"{number}.jpg", *pair(random, (0, 255)))
    command = ["prepare", tmp_path / "source"]
    code, said = reconverge(*command, "--to", tmp_path / "a")
    assert (code, "--ignore none of prepare" in said) == (2, True), said
    code, said = reconverge(*command, "--to", tmp_path / "a", "--ignore", "none")
    assert (code, "ignored value: none" in said) == (0, True), said
    train, _ = open_shards(tmp_path / "a", None, validation=False)
    assert train.classes == ["0", "255"]
    (tmp_path / "source" / "classes.txt").write_text("a\nb\n")  # of the values 1 and 2
    code, said = reconverge(*command, "--to", tmp_path / "b", "--ignore", "0")
    assert (code, "3 wrong label maps" in said, "the unknown value 255" in said) == (65, True, True), said


def test_options_without_a_meaning_are_refused_by_name(reconverge, source, photographs, tmp_path):
    for options, said_by in (
        (["--resize", "32"], "--resize with label maps"),
        (["--as", "imagenet1k"], "--as with label maps"),
        (["--ignore", "256"], "--ignore 256"),
        (["--hold-out", "20"], "--hold-out 20, but the source has validation images"),
    ):
        code, said = reconverge("prepare", source, "--to", tmp_path / "made", *options)
        assert (code, said_by in said) == (2, True), said
    code, said = reconverge("prepare", photographs, "--to", tmp_path / "made", "--ignore", "255")
    assert (code, "--ignore with images without label maps" in said) == (2, True), said
    assert not list(tmp_path.glob("made/*.tar"))


def test_held_out_and_dropped_pairs_are_not_counted(reconverge, tmp_path):
    root = source_of(tmp_path / "source", (40, 0), seed=8)
    cut = root / "images" / "train" / "07.JPEG"
    cut.write_bytes(cut.read_bytes()[:-200])
    command = ["prepare", root, "--hold-out", "25"]
    assert reconverge(*command, "--to", tmp_path / "all")[0] == 0
    code, said = reconverge(*command, "--to", tmp_path / "made", "--drop-unreadable")
    assert (code, "left out: 1" in said) == (0, True), said
    about = json.loads((tmp_path / "made" / "dataset.json").read_text())
    kept = {split: content(tmp_path / "made", split) for split in ("train", "val")}
    whole = {split: content(tmp_path / "all", split) for split in ("train", "val")}
    assert kept["train"] | kept["val"] | {"07": expected(root, "train")["07"]} == expected(root, "train")
    assert whole["train"] | whole["val"] == expected(root, "train")
    for split, samples_of in kept.items():
        assert 3 < len(samples_of) < 37
        assert set(whole[split]) - set(samples_of) <= {"07"}
        pixels = [values_of(data).ravel() for *_, data in samples_of.values()]
        counts = np.bincount(np.concatenate(pixels), minlength=256)
        assert about["splits"][split]["pixels"] == counts[:3].tolist()
        assert about["splits"][split]["unlabelled"] == counts[255]


def test_wrong_maps_are_named_and_the_same_command_goes_on_when_they_are_corrected(reconverge, tmp_path):
    root = source_of(tmp_path / "source")
    command = ["prepare", root, "--to", tmp_path / "made"]
    wide, strange = root / "maps/train/01.png", root / "maps/train/02.png"
    good = wide.read_bytes(), strange.read_bytes()
    wide.write_bytes(encoded(Image.new("L", (200, 10)), "PNG"))
    strange.write_bytes(encoded(Image.new("L", Image.open(io.BytesIO(good[1])).size, 77), "PNG"))
    code, said = reconverge(*command)
    assert code == 65, said
    assert "2 wrong label maps" in said
    assert "01.png has 200 x 10 pixels" in said
    assert "02.png has the unknown value 77" in said
    assert not (tmp_path / "made" / "dataset.json").exists()
    (root / "maps/train/03.png").rename(root / "maps/train/x.png")
    code, said = reconverge(*command)
    assert (code, "1 images without a label map" in said) == (66, True), said
    (root / "maps/train/x.png").rename(root / "maps/train/03.png")
    wide.write_bytes(good[0])
    strange.write_bytes(good[1])
    assert reconverge(*command)[0] == 0
    assert content(tmp_path / "made", "train") == expected(root, "train")


def test_two_names_that_would_share_a_key_are_named(reconverge, tmp_path):
    root, random = source_of(tmp_path / "source"), np.random.Generator(np.random.PCG64(1))
    for name in ("a.b.jpg", "a_b.jpg"):
        write(root, "train", name, *pair(random))
    code, said = reconverge("prepare", root, "--to", tmp_path / "made")
    assert (code, "two images of train have the key a_b" in said) == (65, True), said


def test_files_of_others_and_finished_data_sets_are_not_replaced(reconverge, source, copy, tmp_path):
    theirs = tmp_path / "theirs" / "train-000000.tar"
    theirs.parent.mkdir()
    theirs.write_bytes(b"precious")
    code, said = reconverge("prepare", source, "--to", theirs.parent)
    assert (code, "contains train-000000.tar" in said, theirs.read_bytes()) == (2, True, b"precious"), said
    code, said = reconverge("prepare", source, "--to", copy)
    assert (code, "finished data set" in said) == (2, True), said
    code, said = reconverge("prepare", source, "--to", source)
    assert (code, "is the same folder as SOURCE" in said) == (2, True), said


def test_a_map_that_changes_while_the_data_set_is_prepared_is_named(tmp_path):
    root = source_of(tmp_path / "source")
    layout = label_maps.layout("maps", root, tmp_path / "work", None)
    path = root / "maps" / "train" / "01.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    taken = {one.key: one for one in layout.splits["train"]([])}
    assert taken["02"].read_map() == (root / "maps/train/02.png").read_bytes()
    with pytest.raises(Stop, match=r"01\.png .* have changed") as stopped:
        taken["01"].read_map()
    assert stopped.value.code == Exit.NOT_COMPARABLE
    assert "prepared" in stopped.value.args[2]


def test_a_disk_that_changes_a_map_while_it_is_written_is_named(reconverge, source, tmp_path, monkeypatch):
    really, changed = os.sync, []

    def sync():
        """After the first samples are written, a byte in the first map is another one."""
        really()
        path = tmp_path / "made" / "train-000000.tar"
        if path.exists() and not changed:
            with tarfile.open(fileobj=io.BytesIO(path.read_bytes() + bytes(1024))) as archive:
                changed.append(next(one for one in archive if one.name.endswith(".seg.png")).offset_data + 40)
            edit(path, lambda data: data.__setitem__(changed[0], data[changed[0]] ^ 1))

    monkeypatch.setattr(os, "sync", sync)
    code, said = reconverge("prepare", source, "--to", tmp_path / "made")
    assert (code, "the shards of train do not contain what was written" in said) == (74, True), said
    assert not (tmp_path / "made" / "dataset.json").exists()


def test_class_folders_beside_label_maps_are_chosen_by_name(reconverge, photographs, tmp_path):
    root = source_of(tmp_path / "source")
    shutil.copytree(photographs / "train", root / "train")
    assert reconverge("prepare", root, "--to", tmp_path / "a")[0] == 0
    assert reconverge("prepare", root, "--to", tmp_path / "b", "--as", "folder")[0] == 0
    kinds = [json.loads((tmp_path / name / "dataset.json").read_text())["dataset"] for name in "ab"]
    assert kinds == ["maps", "folder"]


def test_killed_at_any_time_and_started_again_it_gives_the_same_bytes(tmp_path, monkeypatch):
    """A process of its own, killed five times; then two classes exchange their names, which is refused."""
    root = source_of(tmp_path / "source", (120, 10))
    monkeypatch.setattr(scatter, "MEMORY", (10_000, 10_000))  # some thirty commits

    def start(to):
        process = multiprocessing.get_context("fork").Process(target=made_of, args=(root, to))
        process.start()
        return process

    process = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    seen, journal = set(), tmp_path / "killed" / ".preparing" / "journal.json"
    while len(seen) < 5:
        process = start(tmp_path / "killed")
        while (state := journal.read_text() if journal.exists() else None) is None or state in seen:
            assert process.is_alive(), "it was finished before the fifth kill"
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen.add(state)
    (root / "classes.txt").write_text("tree\nroad\nsky\n")
    with pytest.raises(Stop, match="different source") as stopped:
        made_of(root, tmp_path / "killed")
    assert stopped.value.code == Exit.USAGE
    (root / "classes.txt").write_text("road\ntree\nsky\n")
    made_of(root, tmp_path / "killed")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert content(tmp_path / "whole", "train") == expected(root, "train")


# ---- reading and damage ------------------------------------------------------------------------------------


def place(root, sample):
    """Shard, byte offset of the label map, its size in bytes, key; the index is read by numpy."""
    row = np.load(root / "train.index.npy")[sample]
    name = json.loads((root / "dataset.json").read_text())["splits"]["train"]["shards"][row["shard"]]["name"]
    return root / name, int(row["map_offset"]), int(row["map_size"]), row["key"].decode()


def edit(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def without_map(path, key):
    """The same shard without the label map of `key`: what follows moves up, the length stays."""
    size = path.stat().st_size
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, data in members:
            if member.name != f"{key}.seg.png":
                archive.addfile(member, io.BytesIO(data))
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(size - len(data)))


@pytest.mark.parametrize("damage", ["a byte of the map", "a map missing", "cut inside the map", "no shard"])
def test_each_damage_is_named_and_no_wrong_map_is_read(damage, made, copy, reconverge):
    path, at, size, key = place(copy, 9)
    good = [open_shards(made, None)[0].target(sample) for sample in range(24)]
    if damage == "a byte of the map":
        edit(path, lambda data: data.__setitem__(at + size // 2, data[at + size // 2] ^ 1))
    elif damage == "a map missing":
        without_map(path, key)
    elif damage == "cut inside the map":
        edit(path, lambda data: data.__delitem__(slice(at + size // 2, None)))
    else:
        path.unlink()

    code, said = reconverge("check", copy)
    assert (code, path.name in said) == (66 if damage == "no shard" else 65, True), said
    if damage == "a map missing":
        assert f"{path.name}: {key} has no label map (.seg.png)" in said
    if damage in ("cut inside the map", "no shard"):
        with pytest.raises(Stop, match=path.name) as stopped:
            open_shards(copy, None)
        assert stopped.value.code == code
        return
    assert f"{path.name}: label map of {key} at byte {at} has changed bytes" in said
    source = open_shards(copy, None)[0]
    wrong = {9}
    if damage == "a map missing":  # what follows it in its shard has moved
        wrong |= {sample for sample in range(10, 24) if place(copy, sample)[0] == path}
    else:
        assert source.read(9) == open_shards(made, None)[0].read(9)
        assert "1 fault in" in said
    for sample in set(range(24)) - wrong:
        assert np.array_equal(source.target(sample), good[sample])
    for sample in wrong:
        with pytest.raises(Stop) as stopped:
            source.target(sample)
        assert stopped.value.code == Exit.DAMAGED
        file, offset, _, name = place(copy, sample)
        assert f"{file}, label map of {name} at byte {offset} (sample {sample})" in stopped.value.args[1]


def test_members_of_a_sample_in_any_order_and_what_is_missing(tmp_path):
    def read(names):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(name)
                archive.addfile(member, io.BytesIO(name.encode()))
        with open(tmp_path / "x.tar", "rb") as file:
            unused = []
            found = [
                (one.key, one.data.decode(), one.map[1].decode(), one.label)
                for one in samples.read(file, "x.tar", unused.append, maps=True)
            ]
            return found, unused

    names = ["a.seg.png", "a.jpg", "b.webp", "b.seg.png", "b.cls", "b.depth.png", "README"]
    found, unused = read(names)
    assert found == [("a", "a.jpg", "a.seg.png", 0), ("b", "b.webp", "b.seg.png", 0)]
    assert sorted(unused) == ["README", "b.cls", "b.depth.png"]
    for names, said in (
        (["a.jpg", "a.seg.png", "b.jpg", "b.cls"], r"b has no label map \(\.seg\.png\)"),
        (["a.seg.png", "b.jpg", "b.seg.png"], "a has no image"),
        (["a.jpg", "a.png", "a.seg.png"], "a.jpg and a.png are two images"),
        (["a.jpg", "a.jpg", "a.seg.png"], r"a has two members \.jpg"),
    ):
        with pytest.raises(Stop, match=said) as stopped:
            read(names)
        assert stopped.value.code == Exit.DAMAGED


def test_what_values_mean_is_part_of_the_fingerprint(made, copy):
    first = open_shards(made, None)[0]
    assert open_shards(copy, None)[0].fingerprint == first.fingerprint
    about = json.loads((copy / "dataset.json").read_text())
    about["label_maps"]["values"] = [0, 2, 1]
    (copy / "dataset.json").write_text(json.dumps(about))
    other = open_shards(copy, None)[0]
    assert other.fingerprint != first.fingerprint
    assert np.array_equal(other.target(0) == 1, first.target(0) == 2)


def test_local_copies_are_what_is_read(made, copy, tmp_path):
    """After the source was removed, images and label maps are read from the copies of the first window."""
    source, _ = open_shards(copy, None)
    windows = Windows(source.images_of, 2, seed=4)
    order = Order(len(source), 4, 2, seed=4, windows=windows)
    with Stage(source, windows, tmp_path / "stage", 1.0) as stage:
        first = next(iter(stage.follow(order.steps(0, 1)))).ids.tolist()
        for _ in range(500):
            if stage._brought is not None:
                break
            time.sleep(0.01)
        for path in copy.glob("train-*.tar"):
            path.unlink()
        good, _ = open_shards(made, None)
        for sample in first:
            assert np.array_equal(source.target(sample), good.target(sample))
            assert source.read(sample) == good.read(sample)


# ---- training ----------------------------------------------------------------------------------------------


def test_training_on_shards_in_windows_with_local_copies(tmp_path, monkeypatch):
    random = np.random.Generator(np.random.PCG64(6))
    for number in range(30):
        of = pair(random, sides=(40, 60))
        write(tmp_path / "source", "train" if number < 24 else "val", f"{number}.jpg", *of)
    made_of(tmp_path / "source", tmp_path / "made")
    settings = ["task=segment", "data=shards", "data.root=made", "steps=3", "batch=4"]
    settings += ["microbatch=2", "threads=1", "augment.size=32", "segment.channels=8", "optim.warmup_steps=1"]
    settings += ["data.window=2", "save_every=3", "evaluate_every=3"]
    assert conftest._main("train", [*settings, "run=a", "workers=0"], monkeypatch) == 0
    assert conftest._main("train", [*settings, "run=b", "workers=1", "data.stage=here"], monkeypatch) == 0
    assert conftest.weights("a") == conftest.weights("b")
    assert json.loads(Path("runs/a/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_the_other_task_is_refused_in_words(made, shards, train, reconverge, capsys, monkeypatch):
    assert train("data=shards", f"data.root={made}", "run=a", "steps=1") == 2
    assert "task=classify with data=shards, whose images have label maps" in capsys.readouterr().err
    segment = ["task=segment", "data=shards", f"data.root={shards}", "run=b", "steps=1"]
    assert conftest._main("train", segment, monkeypatch) == 2
    assert "task=segment with data=shards, whose images have labels" in capsys.readouterr().err
    assert not any((Path("runs") / run).exists() for run in "ab")
    code, said = reconverge("plan", "data=shards", f"data.root={made}")
    assert (code, "whose images have label maps" in said) == (2, True), said
    with pytest.raises(Stop, match="was prepared from images with label maps") as stopped:
        open_evaluation(made)
    assert stopped.value.code == Exit.USAGE
    data = Data("shards", "shards", root=str(made))
    with pytest.raises(Stop, match="whose images have label maps") as stopped:
        sets.parts(data, NAMES)
    assert stopped.value.code == Exit.USAGE
    for root, has_maps in ((made, True), (shards, False)):
        source, _ = open_shards(root, None)
        assert hasattr(source, "target") == isinstance(source, MapShards) == has_maps
    assert suitable.doubts(*open_shards(made, None)) == []
