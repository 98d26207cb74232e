"""Damaged shards, disk faults, and large data sets: faults are named, and no wrong image reaches a model."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, weights

from reconverge import commands
from reconverge.base import chance, files
from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Augment
from reconverge.data import transforms
from reconverge.data.loader import Feed, Images, Quarantine
from reconverge.data.order import Order
from reconverge.data.shards import open_shards

CPU = torch.device("cpu")


@pytest.fixture
def copy(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(at):
    def change(data):
        data[at] ^= 1

    return change


def cut(at):
    def change(data):
        del data[at:]

    return change


def zero(start, end):
    def change(data):
        data[start:end] = bytes(end - start)

    return change


def place(root, sample):
    """Shard, byte offset of the image, size in bytes, key."""
    source = open_shards(root, None)[0]
    row = source.index.row(sample)
    return (
        root / source.shards[row["shard"]]["name"],
        int(row["offset"]),
        int(row["size"]),
        source.index.key(sample),
    )


# What is done to the shard of sample 13, the fourteenth of 60, given where its image begins and how long it
# is; what stops the opening; what stops the reading of the image; what `check` says.
DAMAGE = {
    "a cut inside a member": (lambda at, size: cut(at + size // 2), 65, None, "bytes instead of"),
    "a cut at a member boundary": (lambda at, size: cut(at - 512), 65, None, "bytes instead of"),
    "the end-of-archive blocks missing": (lambda at, size: cut(-1024), 65, None, "bytes instead of"),
    "a byte of a tar header": (lambda at, size: flip(at - 512 + 3), None, None, "not a tar header"),
    "a size in a tar header": (lambda at, size: flip(at - 512 + 130), None, None, "not a tar header"),
    "a zeroed header": (lambda at, size: zero(at - 512, at), None, None, "more data follow"),
    "a byte of the image": (lambda at, size: flip(at + size // 2), None, 65, "has changed bytes"),
    "a byte of the label": (lambda at, size: flip(at + -(-size // 512) * 512 + 512), None, None, "sha256"),
    "an empty shard": (lambda at, size: cut(0), 65, None, "bytes instead of"),
    "a missing shard": (None, 66, None, "is missing"),
}


def run_check(root, monkeypatch, capsys):
    from reconverge.commands import main

    monkeypatch.setattr(sys, "argv", ["reconverge", "check", str(root), "--jobs", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_damage_is_detected_and_nothing_wrong_is_read(damage, shards, copy, monkeypatch, capsys):
    change, at_opening, at_reading, said_by_check = DAMAGE[damage]
    path, at, size, key = place(copy, 13)
    good = [open_shards(shards, None)[0].read(sample) for sample in range(60)]
    assert run_check(copy, monkeypatch, capsys)[0] == 0
    path.unlink() if change is None else edit(path, change(at, size))

    code, said = run_check(copy, monkeypatch, capsys)
    assert code == (66 if change is None else 65)
    assert path.name in said
    assert said_by_check in said
    if at_reading:
        assert f"{key} at byte {at}" in said

    if at_opening:
        with pytest.raises(Stop, match=path.name) as stopped:
            open_shards(copy, None)
        assert stopped.value.code == at_opening
        return
    source = open_shards(copy, None)[0]
    assert len(source) == 60
    for sample in range(60):
        if sample == 13 and at_reading:
            with pytest.raises(Stop, match=f"{path.name}, {key} at byte {at}") as stopped:
                source.read(sample)
            assert stopped.value.code == at_reading
        else:
            assert source.read(sample) == good[sample]
    assert (
        source.labels(np.arange(60)).tolist() == open_shards(shards, None)[0].labels(np.arange(60)).tolist()
    )


def test_a_label_that_was_changed_in_the_index_is_found_at_opening(copy):
    table = np.load(copy / "train.index.npy", mmap_mode="r+")
    table["label"][7] += 1
    table.flush()
    with pytest.raises(Stop, match=r"train\.index\.npy is damaged") as stopped:
        open_shards(copy, None)
    assert stopped.value.code == Exit.DAMAGED


def test_all_problems_are_in_one_list_before_the_first_step(copy, train, capsys):
    names = sorted(path.name for path in copy.glob("train-*.tar"))
    (copy / names[0]).unlink()
    edit(copy / names[1], cut(1000))
    edit(copy / "val.index.npy", cut(100))
    assert train("data=shards", f"data.root={copy}", "run=a", "steps=1") == 65
    said = capsys.readouterr().err
    assert all(name in said for name in (*names[:2], "val.index.npy"))
    assert not Path("runs/a").exists()


def test_a_shard_that_was_replaced_by_another_is_found(copy):
    """The other shard has the same size and is complete, but its first member is not the indexed one."""
    first, second = sorted(copy.glob("train-*.tar"))[:2]
    data = second.read_bytes()
    size = first.stat().st_size
    first.write_bytes((data + bytes(size))[:size])
    with pytest.raises(Stop, match=f"{first.name}.*replaced") as stopped:
        open_shards(copy, None)
    assert stopped.value.code == Exit.DAMAGED


def test_another_data_set_or_none_is_refused(copy, tmp_path):
    for root, dataset, code in ((copy, "imagenet1k", Exit.USAGE), (tmp_path / "nowhere", None, Exit.MISSING)):
        with pytest.raises(Stop) as stopped:
            open_shards(root, dataset)
        assert stopped.value.code == code
    about = json.loads((copy / "dataset.json").read_text())
    for text, said in (("{", "dataset.json"), (json.dumps(about | {"format": "other"}), "format other")):
        (copy / "dataset.json").write_text(text)
        with pytest.raises(Stop, match=said) as stopped:
            open_shards(copy, None)
        assert stopped.value.code == Exit.DAMAGED


def without_val(copy):
    """As reconverge prepare leaves ImageNet-22K without --hold-out."""
    about = json.loads((copy / "dataset.json").read_text())
    del about["splits"]["val"]
    (copy / "dataset.json").write_text(json.dumps(about | {"dataset": "imagenet22k"}))


def test_a_data_set_without_validation_images_is_refused_unless_none_are_asked_for(copy):
    without_val(copy)
    with pytest.raises(Stop, match="no val") as stopped:
        open_shards(copy, None)
    assert "data.val=null" in stopped.value.args[2]
    assert "--hold-out" in stopped.value.args[3]
    train, val = open_shards(copy, None, validation=False)
    assert (len(train), val) == (60, None)


# ---- training on shards ------------------------------------------------------------------------------------


def test_training_resumes_bit_by_bit_on_shards_in_windows_with_local_copies(shards, train):
    base = [
        "data=shards",
        f"data.root={shards}",
        "data.window=2",
        "steps=8",
        "save_every=3",
        "augment.repeats=2",
        "evaluate_every=never",
    ]
    assert train(*base, "run=whole") == 0
    assert train(*base, "run=parts", "data.stage=here", "steps=4") == 0
    assert train(*base, "run=parts", "data.stage=here", "workers=1") == 0
    assert weights("whole") == weights("parts")
    assert not list(Path("here").iterdir())
    assert train(*base[:2], "data.window=1", "steps=8", "run=parts") == 78


def test_shards_without_validation_images_are_trained_on(copy, train, capsys, monkeypatch):
    without_val(copy)
    data = ["data=imagenet22k", f"data.root={copy}"]
    assert train("recipe=in22k", *data, "model.drop_path=0", "optim.warmup_epochs=0", "run=a", "steps=2") == 2
    assert "no val" in capsys.readouterr().err
    small = ["model.drop_path=0", "optim.warmup_epochs=0", "augment.size=32"]
    assert train("recipe=in22k", *data, "data.val=null", *small, "run=a", "steps=1") == 0
    assert train("recipe=in22k", *data, "data.val=null", *small, "run=a", "steps=2") == 0
    assert "60 training and no validation images" in capsys.readouterr().out
    assert json.loads(Path("runs/a/environment.json").read_text())["facts"]["data"]["val"] is None
    monkeypatch.setattr(sys, "argv", ["reconverge", "batch", "runs/a", "--step", "1"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 0


def test_a_damaged_image_stops_the_run_and_is_named(copy, train, capsys):
    path, at, size, key = place(copy, 13)
    edit(path, flip(at + size // 2))
    assert train("data=shards", f"data.root={copy}", "run=a", "save_every=1") == 65
    said = capsys.readouterr().err
    assert f"{path.name}, {key} at byte {at} (sample 13)" in said
    assert json.loads(Path("runs/a/status.json").read_text())["exit_code"] == 65


def test_a_damaged_image_is_replaced_when_asked_the_same_in_every_layout(copy, train, capsys):
    damaged = (13, 14, 41)
    for sample in damaged:
        path, at, size, _ = place(copy, sample)
        edit(path, flip(at + size // 2))
    base = [
        "data=shards",
        f"data.root={copy}",
        "data.on_bad_image=substitute",
        "steps=8",
        "evaluate_every=never",
    ]
    assert train(*base, "run=a") == 0
    said = capsys.readouterr().out
    assert "3 damaged images were replaced (quarantine.jsonl)" in said
    assert train(*base, "run=b", "workers=1") == 0
    assert weights("a") == weights("b")
    entries = [json.loads(line) for line in Path("runs/a/quarantine.jsonl").read_text().splitlines()]
    assert {entry["sample"] for entry in entries} == set(damaged)
    assert all(entry["substitute"] == chance.key("substitute", entry["sample"]) % 60 for entry in entries)
    assert all(f"(sample {entry['sample']})" in entry["reason"] for entry in entries)
    assert Path("runs/a/quarantine.jsonl").read_text() == Path("runs/b/quarantine.jsonl").read_text()
    capsys.readouterr()
    assert train(*base, "run=c", "data.max_substitutes=2") == 65
    assert "3 damaged images were replaced" in capsys.readouterr().err


def test_substitutes_do_not_hang_on_ranks_or_workers(copy, tmp_path):
    for sample in (13, 14, 41):
        path, at, size, _ = place(copy, sample)
        edit(path, flip(at + size // 2))

    def stream(ranks, workers):
        source = open_shards(copy, None)[0]
        images = Images(
            source, transforms.labelled(transforms.training(Augment(size=32), [0.5] * 3)), 4, "substitute"
        )
        order, found = Order(60, 16, 2, seed=4), {}
        for rank in range(ranks):
            quarantine = Quarantine(tmp_path / f"{ranks}-{workers}.jsonl", 10)
            parts = list(order.steps(0, 3, rank, ranks))
            for part, batch in zip(parts, Feed(images, parts, workers, CPU, True, quarantine), strict=True):
                found[tuple(part.ids.tolist())] = batch.images.numpy().tobytes(), batch.targets[0].tolist()
        return found

    reference = stream(1, 0)
    assert stream(2, 1) == stream(8, 0) == reference
    assert sum(13 in ids or 14 in ids or 41 in ids for ids in reference) > 0


def test_a_set_of_nothing_but_damaged_images_stops(copy):
    for sample in range(60):
        path, at, size, _ = place(copy, sample)
        edit(path, flip(at + size // 2))
    images = Images(
        open_shards(copy, None)[0],
        transforms.labelled(transforms.training(Augment(size=32), [0.5] * 3)),
        4,
        "substitute",
    )
    stop = images[Order(60, 16, 2, seed=4).microbatch(0, 0)]
    assert isinstance(stop, Stop)
    assert stop.code == Exit.DAMAGED


# ---- faults of disk and network ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_faults_of_disk_are_tried_again_and_then_stop(shards, monkeypatch, capsys, number):
    """The system call fails, some times or always."""
    source = open_shards(shards, None)[0]
    monkeypatch.setattr(files, "WAITS", (0.001, 0.002, 0.003))
    calls, really = [], os.pread

    def failing(times):
        def pread(descriptor, size, offset):
            if size > 1000:  # not of the index
                calls.append(offset)
                if len(calls) <= times:
                    raise OSError(number, os.strerror(number))
            return really(descriptor, size, offset)

        calls.clear()
        return pread

    expected = source.read(7)
    monkeypatch.setattr(os, "pread", failing(3))
    assert source.read(7) == expected
    assert capsys.readouterr().err.count("trying again") == 3
    monkeypatch.setattr(os, "pread", failing(4))
    with pytest.raises(Stop, match="4 times") as stopped:
        source.read(7)
    assert stopped.value.code == Exit.DISK


def test_a_shard_that_disappears_while_training_is_missing(copy):
    source = open_shards(copy, None)[0]
    (copy / source.shards[0]["name"]).unlink()
    from reconverge.base.errors import explain

    with pytest.raises(FileNotFoundError) as stopped:
        source.read(0)
    assert explain(stopped.value).code == Exit.MISSING


# ---- fourteen million --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fourteen_million_rows_are_neither_read_nor_held(tmp_path):
    """A worker opens them and reads 2,000 microbatches of all epochs; the system counts the bytes that it
    reads and holds.
    """
    rows, shards = 14_000_000, 7_000
    write = """
import numpy as np, sys
from numpy.lib import format
from reconverge.data import index
rows, shards = int(sys.argv[2]), int(sys.argv[3])
table = format.open_memmap(sys.argv[1], "w+", index.row(24), (rows,))
for first in range(0, rows, 1_000_000):
    part = table[first : first + 1_000_000]
    ids = np.arange(first, first + len(part))
    part["shard"], part["offset"], part["size"] = ids * shards // rows, ids % 2000 * 100_000, 99_000
    part["label"], part["checksum"], part["key"] = ids % 21841, ids, b"n01440764_123456"
table.flush()
"""
    path = tmp_path / "train.index.npy"
    subprocess.run([sys.executable, "-c", write, str(path), str(rows), str(shards)], check=True)
    told = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "index.py"), str(path), str(shards)],
        check=True,
        capture_output=True,
        text=True,
    )
    seen = json.loads(told.stdout)
    assert seen["rows"] == rows
    assert seen["opening reads"] < 1 << 20
    assert seen["held by 2000 microbatches"] < 200 << 20
    assert seen["correct labels"]
