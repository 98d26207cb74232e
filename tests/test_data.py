import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Augment, Data, Evaluate
from reconverge.data import transforms
from reconverge.data.decode import crop_and_resize, dimensions
from reconverge.data.folder import open_folder
from reconverge.data.loader import Feed, Images
from reconverge.data.order import Order, in_sequence
from reconverge.data.sources import Synthetic, open_sources

CPU = torch.device("cpu")


def folder(root, cache, **settings):
    return open_sources(Data("folder", "folder", root=str(root), cache=str(cache), **settings))


def pixels_of(source, sample):
    """The whole image, decoded by decode.py."""
    data = source.read(sample)
    size = dimensions(data)
    return np.asarray(crop_and_resize(data, (0, 0, *size), size, "bicubic", fast=False))


def test_digits_are_all_there_split_fixed_and_stratified(cache, golden):
    train, val = open_sources(Data("digits", "digits", cache=str(cache / "here")))
    assert (len(train), len(val)) == (1438, 359)
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = set()
    for source in (train, val):
        labels = source.labels(np.arange(len(source)))
        for sample in range(0, len(source), 7):
            number = int(os.path.basename(source.path(sample)).removesuffix(".png"))
            assert digits.target[number] == labels[sample]
            pixels = pixels_of(source, sample)[:, :, 0]
            assert np.array_equal(pixels, np.round(digits.images[number] * 255 / 16))
        seen |= {os.path.basename(source.path(sample)) for sample in range(len(source))}
        assert np.ptp(np.bincount(labels)) <= 0.08 * len(source)
    assert len(seen) == 1797
    golden("digits_fingerprints.txt", f"{train.fingerprint}\n{val.fingerprint}")


def test_index_lists_classes_labels_and_paths(photographs, cache):
    train, val = folder(photographs, cache)
    assert (len(train), len(val)) == (60, 12)
    assert train.classes == ["n00000000", "n00000001", "n00000002"]
    assert train.labels(np.arange(60)).tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert train.path(21) == photographs / "train" / "n00000001" / "001.JPEG"


def test_index_is_cached_and_made_anew_when_the_folder_changes(photographs, cache, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    first = open_folder(root / "train", tmp_path / "cache")
    (page,) = (tmp_path / "cache").rglob("*.json")
    stamp = page.stat().st_mtime_ns
    assert open_folder(root / "train", tmp_path / "cache").fingerprint == first.fingerprint
    assert page.stat().st_mtime_ns == stamp
    (root / "train" / "n00000001" / "003.JPEG").unlink()
    changed = open_folder(root / "train", tmp_path / "cache")
    assert len(changed) == 59
    assert changed.fingerprint != first.fingerprint
    assert len(first) == 60  # who has the old one open keeps it
    assert first.path(59).name == "019.JPEG"
    # The same files elsewhere are the same data.
    shutil.copytree(photographs, tmp_path / "other")
    assert open_folder(tmp_path / "other" / "train", tmp_path / "cache").fingerprint == first.fingerprint


def test_what_is_not_an_image_is_ignored_and_counted(photographs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    (root / "train" / "n00000000" / "Thumbs.db").write_text("x")
    (root / "train" / "n00000000" / "features.h5").write_text("x")
    (root / "train" / "n00000000" / ".hidden.jpg").write_text("x")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "n00000000" / "below").mkdir()
    shutil.copy(root / "train" / "n00000000" / "001.JPEG", root / "train" / "n00000000" / "below" / "a.JPG")
    index = open_folder(root / "train", tmp_path / "cache")
    assert len(index) == 61
    assert index.ignored == ["n00000000/Thumbs.db", "n00000000/features.h5"]


@pytest.mark.parametrize(
    ("break_it", "code", "said"),
    [
        (lambda root: shutil.rmtree(root), Exit.MISSING, "no folder"),
        (lambda root: shutil.rmtree(root / "val"), Exit.MISSING, "no folder"),
        (lambda root: (root / "train" / "empty").mkdir(), Exit.MISSING, "no image in"),
        (
            lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()],
            Exit.MISSING,
            "no class folder",
        ),
        (lambda root: (root / "val" / "n00000000").rename(root / "val" / "stranger"), Exit.USAGE, "stranger"),
    ],
)
def test_a_wrong_folder_is_refused(photographs, tmp_path, break_it, code, said):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    break_it(root)
    with pytest.raises(Stop, match=said) as stopped:
        folder(root, tmp_path / "cache")
    assert stopped.value.code == code


MODES = ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"]  # test_image.py has those of more than 8 bits


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_what_pillow_converts_to(mode, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    gradient = Image.fromarray(np.arange(64 * 48, dtype=np.uint8).reshape(48, 64))
    image = gradient.convert(mode)
    for split in ("train", "val"):
        image.save(tmp_path / split / "a" / f"x.{'tiff' if mode == 'CMYK' else 'png'}")
    train, _ = folder(tmp_path, tmp_path / "cache")
    with Image.open(train.path(0)) as opened:
        assert opened.mode == mode
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(pixels_of(train, 0), expected)


def test_exif_is_not_parsed(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees
        Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / split / "a" / "x.jpg", exif=exif)
    assert dimensions(folder(tmp_path, tmp_path / "cache")[0].read(0)) == (40, 20)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-500] + bytes(500)),
            Exit.DAMAGED,
        ),  # the end of the data is missing
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), Exit.DAMAGED),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-500]),
            Exit.NOT_COMPARABLE,
        ),  # changed since it was listed
        (lambda path: path.unlink(), Exit.MISSING),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_stops_and_is_named(photographs, tmp_path, damage, code, workers):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    train, _ = folder(root, tmp_path / "cache")
    damage(root / "train" / "n00000001" / "007.JPEG")
    feed = Feed(
        Images(train, transforms.labelled(transforms.evaluation(Evaluate(size=32))), 0),
        in_sequence(len(train), 16),
        workers,
        CPU,
        ahead=True,
    )
    with pytest.raises(Stop, match=r"n00000001/007.JPEG \(sample 27\)") as stopped:
        list(feed)
    assert stopped.value.code == code


