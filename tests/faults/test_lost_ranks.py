"""Ranks that die, hang or are stopped: the exit code, the message, and a resumed run with the same bits."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import JOB, SMALL, trained, weights, workers_of

pytestmark = pytest.mark.slow

KINDS = ("model", "ema", "optimizer")
LONG = [
    "model=timm",
    "model.timm=test_resnet",
    "steps=60",
    "epochs=60",
    "save_every=5",
    "keep=99",
    "evaluate_every=never",
    "batch=32",
    "reduce=tree",
]
ALONE = [setting for setting in JOB if setting not in SMALL]


def bits(run):
    return [weights(run, kind) for kind in KINDS], (Path("runs") / run / "record.jsonl").read_text()


def status(run):
    return json.loads((Path("runs") / run / "status.json").read_text())


def reached(run, step, process, seconds=120):
    """Wait until the run has recorded `step`."""
    path, deadline = Path("runs") / run / "record.jsonl", time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits, cache):
    """The bits of the same job without interruption and with one rank; reduce=tree gives the same."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained(folder, cache, f"data.root={digits}", *ALONE, *LONG, "run=whole").parent)
        return bits("whole")


def test_a_killed_rank_is_restarted_by_torchrun_and_ends_with_the_same_bits(launch, whole):
    process = launch(2, *LONG, "run=a", options=["--max-restarts=2"], real=True)
    reached("a", 3 + random.randrange(4), process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert bits("a") == whole
    assert len(json.loads(Path("runs/a/environment.json").read_text())["starts"]) == 2


def test_a_killed_rank_ends_the_others_with_its_name(launch, train, whole):
    process = launch(2, *LONG, "run=a")
    reached("a", 3, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert status("a")["exit_code"] == 69
    assert "rank 1 of 2 was lost" in status("a")["summary"]
    assert "run the same command again" in said
    assert train(*ALONE, *LONG, "run=a") == 0
    assert bits("a") == whole


def test_a_rank_that_stands_still_is_named_after_the_timeout(launch, train, whole):
    """SIGSTOP imitates a host that hangs. The other rank names it, prints a traceback, and ends."""
    process = launch(2, *LONG, "run=a", "world_timeout=0.1", real=True)
    reached("a", 3, process)
    stopped = workers_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while workers_of(process).keys() == {0, 1} and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(stopped, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 was lost" in said
    assert "Traceback" in said
    assert "exit 69" in said
    assert status("a")["exit_code"] == 69
    assert train(*ALONE, *LONG, "run=a") == 0
    assert bits("a") == whole


def test_a_signal_to_one_rank_stops_all_at_the_same_step(launch, train, whole):
    """status.json has 75; torchrun gets 0, because it would restart the ranks otherwise. To all ranks:
    test_launch.
    """
    process = launch(2, *LONG, "run=a", options=["--max-restarts=2"])
    reached("a", 2 + random.randrange(5), process)
    os.kill(workers_of(process)[1], signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (status("a")["reason"], status("a")["exit_code"]) == ("preempted", 75)
    assert "a signal to another rank: step" in said
    assert train(*ALONE, *LONG, "run=a") == 0
    assert bits("a") == whole


def test_what_one_rank_cannot_read_is_what_the_run_says(torchrun, digits, tmp_path):
    """Rank 1 finds a damaged image; rank 0 ends with the same reason and exit code."""
    import shutil

    from reconverge.data.order import Order

    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    files = sorted(path for path in (copy / "train").rglob("*.png"))
    second = {int(sample) for part in Order(len(files), 64, 8, 0).steps(0, 1, 1, 2) for sample in part.ids}
    broken = files[min(second)]
    broken.write_bytes(broken.read_bytes()[:60])
    code, said = torchrun(2, "run=a", "steps=2", f"data.root={copy}")
    assert code == 1, said
    assert status("a")["exit_code"] == 65
    assert status("a")["summary"].startswith("  given    rank 1: ")
    assert broken.name in status("a")["summary"]
    assert broken.name in Path("runs/a/errors/rank-1.txt").read_text()
    assert sorted(path.name for path in Path("runs/a/errors").iterdir()) == ["rank-1.txt"]


def test_a_gradient_that_is_not_finite_stops_all_ranks_with_its_step(torchrun):
    code, said = torchrun(2, "run=a", "steps=4", "optim.lr=1e30", "optim.clip=null", "precision=bf16")
    assert code == 1
    assert status("a")["exit_code"] == 70
    assert said.count("its sample ids") == 1


def test_ranks_that_never_come_are_waited_for_no_longer_than_asked(start, monkeypatch):
    """A single rank; the other one never starts."""
    rank = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29741",
    }
    began = time.monotonic()
    process = start("run=a", "world_timeout=0.05", **rank)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 69, said
    assert "did not find the other ranks at 127.0.0.1:29741 within 0.05 minutes" in said
    assert time.monotonic() - began < 90
