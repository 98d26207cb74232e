"""The real command line on real images, small."""

import json
from pathlib import Path

from conftest import weights


def test_trains_evaluates_and_leaves_the_folder(train, capsys):
    assert train("steps=12", "run=a", "evaluate_every=6", "save_every=6", "log_every=2") == 0
    folder = Path("runs/a")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "status.json", "classes.txt", "checkpoints", "curves.png", "first_batch.png", "predictions.png"}  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000006", "step-00000012"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 6, 8, 10, 12, 12]
    assert records[-1]["raw_top1"] > 5
    status = json.loads((folder / "status.json").read_text())
    assert status["reason"] == "done"
    assert status["step"] == 12
    assert f"top-1 {max(records[-1]['raw_top1'], records[-1]['ema_top1']):.2f} %" in capsys.readouterr().out.splitlines()[-1]


def test_again_says_finished(train, capsys):
    assert train("steps=2", "run=a") == 0
    before = weights("a")
    capsys.readouterr()
    assert train("steps=2", "run=a") == 0
    assert "a is finished: top-1" in capsys.readouterr().out
    assert train("steps=4", "run=a") == 0  # the cap may grow
    assert weights("a") != before
