"""Train some steps of a run again, from its start or from a kept checkpoint, and compare: each step's images,
loss and gradient norm with the run's record, and the weights with its checkpoints, hash by hash. The run's
folder is only read. To be started in the folder where the run was.

Exit codes: 0 the same, 1 different, 78 not comparable (another code, versions, hardware, threads, ranks or
data).
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.commands import processes
from reconverge.config import compose
from reconverge.config.settings import Train
from reconverge.run import reader
from reconverge.run.folder import differing
from reconverge.run.reader import Opened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="to train again (default: 20)")
    parser.add_argument(
        "--from",
        type=int,
        default=0,
        metavar="STEP",
        dest="start",
        help="of a kept checkpoint (default: 0, the run's start)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="R",
        help="processes (default: as recorded; with reduce=tree any give the same bits)",
    )
    parser.add_argument(
        "--allow-env",
        action="store_true",
        help="compare all the same where code, versions, hardware or data differ",
    )


class Window(NamedTuple):
    """Steps start+1..end, of which `kept` have a checkpoint."""

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
        say(f"compared all the same: {refused.args[1]}")
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
    name = arguments.run
    if found:
        say("\n".join([f"{name} is not what its steps give again ({scratch} is kept):", *found]))
        return Exit.BUG
    kept = (
        f"; the checkpoints after steps {', '.join(map(str, window.kept))} too, hash by hash"
        if window.kept
        else ""
    )
    say(
        f"{name}: steps {window.start + 1} to {window.end} gave the same images, losses and gradient norms"
        f" again, bit for bit{kept}"
    )
    return Exit.DONE


def _window(folder: Path, start: int, steps: int) -> Window:
    """Errors: Stop(USAGE, MISSING, DAMAGED) where there is nothing to compare with, or to start from."""
    from reconverge.run import checkpoint

    lines = reader.record(folder)
    if not lines:
        raise Stop(Exit.MISSING, f"{folder} has recorded no step", "a run with a record.jsonl", "another run")
    whole = [path for path in reader.checkpoints(folder / "checkpoints") if (path / "MANIFEST.json").exists()]
    kept = [reader.step_of(path) for path in whole]
    last = lines[-1]["step"]
    starts = [0, *(step for step in kept if step < last)]
    if start not in starts or steps < 1:
        nearest = min(starts, key=lambda step: abs(step - start))
        raise Stop(
            Exit.USAGE,
            f"--from {start} --steps {steps} of {last} recorded steps",
            f"one or more steps, from one of these: {', '.join(map(str, starts))}",
            f"--from {nearest} --steps {max(1, min(steps, last - nearest))}",
        )
    if start and (fault := checkpoint.verify(_checkpoint(folder, start))):
        raise Stop(
            Exit.DAMAGED,
            f"{_checkpoint(folder, start)}: {fault}",
            "a checkpoint that verifies",
            "another --from",
        )
    end = min(start + steps, last)
    window = Window(start, end, [step for step in kept if start < step <= end])
    if not window.kept:
        later = next((step for step in kept if step > end), None)
        advice = f"; --steps {later - start} reaches the next" if later else ""
        say(f"no kept checkpoint among steps {start + 1} to {end}: only their records are compared{advice}")
    return window


def _refused(cfg: Train, recorded: dict[str, Any], window: Window) -> Stop | None:
    """Why these steps of the run cannot be had again, as it says itself."""
    if not cfg.deterministic:
        return Stop(
            Exit.NOT_COMPARABLE,
            "deterministic=false",
            "a run that promises R1",
            "--allow-env tries all the same, and may find a difference",
        )
    if not recorded["lost"]:
        return None
    lost = recorded["lost"][-1]
    since = next((start["after_step"] for start in recorded["starts"] if start["time"] >= lost["time"]), 0)
    if window.start >= since:
        return None
    return Stop(
        Exit.NOT_COMPARABLE,
        f"steps from {window.start} on: after step {since} the run went on with another {lost['because']}"
        f" ({lost['from']} -> {lost['to']})",
        "steps that were trained as the last ones were",
        f"--from a checkpoint at or after step {since}; --allow-env tries all the same",
    )


def _prepare(scratch: Path, run: Opened, start: int, threads: int) -> Train:
    """A run's folder that train.py resumes after step `start`, and the configuration that it is to have."""
    tracker, debug = replace(run.cfg.tracker, name="none"), replace(run.cfg.debug, profile=0)
    cfg = replace(run.cfg, run=scratch.name, threads=threads, resume_allow=[], tracker=tracker, debug=debug)
    cfg = replace(cfg, save_every="0", evaluate_every="never", keep=10**6)
    (scratch / "train.py").symlink_to(processes.script())
    if start:
        (scratch / "checkpoints").mkdir()
        _checkpoint(scratch, start).symlink_to(_checkpoint(run.folder, start))
        (scratch / "config.yaml").write_text(compose.to_text(cfg))
        (scratch / "environment.json").write_text(json.dumps({"facts": {}, "lost": [], "starts": []}))
    return cfg


def _trained_again(
    scratch: Path, cfg: Train, folder: Path, window: Window, ranks: int, same_environment: Callable[[], bool]
) -> list[str]:
    """Train up to each kept checkpoint in turn; what differs there, and no further."""
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
    """Whether the job in `scratch` has told what it runs on.

    Errors: Stop(NOT_COMPARABLE) if that is not what the run had, unless `allowed`.
    """
    there = (scratch / "environment.json").exists()
    now = reader.environment(scratch)["facts"] if there else {}
    if not now:
        return False
    changed = [name for name in before if name in now and before[name] != now[name]]
    others = [(name, *differing(before[name], now[name])) for name in changed]
    text = "; ".join(f"{name}: the run had {old}, and here it is {new}" for name, old, new in others)
    if others and not allowed:
        raise Stop(
            Exit.NOT_COMPARABLE,
            text,
            "what the run had: anything else may give other bits, and R5 alone is promised",
            "that back; or --allow-env to try all the same",
        )
    if others:
        say(f"not as it was, and compared all the same: {text}")
    return True


def _reached(scratch: Path, step: int) -> bool:
    """Whether a job that failed has recorded `step`: a run that ended for want of finite numbers does so
    again.
    """
    return any(line["step"] == step for line in reader.record(scratch))


def _failed(scratch: Path, code: int) -> Stop:
    """A job's own reason, of which torchrun makes a 1; that is no difference between runs."""
    if (scratch / "status.json").exists() and (status := reader.status(scratch))["reason"] == "failed":
        code = status["exit_code"]
    known = Exit(code) if code in set(Exit) - {Exit.BUG} else Exit.NOT_COMPARABLE
    return Stop(
        known,
        f"the steps could not be trained again (exit {code}):\n{processes.last_words(scratch / 'words.txt')}",
        "a machine that can train them",
        "what it says",
    )


def _checkpoint(folder: Path, step: int) -> Path:
    return reader.checkpoint_of(folder.resolve() / "checkpoints", step)
