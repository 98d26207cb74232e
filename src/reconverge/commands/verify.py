"""Train some steps of a run again, from its start or from a kept checkpoint, and compare. Each step's images,
loss and gradient norm are compared with the run's record.jsonl, and the weights with its checkpoints, by
hash. The run's folder is only read. Start the command in the folder where the run was started.

Exit codes: 0 the same, 1 different, 78 not comparable (code, versions, hardware, threads, ranks or data have
changed).
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.commands import processes
from reconverge.config import compose
from reconverge.config.settings import Data, Train
from reconverge.run import reader
from reconverge.run.folder import differing
from reconverge.run.reader import Opened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="number of steps to train again (default: 20)"
    )
    parser.add_argument(
        "--from",
        type=int,
        default=0,
        metavar="STEP",
        dest="start",
        help="start after this step, which needs a kept checkpoint (default: 0, the start of the run)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="R",
        help="number of ranks (default: as recorded; with reduce=tree any power of two gives the same bits)",
    )
    parser.add_argument(
        "--allow-env",
        action="store_true",
        help="compare even if code, versions, hardware or data differ",
    )


class Window(NamedTuple):
    """Steps start+1..end; those in `kept` have a checkpoint."""

    start: int
    end: int
    kept: list[int]


def main(arguments: argparse.Namespace) -> int:
    run = reader.opened(arguments.run.resolve())
    recorded = reader.environment(run.folder)
    window = _window(run.folder, arguments.start, arguments.steps)
    refused = _refused(run.cfg, recorded, window)
    if refused and not arguments.allow_env:
        raise refused
    if refused:
        say(f"comparing because of --allow-env, although: {refused.args[1]}")
    facts = recorded["facts"]
    ranks = arguments.ranks or (
        facts["ranks"] if isinstance(facts["ranks"], int) else recorded["starts"][-1]["ranks"]
    )

    reader.RUNS.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".verify-{run.folder.name}-", dir=reader.RUNS))
    keep = False
    try:
        cfg = _prepare(scratch, run, window.start, facts["threads"])
        found = _trained_again(
            scratch,
            cfg,
            run.folder,
            window,
            ranks,
            lambda: _same_environment(scratch, facts, arguments.allow_env),
        )
        keep = bool(found)
    finally:
        if not keep:
            shutil.rmtree(scratch)
            with suppress(OSError):  # it has runs
                reader.RUNS.rmdir()
    name = arguments.run
    if found:
        say("\n".join([f"{name}: training again gave a different result ({scratch} is kept):", *found]))
        return Exit.BUG
    kept = (
        f"; the hashes of the checkpoints of steps {', '.join(map(str, window.kept))} are equal too"
        if window.kept
        else ""
    )
    say(
        f"{name}: training steps {window.start + 1} to {window.end} again gave the same images, losses and"
        f" gradient norms, bit for bit{kept}"
    )
    return Exit.DONE


def _window(folder: Path, start: int, steps: int) -> Window:
    """Errors: Stop(USAGE, MISSING, DAMAGED) if there is nothing to compare with, or to start from."""
    from reconverge.run import checkpoint

    lines = reader.record(folder)
    if not lines:
        raise Stop(
            Exit.MISSING,
            f"{folder} has not recorded any step",
            "a run with at least one step in record.jsonl",
            "name another run, or train this one first",
        )
    whole = [path for path in reader.checkpoints(folder / "checkpoints") if (path / "MANIFEST.json").exists()]
    kept = [reader.step_of(path) for path in whole]
    last = lines[-1]["step"]
    starts = [0, *(step for step in kept if step < last)]
    if start not in starts or steps < 1:
        nearest = min(starts, key=lambda step: abs(step - start))
        raise Stop(
            Exit.USAGE,
            f"--from {start} --steps {steps}, in a run with {last} recorded steps",
            f"--steps 1 or more, and --from one of these: {', '.join(map(str, starts))}",
            f"--from {nearest} --steps {max(1, min(steps, last - nearest))}",
        )
    if start and (fault := checkpoint.verify(_checkpoint(folder, start))):
        raise Stop(
            Exit.DAMAGED,
            f"{_checkpoint(folder, start)}: {fault}",
            "a checkpoint without damage",
            "choose another --from",
        )
    end = min(start + steps, last)
    window = Window(start, end, [step for step in kept if start < step <= end])
    if not window.kept:
        later = next((step for step in kept if step > end), None)
        advice = f"; --steps {later - start} would include the next checkpoint" if later else ""
        say(f"steps {start + 1} to {end} have no kept checkpoint, so only their records are compared{advice}")
    return window


def _refused(cfg: Train, recorded: dict[str, Any], window: Window) -> Stop | None:
    """Why these steps cannot be repeated, by the run's own settings and records; None if they can."""
    if not cfg.deterministic:
        return Stop(
            Exit.NOT_COMPARABLE,
            "a run with deterministic=false, which is not bit-reproducible",
            "a run with deterministic=true",
            "add --allow-env to compare anyway; a difference is then possible",
        )
    if not recorded["lost"]:
        return None
    lost = recorded["lost"][-1]
    since = next((start["after_step"] for start in recorded["starts"] if start["time"] >= lost["time"]), 0)
    if window.start >= since:
        return None
    return Stop(
        Exit.NOT_COMPARABLE,
        f"--from {window.start}; but after step {since} the run continued with another {lost['because']}"
        f" ({lost['from']} -> {lost['to']})",
        f"steps after step {since}, which were trained in the run's present environment",
        f"choose --from {since} or a later checkpoint; or add --allow-env to compare anyway",
    )


