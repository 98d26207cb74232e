import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reconverge.base.errors import Exit, Stop
from reconverge.run import checkpoint, reader, saving


def tensors(step):
    return {
        "model": {"a.weight": torch.full((4, 5), float(step)), "n": torch.tensor(step)},
        "optimizer": {"a/exp_avg": torch.arange(6.0)},
    }


def save(folder, *steps):
    for step in steps:
        saving.save(folder, step, tensors(step), {"best": None})


def names(folder):
    return [path.name for path in reader.checkpoints(folder)]


def test_what_is_saved_is_loaded(tmp_path):
    hashes = saving.save(tmp_path, 7, tensors(7), {"best": {"step": 3}})
    path, skipped = checkpoint.newest_valid(tmp_path)
    assert skipped == []
    loaded, state = checkpoint.load(path)
    assert state == {"step": 7, "best": {"step": 3}}
    assert torch.equal(loaded["model"]["a.weight"], tensors(7)["model"]["a.weight"])
    assert torch.equal(load_file(path / "optimizer.safetensors")["a/exp_avg"], torch.arange(6.0))
    assert hashes == saving.save(tmp_path / "again", 7, tensors(7), {"best": {"step": 3}})
    assert (
        hashes["model.safetensors"] != saving.save(tmp_path / "again", 8, tensors(8), {})["model.safetensors"]
    )


def test_channels_last_weights_are_saved_with_the_same_bits(tmp_path):
    weight = torch.randn(4, 3, 5, 5)
    plain = saving.save(tmp_path / "a", 1, {"model": {"w": weight}}, {})
    assert plain == saving.save(
        tmp_path / "b", 1, {"model": {"w": weight.to(memory_format=torch.channels_last)}}, {}
    )


TYPES = [
    torch.float32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.bool,
    torch.int32,
]
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(st.sampled_from(TYPES), SHAPES), max_size=5)
)
@settings(max_examples=100)
def test_a_file_is_the_one_that_safetensors_writes(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in wanted.items()}
    save_file(tensors, folder / "theirs")
    said = saving.write(folder / "ours", tensors)
    data = (folder / "theirs").read_bytes()
    assert (folder / "ours").read_bytes() == data
    assert said == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@given(data=st.data())
@settings(max_examples=60)
def test_every_flipped_bit_and_every_cut_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder, 1, 2)
    files = sorted((folder / "step-00000002").iterdir())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content) * 8 - 1))
        content[place // 8] ^= 1 << place % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    file.write_bytes(content)
    path, skipped = checkpoint.newest_valid(folder)
    # A flip inside the manifest's white space or of the letter case of a hash leaves it true or makes it
    # false, never wrong.
    if path.name == "step-00000002":
        assert file.name == "MANIFEST.json"
        assert checkpoint.load(path)[1]["step"] == 2
    else:
        assert path.name == "step-00000001"
        assert "step-00000002" in skipped[0]


def test_all_bad_stops_and_names_each(tmp_path):
    save(tmp_path, 1, 2)
    for path in reader.checkpoints(tmp_path):
        (path / "model.safetensors").unlink()
    with pytest.raises(
        Stop, match=r"step-00000002: model.safetensors is missing; step-00000001: model.safetensors"
    ) as stopped:
        checkpoint.newest_valid(tmp_path)
    assert stopped.value.code == Exit.DAMAGED


def test_none_is_a_new_run(tmp_path):
    assert checkpoint.newest_valid(tmp_path) == (None, [])


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    saving.prune(tmp_path, 5, 2, best=[2])
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    saving.prune(tmp_path, 5, 1, best=[])
    assert names(tmp_path) == ["step-00000005"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    save(tmp_path, 1)
    assert checkpoint.verify(tmp_path / "step-00000001") is None
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


def in_a_process(work, *arguments):
    """In a fork, because it has already imported torch."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def save_without_end(folder):
    for step in range(1, 10_000):
        saving.save(folder, step, {"model": {"w": torch.full((300_000,), float(step))}}, {})
        saving.prune(folder, step, 2, [])


def test_kill_inside_a_save_leaves_a_valid_one(tmp_path):
    for kill in range(6):
        process = in_a_process(save_without_end, tmp_path)
        while not names(tmp_path):
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(0.15 + 0.037 * kill)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        path, skipped = checkpoint.newest_valid(tmp_path)
        assert skipped == []
        loaded, state = checkpoint.load(path)
        assert (loaded["model"]["w"] == state["step"]).all()


def test_full_disk_keeps_the_old_one(small_disk):
    save(small_disk, 1)
    (small_disk / "filler").write_bytes(b"x" * 700_000)
    for size in (100_000, 2_000_000):  # the first one just fits, but without the required reserve
        with pytest.raises(Stop) as stopped:
            saving.save(small_disk, 2, {"model": {"w": torch.zeros(size)}}, {})
        assert stopped.value.code == Exit.DISK
    assert names(small_disk) == ["step-00000001"]
    assert checkpoint.verify(small_disk / "step-00000001") is None
    assert not list(small_disk.glob(".new-*"))


def test_write_errors_are_told_as_such(tmp_path):
    """A limit of the file size imitates a disk that becomes full after the check of free space."""

    def save_within_a_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            saving.save(tmp_path, 2, {"model": {"w": torch.zeros(200_000)}}, {})
        except Stop as stop:
            sys.exit(stop.code)

    process = in_a_process(save_within_a_limit)
    process.join()
    assert process.exitcode == 74
    assert os.listdir(tmp_path) == []


def test_nothing_that_is_loaded_can_run_code(tmp_path):
    save(tmp_path, 1)
    kinds = {path.suffix for path in (tmp_path / "step-00000001").iterdir()}
    assert kinds == {".safetensors", ".json"}
    assert json.loads((tmp_path / "step-00000001" / "MANIFEST.json").read_text())["format"] == "checkpoint-1"


def test_tensors_may_change_while_they_are_saved(tmp_path):
    saver = saving.Saver(tmp_path)
    weight = torch.zeros(3_000_000)
    for step in range(1, 6):
        weight += 1
        saver.begin(step, {"model": {"w": weight, "even": weight[::2]}}, {}, 2, [1])
        weight += 100
        weight -= 100
        weight[step] += 7  # of a later step
    assert saver.wait() == 5
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]
    for step in (1, 4, 5):
        loaded, _ = checkpoint.load(tmp_path / f"step-{step:08d}")
        expected = torch.full((3_000_000,), float(step))
        expected[1:step] += 7
        assert torch.equal(loaded["model"]["w"], expected)
        assert torch.equal(loaded["model"]["even"], expected[::2])


def test_what_fails_in_the_background_is_raised_once_and_named_at_the_end(small_disk, capsys):
    saver = saving.Saver(small_disk)
    saver.begin(1, {"model": {"w": torch.zeros(1_000_000)}}, {}, 2, [])
    with pytest.raises(Stop) as stopped:
        saver.wait()
    assert stopped.value.code == Exit.DISK
    assert saver.saved() == 0
    saver.begin(2, {"model": {"w": torch.zeros(1_000_000)}}, {}, 2, [])
    saver.close()
    said = " ".join(capsys.readouterr().out.split())
    assert re.search("a checkpoint was not saved: . MB free in .* for a checkpoint of 4 MB", said)
