"""A run is killed while it saves, its disk fills up while it saves, and it is started twice at once. The
checkpoints are large beside the steps, so that nearly always one is being written.
"""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import FAULTS

from reconverge.run import checkpoint, reader

STEPS = FAULTS + 4
ARGUMENTS = [f"steps={STEPS}", "batch=4", "microbatch=4", "save_every=1", "evaluate_every=never", "workers=0",
    "model=convnext_atto", "model.drop_path=0.2"]  # fmt: skip


def hashes(run):
    """Of all files of the last checkpoint."""
    path = Path("runs") / run / "checkpoints" / f"step-{STEPS:08d}" / "MANIFEST.json"
    return json.loads(path.read_text())["files"]


def whole(run, at_least=0):
    """The newest checkpoint is valid, and not older than `at_least`; its step."""
    folder = Path("runs") / run / "checkpoints"
    newest, skipped = checkpoint.newest_valid(folder)
    assert skipped == []
    step = reader.step_of(newest) if newest else 0
    assert step >= at_least
    return step


@pytest.mark.slow
def test_kills_while_it_saves(start):
    assert start("run=whole", *ARGUMENTS).wait() == 0
    chance, kills, inside, step = random.Random(0), 0, 0, 0
    while kills < FAULTS:
        folder = Path("runs/a/checkpoints")
        process = start("run=a", *ARGUMENTS)
        wanted = min(step + 1, STEPS - 1)
        while whole_or_none(folder) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break
        kills += 1
        inside += bool(checkpoint.passing(folder))
        step = whole("a", at_least=step)
    assert kills >= 0.75 * FAULTS
    assert inside >= 0.25 * FAULTS, "many kills should come while a checkpoint is being written"
    assert start("run=a", *ARGUMENTS).wait() == 0
    assert hashes("a") == hashes("whole")
    assert not checkpoint.passing(Path("runs/a/checkpoints"))


def whole_or_none(folder):
    """The step of the newest checkpoint, without a look at its files."""
    found = reader.checkpoints(folder) if folder.is_dir() else []
    return reader.step_of(found[-1]) if found else 0


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_saves(start, small_disk, monkeypatch):
    """Checkpoints of 54 MB. Something else writes to the disk at random moments, and is removed again."""
    assert start("run=whole", *ARGUMENTS).wait() == 0
    expected = hashes("whole")
    subprocess.run(["mount", "-o", "remount,size=260m", str(small_disk)], check=True)
    monkeypatch.chdir(small_disk)
    chance, codes, step, filler = random.Random(1), [], 0, small_disk / "filler"
    for _ in range(10):
        process = start("run=a", *ARGUMENTS)
        while whole_or_none(Path("runs/a/checkpoints")) <= step and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is None:
            subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], stderr=subprocess.DEVNULL)
        codes.append(process.wait())
        filler.unlink(missing_ok=True)
        step = whole("a", at_least=step)
        if codes[-1] == 0:
            break
    assert set(codes) <= {0, 74}, codes
    assert 74 in codes
    assert codes[-1] == 0 or start("run=a", *ARGUMENTS).wait() == 0
    assert hashes("a") == expected


@pytest.mark.slow
def test_races_of_two_starts(start):
    """One of the two trains; the other one ends with 73, or comes later and finds the finished run."""
    arguments = ["steps=2", "save_every=1", "evaluate_every=never", "workers=0"]
    chance = random.Random(2)
    for race in range(FAULTS):
        first = start(f"run=race{race}", *arguments)
        time.sleep(chance.choice([0, 0, chance.uniform(0, 0.1), chance.uniform(0, 1.5)]))
        second = start(f"run=race{race}", *arguments)
        said = [process.communicate()[0] for process in (first, second)]
        assert sorted(process.returncode for process in (first, second)) in ([0, 73], [0, 0]), said
        trained = [text for text in said if "step 2/2" in text]
        assert len(trained) == 1, said
        folder = Path("runs") / f"race{race}"
        assert [line["step"] for line in reader.record(folder)] == [1, 2]
        assert whole(f"race{race}") == 2
        assert not (folder / "lock").exists()
