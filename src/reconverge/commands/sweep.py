"""python train.py -m seed=0,1,2 ...: each combination a process and a run of its own, one after the other,
and a table of what came out.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from reconverge.base import signals
from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit, Stop
from reconverge.base.launcher import HERE
from reconverge.base.terminal import mean_and_std, say, table
from reconverge.config import compose, rules
from reconverge.config.settings import SCORES, Train
from reconverge.run import reader


class Result(NamedTuple):
    run: str
    arguments: list[str]
    code: int | None  # None: not started, for a signal came before
    scores: dict[str, float]  # of the last evaluation, by kind of weights, percent


def run(overrides: Sequence[str]) -> int:
    """Train every combination, by the command RECONVERGE_LAUNCHER if it is set (launch/local.sh -m sets it),
    else in one process each.

    A failure does not stop the others; a signal does, after the run that it reaches has saved its step. The
    exit code: 0 if every run has it, else that of the first one that has not. Errors: Stop(USAGE), before
    anything is started.
    """
    if HERE.size > 1:
        raise Stop(
            Exit.USAGE,
            f"-m on {HERE.size} ranks by {HERE.launcher}",
            "one process, which starts every run of the sweep as a whole",
            "launch/local.sh -m ... or launch/seeds.sh 0 1 2 -- ... for runs of several ranks each",
        )
    combinations = compose.combinations(overrides)
    configs = [composed(combination) for combination in combinations]
    runs = names(combinations, [cfg.run for cfg in configs])
    own = shlex.split(os.environ.get("RECONVERGE_LAUNCHER", "")) or [sys.executable, str(ROOT / "train.py")]
    results = []
    for number, (name, combination) in enumerate(zip(runs, combinations, strict=True), 1):
        code, scores = None, {}
        if not signals.told_to_stop():
            gap = "\n" if number > 1 else ""
            say(f"{gap}== run {number} of {len(runs)}: {name}  ({varied(combination, combinations)})")
            code = _whole_process([*own, *combination, f"run={name}"], brief=number > 1)
        if code == Exit.DONE:
            evaluated = reader.scores(reader.metrics(reader.RUNS / name))
            scores = evaluated[max(evaluated)] if evaluated else {}
        results.append(Result(name, combination, code, scores))
    scores_of = dict.fromkeys(SCORES[cfg.task][1] for cfg in configs)
    say(f"\n{summary(results, ' or '.join(scores_of))}")
    codes = [Exit.PREEMPTED if result.code is None else result.code for result in results]
    return next((code for code in codes if code != Exit.DONE), Exit.DONE)


def composed(combination: list[str]) -> Train:
    """Its settings. Errors: Stop(USAGE) as train.py would refuse it."""
    cfg = compose.of_training(combination)
    rules.check(cfg)
    return cfg


def names(combinations: Sequence[Sequence[str]], runs: Sequence[str]) -> list[str]:
    """Of each combination the name of its run, made longer by the settings in which it differs from others
    that would have the same.
    """
    named = []
    for combination, run in zip(combinations, runs, strict=True):
        same = [other for other, name in zip(combinations, runs, strict=True) if name == run]
        differing = [values[0] for values in zip(combination, *same, strict=True) if len(set(values)) > 1]
        added = [setting for setting in differing if not setting.startswith("run=")]
        named.append("-".join([run, *(re.sub(r"[^A-Za-z0-9._-]+", "-", setting) for setting in added)]))
    for name in named:
        twins = [shlex.join(twin) for other, twin in zip(named, combinations, strict=True) if other == name]
        if len(twins) > 1:
            raise Stop(
                Exit.USAGE,
                f"run={name} for {' and for '.join(twins)}",
                "a run folder for each combination",
                "each value once",
            )
    return named


def varied(combination: Sequence[str], combinations: Sequence[Sequence[str]]) -> str:
    """Of a combination the settings that are not the same in all."""
    columns = zip(combination, *combinations, strict=True)
    differing = [own for own, *others in columns if len(set(others)) > 1]
    return " ".join(differing) or "one combination"


def _whole_process(command: list[str], brief: bool) -> int:
    """Its exit code. A signal to this process alone is handed on; a terminal's Ctrl-C reaches both. `brief`:
    with a short introduction.
    """
    environment = os.environ | ({"RECONVERGE_BRIEF": "1"} if brief else {})
    process, handed_on = subprocess.Popen(command, env=environment), False
    while True:
        try:
            code = process.wait(timeout=0.5)
            return code if code >= 0 else 128 - code  # as a shell counts what ended by a signal
        except subprocess.TimeoutExpired:
            if signals.told_to_stop() and not handed_on:
                process.send_signal(signal.Signals[signals.told_by()])
                handed_on = True


def summary(results: Sequence[Result], score: str) -> str:
    """A row a run, with its `score` (top-1 or mIoU); after runs that differ only in the seed, their mean and
    (sample) standard deviation.
    """
    rows: list[list[str]] = []
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        same = tuple(setting for setting in result.arguments if not setting.startswith("seed="))
        groups.setdefault(same, []).append(result)
    for group in groups.values():
        for run, _, code, scores in group:
            cells = [mean_and_std([scores.get(kind)]) for kind in ("raw", "ema")]
            rows.append([run, "not started" if code is None else str(int(code)), *cells])
        finished = [result.scores for result in group if result.scores]
        if len(finished) > 1:
            cells = [mean_and_std([scores.get(kind) for scores in finished]) for kind in ("raw", "ema")]
            rows.append([f"mean ± std of {len(finished)}", "", *cells])
    return table(["run", "exit", f"raw {score}", f"EMA {score}"], rows)
