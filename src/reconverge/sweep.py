"""python train.py -m seed=0,1,2 ...: each combination a process and a run of its own, one after the other,
and a table of what came out.
"""

import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from reconverge import checks, config, jsonl, ranks, signals
from reconverge.environment import ROOT
from reconverge.errors import Exit, Stop
from reconverge.progress import say
from reconverge.run import RUNS


class Result(NamedTuple):
    run: str
    arguments: list[str]
    code: int | None  # None: not started, for a signal came before
    top1: dict[str, float]  # of the last evaluation, by kind of weights, percent


def took(*flags: str) -> bool:
    """Whether one of them is on the command line, from which it is taken."""
    given = [argument for argument in sys.argv[1:] if argument in flags]
    sys.argv = [argument for argument in sys.argv if argument not in flags]
    return bool(given)


def run(arguments: list[str]) -> int:
    """Train every combination, by the command RECONVERGE_LAUNCHER if it is set (launch/local.sh -m sets it),
    else in one process each.

    A failure does not stop the others; a signal does, after the run that it reaches has saved its step. The
    exit code: 0 if every run has it, else that of the first one that has not. Errors: Stop(USAGE), before
    anything is started.
    """
    if ranks.HERE.size > 1:
        raise Stop(
            Exit.USAGE,
            f"-m on {ranks.HERE.size} ranks by {ranks.HERE.launcher}",
            "one process, which starts every run of the sweep as a whole",
            "launch/local.sh -m ... or launch/seeds.sh 0 1 2 -- ... for runs of several ranks each",
        )
    combinations = config.combinations(arguments)
    runs = names(combinations, [composed(combination) for combination in combinations])
    launcher = shlex.split(os.environ.get("RECONVERGE_LAUNCHER", "")) or [
        sys.executable,
        str(ROOT / "train.py"),
    ]
    results = []
    for number, (name, combination) in enumerate(zip(runs, combinations, strict=True), 1):
        code = None
        if not signals.told_to_stop():
            say(f"== run {number} of {len(runs)}: {name}")
            code = _whole_process([*launcher, *combination, f"run={name}"])
        results.append(Result(name, combination, code, _top1(RUNS / name) if code == Exit.DONE else {}))
    say(table(results))
    return next(
        (
            Exit.PREEMPTED if result.code is None else result.code
            for result in results
            if result.code != Exit.DONE
        ),
        Exit.DONE,
    )


def composed(combination: list[str]) -> str:
    """The name of its run. Errors: Stop(USAGE) as train.py would refuse it."""
    cfg = config.of_training(combination)
    checks.check(cfg)
    return cfg.run


def names(combinations: Sequence[Sequence[str]], runs: Sequence[str]) -> list[str]:
    """Of each combination the name of its run, made longer by the settings in which it differs from others
    that would have the same.
    """
    named = []
    for combination, run in zip(combinations, runs, strict=True):
        same = [other for other, name in zip(combinations, runs, strict=True) if name == run]
        differing = [values[0] for values in zip(combination, *same, strict=True) if len(set(values)) > 1]
        named.append(
            "-".join(
                [
                    run,
                    *(
                        re.sub(r"[^A-Za-z0-9._-]+", "-", setting)
                        for setting in differing
                        if not setting.startswith("run=")
                    ),
                ]
            )
        )
    for name in named:
        twins = [
            shlex.join(combination)
            for other, combination in zip(named, combinations, strict=True)
            if other == name
        ]
        if len(twins) > 1:
            raise Stop(
                Exit.USAGE,
                f"run={name} for {' and for '.join(twins)}",
                "a run folder for each combination",
                "each value once",
            )
    return named


def _whole_process(command: list[str]) -> int:
    """Its exit code. A signal to this process alone is handed on; a terminal's Ctrl-C reaches both."""
    process, handed_on = subprocess.Popen(command), False
    while True:
        try:
            code = process.wait(timeout=0.5)
            return code if code >= 0 else 128 - code  # as a shell counts what ended by a signal
        except subprocess.TimeoutExpired:
            if signals.told_to_stop() and not handed_on:
                process.send_signal(signal.Signals[signals.told_by()])
                handed_on = True


def _top1(folder: Path) -> dict[str, float]:
    records = [record for record in jsonl.lines(folder / "metrics.jsonl") if "raw_top1" in record]
    return (
        {kind: records[-1][f"{kind}_top1"] for kind in ("raw", "ema") if f"{kind}_top1" in records[-1]}
        if records
        else {}
    )


def table(results: Sequence[Result]) -> str:
    """A row a run; after runs that differ only in the seed, their mean and (sample) standard deviation."""
    width = max(len("mean ± std of 9"), *(len(result.run) for result in results)) + 2
    rows = [f"{'run':<{width}}exit   raw top-1    EMA top-1"]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(
            tuple(setting for setting in result.arguments if not setting.startswith("seed=")), []
        ).append(result)
    for group in groups.values():
        for run, _, code, top1 in group:
            rows.append(
                f"{run:<{width}}{'-' if code is None else code:>4}"
                + "".join(f"{percent([top1.get(kind)]):>13}" for kind in ("raw", "ema"))
            )
        finished = [result.top1 for result in group if result.top1]
        if len(finished) > 1:
            said = f"{'mean ± std of ' + str(len(finished)):<{width}}    "
            rows.append(
                said
                + "".join(f"{percent([top1.get(kind) for top1 in finished]):>13}" for kind in ("raw", "ema"))
            )
    return "\n".join(rows)


def percent(values: Sequence[float | None]) -> str:
    """The mean, and of more than one value ± the sample standard deviation; of those that are known and
    finite.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")