def _prepare(scratch: Path, run: Opened, start: int, threads: int) -> Train:
    """Make `scratch` a run folder that train.py resumes after step `start`; returns its configuration."""
    tracker, debug = replace(run.cfg.tracker, name="none"), replace(run.cfg.debug, profile=0)
    data = replace(run.cfg.data, cache=Data.cache)  # a run of somebody names no folder to write to
    cfg = replace(run.cfg, run=scratch.name, threads=threads, resume_allow=[], tracker=tracker, debug=debug)
    cfg = replace(cfg, data=data)
    cfg = replace(cfg, save_every="0", evaluate_every="never", keep=10**6)
    (scratch / "train.py").symlink_to(processes.script())
    if start:
        (scratch / "checkpoints").mkdir()
        shutil.copytree(_checkpoint(run.folder, start), _checkpoint(scratch, start))
        (scratch / "config.yaml").write_text(compose.to_text(cfg))
        (scratch / "environment.json").write_text(json.dumps({"facts": {}, "lost": [], "starts": []}))
    return cfg


def _trained_again(
    scratch: Path, cfg: Train, folder: Path, window: Window, ranks: int, same_environment: Callable[[], bool]
) -> list[str]:
    """Train up to each kept checkpoint in turn. Returns the first differences, or an empty list."""
    from reconverge.run import first_difference

    say(f"training steps {window.start + 1} to {window.end} again, on {ranks} rank{'s' * (ranks > 1)}")
    done, asked = window.start, False
    for step in sorted({*window.kept, window.end}):
        compose.write_conf(scratch / "conf", replace(cfg, steps=step))
        with processes.started(processes.command(scratch / "train.py", ranks), scratch / "words.txt") as job:
            while job.poll() is None:
                time.sleep(0.1)
                asked = asked or same_environment()
        asked or same_environment()
        if job.returncode and not _reached(scratch, step):
            raise _failed(scratch, job.returncode)
        found = [first_difference.records(folder, scratch, done + 1, step)]
        if step in window.kept and _checkpoint(scratch, step).exists():
            found.append(first_difference.checkpoints(_checkpoint(folder, step), _checkpoint(scratch, step)))
        if any(found):
            return [line for line in found if line]
        done = step
    return []


def _same_environment(scratch: Path, before: dict[str, Any], allowed: bool) -> bool:
    """Whether the job in `scratch` has written its environment yet.

    Errors: Stop(NOT_COMPARABLE) if that environment differs from the run's, unless `allowed`.
    """
    there = (scratch / "environment.json").exists()
    now = reader.environment(scratch)["facts"] if there else {}
    if not now:
        return False
    changed = [name for name in before if name in now and before[name] != now[name]]
    others = [(name, *differing(before[name], now[name])) for name in changed]
    text = "; ".join(f"{name}: the run had {old}, here it is {new}" for name, old, new in others)
    if others and not allowed:
        raise Stop(
            Exit.NOT_COMPARABLE,
            text,
            "the environment of the run; a different one may give different bits",
            "restore that environment; or add --allow-env to compare anyway",
        )
    if others:
        say(f"comparing because of --allow-env, although the environment differs: {text}")
    return True


def _reached(scratch: Path, step: int) -> bool:
    """Whether a failed job has recorded `step`. If the run ended because of a non-finite loss, so does the
    repetition.
    """
    return any(line["step"] == step for line in reader.record(scratch))


def _failed(scratch: Path, code: int) -> Stop:
    """The Stop of a job that failed; this is not a difference between runs.

    The exit code comes from status.json, because torchrun returns 1 for every failure.
    """
    if (scratch / "status.json").exists() and (status := reader.status(scratch))["reason"] == "failed":
        code = status["exit_code"]
    known = Exit(code) if code in set(Exit) - {Exit.BUG} else Exit.NOT_COMPARABLE
    return Stop(
        known,
        f"the steps could not be trained again (exit {code}):\n{processes.last_words(scratch / 'words.txt')}",
        "a machine that can train these steps",
        "follow the message above",
    )


def _checkpoint(folder: Path, step: int) -> Path:
    return reader.checkpoint_of(folder.resolve() / "checkpoints", step)
