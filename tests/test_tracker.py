"""Trackers mirror metrics.jsonl from a process of their own."""

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from reconverge.config.settings import Tracker
from reconverge.run import tracker

EVALUATED = ["log_every=1", "evaluate_every=0"]


def scalars(folder):
    """What a reader of event files sees: {tag: {step: value}}."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, {}).setdefault(event.step, []).append(value.simple_value)
    return found


def test_tensorboard_mirrors_every_number_once_through_a_resume(train):
    assert (
        train("run=a", "steps=4", "log_every=1", "tracker=tensorboard", "evaluate_every=2", "save_every=2")
        == 0
    )
    assert (
        train("run=a", "steps=6", "log_every=1", "tracker=tensorboard", "evaluate_every=2", "save_every=2")
        == 0
    )
    records = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    found = scalars(Path("runs/a/tensorboard"))
    expected = {}
    for record in records:
        for key, value in record.items():
            if key != "step":
                expected.setdefault(key, {})[record["step"]] = value
    assert {key: sorted(steps) for key, steps in found.items()} == {
        key: sorted(steps) for key, steps in expected.items()
    }
    for key, steps in found.items():
        for step, values in steps.items():
            assert len(values) == 1
            assert abs(values[0] - expected[key][step]) <= 1e-5 * max(1, abs(expected[key][step]))


def test_wandb_offline_without_a_key(train, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert train("run=a", "steps=3", *EVALUATED, "tracker=wandb", "tracker.project=my-project") == 0
    assert (
        "wandb records offline, no login was found (wandb login); wandb sync runs/a/wandb/offline-* uploads"
        in capsys.readouterr().out
    )
    assert (Path("runs/a") / "tracker.log").exists()
    (stored,) = Path("runs/a/wandb").glob("offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    for part in (b"my-project", b"raw_top1", b"images_per_second", b"test_convnext"):
        assert part in content
    assert json.loads(Path("runs/a/tracker-wandb.json").read_text()) == {"step": 3, "records": 2}


def test_settings_of_wandb_in_the_working_folder_and_in_a_run_are_not_read(train, monkeypatch):
    """They name the server that gets the key of whoever trains, and the account that gets the run."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert train("run=a", "steps=1", "log_every=1") == 0
    for folder in (Path("wandb"), Path("runs/a/wandb"), Path(".wandb"), Path("runs/a/.wandb")):
        folder.mkdir()
        (folder / "settings").write_text("[default]\nentity = planted-account\nrun_notes = planted-account\n")
    assert train("run=a", "steps=2", *EVALUATED, "tracker=wandb") == 0
    (stored,) = Path("runs/a").rglob("offline-run-*/run-*.wandb")
    assert b"test_convnext" in stored.read_bytes()
    assert b"planted-account" not in stored.read_bytes()
    assert "Loading settings" not in Path("runs/a/tracker.log").read_text()


@pytest.mark.slow
def test_a_dead_server_neither_delays_nor_breaks_the_run(start):
    """A key, but nobody who answers: the steps do not wait, the end waits a bounded time, and the record goes
    offline.
    """
    dead = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    process = start("run=a", "steps=4", *EVALUATED, "tracker=wandb", **dead)
    assert process.wait(120) == 0
    status = json.loads(Path("runs/a/status.json").read_text())
    assert status["reason"] == "done"
    began = json.loads(Path("runs/a/environment.json").read_text())["starts"][0]["time"]
    assert (
        datetime.fromisoformat(status["time"]) - datetime.fromisoformat(began)
    ).total_seconds() < 60  # seconds of work; wandb itself would wait for minutes
    for _ in range(100):  # the mirror goes on by itself
        if list(Path("runs/a/wandb").glob("offline-run-*")):
            break
        time.sleep(1)
    assert "going on offline" in Path("runs/a/tracker.log").read_text()


def test_wandb_that_could_not_go_online_is_told_at_the_end(tmp_path, monkeypatch):
    """By the line of this start alone: tracker.log keeps those of earlier ones."""
    (tmp_path / "tracker.log").write_text("wandb online failed (before); going on offline: ...\n")
    words = (
        "wandb online failed (no network); going on offline: wandb sync a/wandb/offline-* uploads it later"
    )

    def closing(*lines):
        code = f"import sys; sys.stdin.read(); print({chr(10).join(lines)!r})"
        monkeypatch.setattr(tracker, "COMMAND", ("-c", code))
        return tracker.Tracker(Tracker("wandb"), tmp_path).close()

    assert closing("wandb: hello", words) == words
    assert closing("wandb: hello") is None


def test_how_to_look_at_tensorboard_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    folder = tmp_path / "runs" / "a"
    assert tracker._viewer_note(folder) == (
        f"to see the curves in TensorBoard: pip install tensorboard; tensorboard --logdir {tmp_path / 'runs'}"
    )
    monkeypatch.setattr(tracker, "find_spec", lambda name: True)
    assert "pip install" not in tracker._viewer_note(folder)


def test_a_mirror_that_fails_is_told(train, capsys, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "tensorboard").write_text("a file where the folder should be")
    assert train("run=a", "steps=2", "tracker=tensorboard") == 0
    assert (
        "the tracker failed with exit code 1, see tracker.log; metrics.jsonl is complete"
        in capsys.readouterr().out
    )


def test_the_mirror_ends_when_its_run_is_killed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    mirror = subprocess.Popen(
        [sys.executable, "-m", "reconverge.run.tracker", "tensorboard", "p", str(tmp_path)],
        stdin=subprocess.PIPE,
    )
    mirror.stdin.close()  # as the end of the training process closes it
    assert mirror.wait(180) == 0
    assert scalars(tmp_path / "tensorboard") == {"loss": {1: [2.0]}}
