"""What a run says of itself: its numbers are read a step late, hosts talk before a device is waited for, and
the time that ranks wait for each other counts.
"""

import json
import time
from pathlib import Path

import pytest

from reconverge.distributed import later
from reconverge.distributed.world import World
from reconverge.run import log

QUIET = ["save_every=0", "evaluate_every=0", "augment.auto=none"]


def lines(run, name="metrics"):
    return [json.loads(line) for line in Path("runs", run, f"{name}.jsonl").read_text().splitlines()]


class Event:
    """An event of a device that needs `asked` questions, and tells when it was asked."""

    def __init__(self, asked, told):
        self.left, self.told = asked, told

    def query(self):
        self.told.append("device")
        self.left -= 1
        return self.left < 0


@pytest.fixture
def told(monkeypatch):
    """Who was asked, in order: the hosts or the device."""
    told, any_of = [], World.any

    def any_(world, flag):
        told.append("hosts")
        return any_of(world, flag)

    monkeypatch.setattr(World, "any", any_)
    return told


def test_a_wait_for_other_ranks_is_in_images_per_second(train, monkeypatch):
    """16 images a step, and 0.1 s in each that ranks wait: never more than 160 images/s."""
    any_of = World.any

    def slow(world, flag):
        time.sleep(0.1)
        return any_of(world, flag)

    monkeypatch.setattr(World, "any", slow)
    assert train("run=a", "steps=8", "log_every=2", *QUIET) == 0
    speeds = [line["images_per_second"] for line in lines("a") if "loss" in line]
    assert len(speeds) == 4
    assert max(speeds[1:]) < 16 / 0.1


def test_the_time_of_an_evaluation_is_not_in_images_per_second(train, monkeypatch):
    from reconverge.tasks.classify import Classify

    evaluate = Classify.evaluate

    def slow(task, models):
        time.sleep(1)
        return evaluate(task, models)

    monkeypatch.setattr(Classify, "evaluate", slow)
    arguments = ["steps=6", "log_every=1", "save_every=0", "evaluate_every=3", "augment.auto=none"]
    assert train("run=a", *arguments) == 0
    speeds = {line["step"]: line["images_per_second"] for line in lines("a") if "loss" in line}
    assert speeds[4] > 16


def test_an_event_that_never_comes_ends_with_69(train, monkeypatch, capsys, told):
    monkeypatch.setattr(later, "recorded", lambda device: Event(10**9, told))
    assert train("run=a", "steps=8", "log_every=2", "world_timeout=0.01", *QUIET) == 69
    assert "has not finished its work within 0.01 minutes" in " ".join(capsys.readouterr().err.split())
    assert json.loads(Path("runs/a/status.json").read_text())["exit_code"] == 69
    assert told[:5] == ["hosts", "hosts", "hosts", "hosts", "device"]  # at the start, after steps 1, 2 and 3


def test_the_device_is_asked_a_step_late_and_after_the_hosts(train, monkeypatch, told):
    arguments = ["steps=7", "log_every=3", "evaluate_every=never", "save_every=0"]
    assert train("run=early", *arguments) == 0
    told.clear()
    monkeypatch.setattr(later, "recorded", lambda device: Event(3, told))
    assert train("run=late", *arguments) == 0
    first = [number for number in range(1, len(told)) if told[number - 1 : number + 1] == ["hosts", "device"]]
    # The hosts talk before the first step and after each. Step 3 is read after step 4; 6 and 7 at the end.
    assert [told[:number].count("hosts") - 1 for number in first] == [4, 7]
    assert lines("late", "record") == lines("early", "record")
    kept = ("step", "loss", "lr", "grad_norm")
    late, early = ([{name: line[name] for name in kept} for line in lines(run)] for run in ("late", "early"))
    assert late == early
    assert [line["step"] for line in late] == [3, 6, 7]


def test_a_step_that_is_not_finite_is_named_although_it_is_found_later(train, capsys):
    """Step 3 has infinities (test_train.py). It is read after step 4, or before a checkpoint of step 3."""
    huge = ["optim.lr=1e30", "augment.auto=none", "evaluate_every=0"]
    assert train("run=a", *huge, "save_every=0", "log_every=1") == 70
    assert "step 3: the loss is nan" in capsys.readouterr().err
    assert [line["step"] for line in lines("a")] == [1, 2]
    assert not list(Path("runs/a/checkpoints").glob("step-*"))
    assert train("run=b", *huge, "save_every=3", "log_every=10") == 70
    assert "step 3: the loss is nan" in capsys.readouterr().err
    assert not list(Path("runs/b/checkpoints").glob("step-*"))


def test_status_is_written_now_and_then(train, monkeypatch):
    """Each writing waits for the disk."""
    from reconverge.run.folder import Run

    status, reasons = Run.status, []

    def counted(run, reason, *rest):
        reasons.append(reason)
        status(run, reason, *rest)

    monkeypatch.setattr(Run, "status", counted)
    arguments = ["steps=6", "log_every=1", "evaluate_every=never", "save_every=0"]
    assert train("run=a", *arguments) == 0
    assert reasons == [
        "running",
        "running",
        "done",
    ]  # at the start, with the checkpoint of the end, at the end
    reasons.clear()
    monkeypatch.setattr(log, "STATUS", 0.0)
    assert train("run=b", *arguments) == 0
    assert reasons == ["running"] * 8 + ["done"]


def test_an_evaluation_waits_once_a_batch_and_a_batch_late(train, monkeypatch, told):
    """Two models, five columns each; 30 images in batches of 7. The hosts talk before each batch."""
    made = []

    def recorded(device):
        made.append(Event(2, told))
        return made[-1]

    monkeypatch.setattr(later, "recorded", recorded)
    assert (
        train("run=a", "steps=2", "log_every=2", "save_every=0", "evaluate_every=2", "evaluate.batch=7") == 0
    )
    assert len(made) == 1 + 5  # the log, and five batches
    batches = "".join("h" if one == "hosts" else "d" for one in told).split("h")[-7:]
    # Asked for nothing while the first batch runs, for one batch while each of the others does, and for the
    # last one after it; then the hosts talk again.
    assert batches == ["ddd", "", "ddd", "ddd", "ddd", "dddddd", ""]
