"""Faults of a machine: clocks that jump, folders that cannot be read or written. Other files test other
faults: full disk (test_train, test_checkpoint), two runs in one folder (test_resume, test_lock), what could
run code (test_checkpoint), a tracker's dead server (test_tracker), changed configuration, data, code,
versions and threads (test_resume), damaged data (test_shards).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, weights

KINDS = ("model", "ema", "optimizer")


@pytest.mark.parametrize("hours", [-48, pytest.param(48, marks=pytest.mark.slow)])
def test_a_clock_that_jumps_changes_nothing(train, monkeypatch, hours):
    """Between two steps and between two starts. Times are recorded, but decide nothing."""
    settings = ["steps=4", "save_every=2", "log_every=1", "evaluate_every=0"]
    assert train("run=whole", *settings) == 0
    really, steps = time.time, []

    def jumps():
        steps.append(None)
        return really() + 3600 * hours * (len(steps) % 2)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumps)
        assert train("run=a", *settings, "steps=2") == 0
        assert train("run=a", *settings) == 0
    assert [weights("a", kind) for kind in KINDS] == [weights("whole", kind) for kind in KINDS]


@pytest.mark.parametrize("seconds", [-100_000, 100_000])
def test_a_lock_written_under_another_clock_is_judged_by_the_file_systems(tmp_path, seconds):
    """The lock's holder is on another host, whose clock is wrong by a day. Its heartbeat is compared with a
    new file in the same folder.
    """
    from reconverge.base.errors import Exit, Stop
    from reconverge.base.lock import Lock

    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": None, "id": "x"}))
    script = f"import time; time.time = lambda real=time.time: real() + {seconds}\n"
    script += f"from reconverge.base.lock import Lock; from pathlib import Path; Lock(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "is in use by process 1 on elsewhere" in done.stderr
    with pytest.raises(Stop) as stop:
        Lock(path)
    assert stop.value.code == Exit.IN_USE


def as_nobody(command, folder, **environment):
    """A user without special rights, because root may read everything."""
    return subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not read")
def test_folders_that_may_not_be_read_or_written_are_named(digits, tmp_path, small):
    import shutil

    place = tmp_path / "place"
    shutil.copytree(digits, place / "data")
    for path in [place, *place.rglob("*")]:
        os.chown(path, 65534, 65534)
    for path in [tmp_path, *tmp_path.parents]:  # pytest's own folders are private
        if path != Path("/") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *small,
        f"data.root={place}/data",
        f"data.cache={place}/cache",
        "steps=1",
    ]
    if as_nobody([sys.executable, "-c", "import reconverge.config"], place).returncode:
        pytest.skip("the package lies where nobody else may read it")
    (place / "data" / "train" / "3").chmod(0)
    done = as_nobody([*command, "run=a"], place)
    assert done.returncode == 77, done.stderr
    assert "data/train/3" in done.stderr
    (place / "data" / "train" / "3").chmod(0o755)
    (place / "runs").mkdir(exist_ok=True)
    os.chown(place / "runs", 0, 0)
    done = as_nobody([*command, "run=b"], place)
    assert done.returncode == 77, done.stderr
    assert "runs/b" in done.stderr


@pytest.mark.slow
def test_a_killed_data_worker_stops_with_its_code_and_the_run_goes_on(start, train):
    settings = ["steps=40", "save_every=2", "keep=2", "log_every=1", "evaluate_every=0"]
    process = start("run=a", *settings, "workers=1")
    record, deadline = Path("runs/a/record.jsonl"), time.monotonic() + 120
    while not (record.exists() and record.read_text().count("\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    workers = [int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 71, said  # workers are mostly killed because memory is short
    assert "a data worker died" in said
    assert train("run=a", *settings) == 0
    assert train("run=whole", *settings) == 0
    assert [weights("a", kind) for kind in KINDS] == [weights("whole", kind) for kind in KINDS]
    assert record.read_text() == Path("runs/whole/record.jsonl").read_text()


@pytest.mark.parametrize(
    "fault",
    [ConnectionResetError(104, "reset"), ConnectionRefusedError(111, "refused"), EOFError()],
    ids=repr,
)
def test_a_data_worker_killed_while_it_hands_a_batch_over_is_told_as_such(fault):
    """Python's connections raise this error; torch passes it on until it knows that the worker is dead."""
    import torch

    from reconverge.base.errors import Exit, explain
    from reconverge.data.loader import Feed

    def cut_off():
        raise fault
        yield

    with pytest.raises(RuntimeError) as raised:
        Feed([], [], 0, torch.device("cpu"), ahead=False)._next(cut_off())
    stop = explain(raised.value)
    assert stop.code == Exit.OUT_OF_MEMORY
    assert "a data worker died" in str(stop)