def microbatches(source, workers, start=0, seed=0, end=6):
    images = Images(source, transforms.labelled(transforms.training(Augment(size=32), [0.5] * 3)), seed)
    feed = Feed(images, Order(len(source), 16, 8, seed).steps(start, end), workers, CPU, ahead=True)
    return [(batch.images, *batch.targets) for batch in feed]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def test_workers_and_start_change_nothing(photographs, cache):
    """Sixty images, batches of 16: steps 0..2 are epoch 0, 3..5 epoch 1."""
    train, _ = folder(photographs, cache)
    reference = microbatches(train, 0)
    assert len(reference) == 12
    for workers in (1, 2, 3):
        assert same(microbatches(train, workers), reference)
    for start in range(6):
        assert same(microbatches(train, start % 2, start), reference[2 * start :])
    assert not same(microbatches(train, 0, seed=1), reference)
    assert not torch.equal(reference[0][0], reference[6][0])


def test_global_generators_are_neither_read_nor_changed(photographs, cache):
    train, _ = folder(photographs, cache)
    reference = microbatches(train, 0, end=1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert same(microbatches(train, 0, end=1), reference)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_feed_asks_one_batch_ahead():
    asked = []

    class Counting:
        def __iter__(self):
            for batch in in_sequence(24, 8):
                asked.append(batch)
                yield batch

    for ahead, expected in ((True, [2, 3, 3]), (False, [1, 2, 3])):
        asked.clear()
        images = Images(
            Synthetic(24, 3, "train"), transforms.labelled(transforms.evaluation(Evaluate(size=16))), 0
        )
        feed = Feed(images, Counting(), 0, CPU, ahead)
        assert [len(asked) for _ in feed] == expected
        assert feed.waited > 0


def test_synthetic_images_are_keyed(cache):
    train, val = open_sources(Data("synthetic", "synthetic", images=50, classes=4))
    assert (len(train), len(val)) == (50, 5)
    assert np.array_equal(pixels_of(train, 3), pixels_of(train, 3))
    assert not np.array_equal(pixels_of(train, 3), pixels_of(train, 4))
    assert not np.array_equal(pixels_of(train, 3), pixels_of(val, 3))
    assert train.labels(np.arange(6)).tolist() == [0, 1, 2, 3, 0, 1]


def test_the_index_holds_no_object_per_image(photographs, cache):
    assert isinstance(open_folder(photographs / "train", cache).index.table, np.memmap)


def test_workers_and_threads_together_never_take_more_than_the_cores(monkeypatch):
    from reconverge.base import launcher
    from reconverge.distributed import world

    for cores in (1, 2, 3, 8, 64):
        for local in (1, 2, 8):
            monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
            monkeypatch.setattr(
                launcher, "HERE", launcher.Place(size=local, local_size=local, launcher="torchrun")
            )
            mine = max(1, cores // local)
            assert launcher.cores() == mine
            for device in (torch.device("cpu"), torch.device("cuda")):
                workers = world.default_workers(device)
                assert workers >= 0
                assert workers + world.default_threads(device, workers) <= mine


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_a_file_that_never_was_an_image_stops_and_is_named(photographs, tmp_path, content):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    (root / "train" / "n00000001" / "007.JPEG").write_bytes(content)
    train, _ = folder(root, tmp_path / "cache")
    with pytest.raises(Stop, match=r"n00000001/007\.JPEG") as stopped:
        Images(train, transforms.labelled(transforms.evaluation(Evaluate(size=32))), 0).sample(0, 27, 0)
    assert stopped.value.code == Exit.DAMAGED


def test_digits_are_read_from_the_folders_that_the_settings_name(cache):
    train, val = open_sources(Data("digits", "digits", cache=str(cache / "here"), train="val", val="train"))
    assert (len(train), len(val)) == (359, 1438)


def test_a_process_ends_even_if_a_bug_leaves_its_workers_behind(tmp_path):
    """The workers ignore SIGTERM, which Python sends before it waits for them."""
    program = """
import torch
from reconverge.data import transforms
from reconverge.data.loader import Feed, Images
from reconverge.data.sources import Synthetic
from reconverge.config.settings import Evaluate

def microbatches():
    raise RuntimeError("a bug")
    yield

images = Images(Synthetic(24, 3, "train"), transforms.labelled(transforms.evaluation(Evaluate(size=16))), 0)
iter(Feed(images, microbatches(), 1, torch.device("cpu"), ahead=True)).__next__()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert ended.returncode == 1
    assert "a bug" in ended.stderr
