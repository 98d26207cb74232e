"""python train.py -m: what it starts, and what it says at the end."""

import json
import re
from pathlib import Path

import pytest
from conftest import weights

from reconverge.base import launcher
from reconverge.base.errors import Exit, Stop
from reconverge.commands import sweep
from reconverge.config import compose


def test_combinations_are_read_in_hydras_grammar():
    assert compose.combinations(
        ["seed=range(0,3)", "model=a,roadmap/b", "data.root='x,y'", "resume_allow=[a,b]"]
    ) == [
        [f"seed={seed}", f"model={model}", "data.root='x,y'", "resume_allow=[a,b]"]
        for seed in range(3)
        for model in ("a", "roadmap/b")
    ]
    assert compose.combinations(["seed=1"]) == [["seed=1"]]


def test_runs_that_would_share_a_folder_are_named_by_what_differs():
    combinations = compose.combinations(["seed=0,1", "optim.lr=1e-3,2e-3", "epochs=5"])
    assert sweep.names(combinations, ["a-s0", "a-s0", "a-s1", "a-s1"]) == [
        "a-s0-optim.lr-0.001", "a-s0-optim.lr-0.002", "a-s1-optim.lr-0.001", "a-s1-optim.lr-0.002",
    ]  # fmt: skip
    assert sweep.names(combinations, ["a"] * 4)[1] == "a-seed-0-optim.lr-0.002"
    assert sweep.names(combinations, list("abcd")) == list("abcd")
    assert sweep.names([["model=roadmap/00_resnet50"], ["model=vit_s"]], ["x", "x"]) == [
        "x-model-roadmap-00_resnet50",
        "x-model-vit_s",
    ]
    with pytest.raises(Stop, match="for model=a/b and for model=a-b"):
        sweep.names([["model=a/b"], ["model=a-b"]], ["x", "x"])


def test_the_table_has_mean_and_deviation_of_what_only_the_seed_tells_apart():
    results = [
        sweep.Result("a", ["lr=1", "seed=0"], 0, {"raw": 80.0, "ema": 81.0}),
        sweep.Result("b", ["lr=1", "seed=1"], 0, {"raw": 82.0, "ema": 82.5}),
        sweep.Result("c", ["lr=1", "seed=2"], 70, {}),
        sweep.Result("d", ["lr=2", "seed=0"], 0, {"raw": 10.0}),
        sweep.Result("e", ["lr=2", "seed=1"], None, {}),
    ]
    header, *rows = [row.split() for row in sweep.summary(results, "top-1").splitlines()]
    assert header[:2] == ["run", "exit"]
    assert rows == [
        ["a", "0", "80.00", "81.00"],
        ["b", "0", "82.00", "82.50"],
        ["c", "70", "-", "-"],
        ["mean", "±", "std", "of", "2", "81.00", "±", "1.41", "81.75", "±", "1.06"],
        ["d", "0", "10.00", "-"],
        ["e", "not", "started", "-", "-"],
    ]


def test_a_table_of_runs_without_ema_has_no_column_for_it():
    results = [
        sweep.Result("a", ["seed=0"], 0, {"raw": 80.0}),
        sweep.Result("b", ["seed=1"], 0, {"raw": 82.0}),
    ]
    assert "EMA" not in sweep.summary(results, "top-1")
    assert "raw top-1" in sweep.summary(results, "top-1")


def test_what_is_varied_is_named():
    combinations = compose.combinations(["seed=0,1", "optim.lr=1e-3,2e-3", "epochs=5"])
    assert [sweep.varied(combination, combinations) for combination in combinations] == [
        "seed=0 optim.lr=0.001", "seed=0 optim.lr=0.002", "seed=1 optim.lr=0.001", "seed=1 optim.lr=0.002",
    ]  # fmt: skip


def test_ranks_do_not_sweep(monkeypatch, train, capsys):
    monkeypatch.setattr(sweep, "HERE", launcher.Place(0, 2, 0, 2, "torchrun"))
    assert train("-m", "seed=0,1") == 2
    assert "launch/seeds.sh" in capsys.readouterr().err


def test_nothing_starts_after_a_signal(monkeypatch, train, capfd, digits):
    from reconverge.base import signals

    monkeypatch.setattr(signals, "told_to_stop", lambda: True)
    assert train("-m", "seed=0,1") == Exit.PREEMPTED
    assert not Path("runs").exists()
    assert f"test_convnext-demo-{digits.name}-s1  not started\n" in capfd.readouterr().out


def test_a_sweep_goes_on_after_a_failure(train, digits, capfd, forking):
    """Whole processes: the second run is what the same command alone gives; it introduces itself in short."""
    arguments = ["steps=2", "optim.warmup_epochs=0", "evaluate_every=0"]
    assert train("-m", *arguments, f"data.root=nowhere,{digits}", "run=a") == Exit.MISSING
    said = capfd.readouterr().out
    rows = [line.split() for line in said[said.rindex("\nrun ") :].splitlines()[2:]]
    runs = ["a-data.root-nowhere", re.sub("[^A-Za-z0-9._-]+", "-", f"a-data.root={digits}")]
    assert [row[:2] for row in rows] == [[runs[0], "66"], [runs[1], "0"]]
    assert f"== run 2 of 2: {runs[1]}  (data.root={digits})\nrun " in said
    assert "promises" not in said
    last = json.loads((Path("runs") / runs[1] / "metrics.jsonl").read_text().splitlines()[-1])
    assert rows[-1][2:] == [f"{last['raw_top1']:.2f}", f"{last['ema_top1']:.2f}"]
    assert train(*arguments, "run=alone") == 0
    assert weights("alone") == weights(runs[1])
