import json
import os
import socket
import subprocess
import sys
import time

import pytest

from reconverge.base import lock
from reconverge.base.errors import Exit, Stop

HOLDER = (
    "import sys, time; from pathlib import Path; from reconverge.base.lock import Lock;"
    " Lock(Path(sys.argv[1]));"
    " print('held', flush=True); time.sleep(100)"
)


@pytest.fixture
def held(tmp_path):
    """A lock held by a live process."""
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield path, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_live_holder_is_named_and_respected(held):
    path, process = held
    with pytest.raises(Stop, match=f"in use by process {process.pid} on {socket.gethostname()}") as stopped:
        lock.Lock(path)
    assert stopped.value.code == Exit.IN_USE
    assert json.loads(path.read_text())["pid"] == process.pid


def test_a_dead_holder_is_taken_over_with_a_message(held):
    path, process = held
    process.kill()
    process.wait()
    taken = lock.Lock(path)
    assert f"process {process.pid}" in taken.takeover
    assert "dead" in taken.takeover
    taken.release()
    assert not path.exists()


def test_a_zombie_is_dead(held):
    path, process = held
    process.kill()
    time.sleep(0.2)  # not waited for
    lock.Lock(path).release()


def rewrite(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_another_process_of_the_same_number_is_not_the_holder(held):
    path, _ = held
    rewrite(path, started="1")
    lock.Lock(path).release()


def test_a_holder_on_another_host_counts_by_its_heartbeat(held):
    path, _ = held
    rewrite(path, host="elsewhere")
    with pytest.raises(Stop):
        lock.Lock(path)
    os.utime(path, (time.time() - 60, time.time() - 60))
    taken = lock.Lock(path)
    assert "heartbeat" in taken.takeover
    taken.release()


def test_the_same_job_requeued_takes_over(held, monkeypatch):
    path, _ = held
    rewrite(path, job="17", host="elsewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(Stop, match="job 17"):
        lock.Lock(path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    taken = lock.Lock(path)
    assert "requeued" in taken.takeover
    taken.release()


def test_a_second_live_process_of_the_same_job_is_refused(held, monkeypatch):
    path, process = held
    rewrite(path, job="17")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(Stop, match=f"in use by process {process.pid}"):
        lock.Lock(path)


def test_a_folder_that_was_removed_is_told_as_such(tmp_path):
    held = lock.Lock(tmp_path / "lock")
    held.path.unlink()
    with pytest.raises(Stop, match="was removed"):
        held.check()
    held.release()


def test_who_lost_the_lock_learns_it_and_does_not_remove_it(tmp_path):
    path = tmp_path / "lock"
    first = lock.Lock(path)
    first.check()
    rewrite(path, id="another")
    with pytest.raises(Stop, match="taken over"):
        first.check()
    first.release()
    assert path.exists()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "INTERVAL", 0.05)
    held = lock.Lock(tmp_path / "lock")
    os.utime(held.path, (1, 1))
    time.sleep(0.5)
    assert held.path.stat().st_mtime > 1000
    held.release()
