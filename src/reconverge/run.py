"""A run's folder, and everything that is written while it trains. Imports no torch.

runs/<name>/ holds config.yaml, environment.json, classes.txt, metrics.jsonl, record.jsonl, status.json,
pictures, checkpoints/ and, while a process trains, its lock. Rank 0 writes them; other ranks write nothing
but, when they fail, errors/rank-N.txt.
"""

import json
import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import reconverge
from reconverge import config, environment, jsonl, ranks
from reconverge.clock import Clock
from reconverge.data import files
from reconverge.errors import Exit, Stop, explain
from reconverge.lock import Lock
from reconverge.progress import Progress, say
from reconverge.settings import Train
from reconverge.signals import told_by
from reconverge.tracker import Tracker

if TYPE_CHECKING:  # they import torch
    from reconverge.data.loader import Feed
    from reconverge.record import Pending, Step
    from reconverge.world import World

RUNS = Path("runs")
ADVICE = (
    "More workers= helps while cores are free; then the native decoder (environment.json says what decodes),"
    " data.decode=fast, a smaller copy (reconverge prepare --resize), or data.window= with data.stage= where"
    " the disk is slow. `reconverge bench data` measures where the time goes."
)
OVERFLOWS = 30  # steps in a row that fp16 may skip while its loss scale settles


class Run:
    """Used as a context: whatever ends the training is written to status.json, and the lock is given back."""

    def __init__(self, cfg: Train):
        """Errors: Stop(IN_USE, NOT_COMPARABLE)."""
        self.folder = RUNS / cfg.run
        self.checkpoints = self.folder / "checkpoints"
        self.writes = ranks.HERE.rank == 0
        self.step = 0
        self.samples_of: Callable[[int], Any] = lambda step: None  # sample ids of a step, for a message
        self._cfg = cfg
        self._lock: Lock | None = None
        self._pending: list[Pending] = []
        self.closing = ExitStack()  # what is to be ended with the run, however it ends
        self._top1: dict[int, dict[str, float]] = {}  # of each evaluation, by step: raw and EMA, percent
        self._intervals = 0
        self._in_a_row = 0  # steps whose gradient was not finite
        self._clock: Clock | None = None
        self._metrics: TextIO | None = None
        self._record: TextIO | None = None
        self._progress: Progress | None = None
        self._tracker: Tracker | None = None
        try:
            self.resuming, self._environment = ranks.from_rank_0(self._open)
        except BaseException:
            if self._lock:
                self._lock.release()
            raise

    def _open(self) -> tuple[bool, dict[str, Any]]:
        """Whether the run goes on, and what its environment.json says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / "lock")
        if self._lock.takeover:
            say(self._lock.takeover)
        new: dict[str, Any] = {"facts": {}, "lost": [], "starts": []}
        path = self.folder / "environment.json"
        if not any(
            self.checkpoints.glob("step-*")
        ):  # nothing to compare with; starts that came to no checkpoint stay on record
            return False, new | {"starts": json.loads(path.read_text())["starts"]} if path.exists() else new
        try:
            recorded = json.loads(path.read_text())
            before = config.from_text((self.folder / "config.yaml").read_text(), Train)
        except (FileNotFoundError, ValueError) as error:
            raise Stop(
                Exit.DAMAGED,
                f"{self.folder} has checkpoints, but: {error}",
                "a run whose config.yaml and environment.json can be read",
                "restore the file, or run=NAME for a new run",
            ) from error
        self._settle(config.differences(before, self._cfg), recorded)
        return True, recorded

    def finished(self) -> str | None:
        """The last line of a run that has nothing left to do."""
        return ranks.from_rank_0(self._finished)

    def _finished(self) -> str | None:
        if not self.resuming or not (self.folder / "status.json").exists():
            return None
        status = json.loads((self.folder / "status.json").read_text())
        over = status["reason"] == "done" and status["step"] >= min(
            status["total"], self._cfg.steps or status["total"]
        )
        return status["summary"] if over else None

    def fact(self, name: str, value: Any, free: bool = False) -> None:
        """Something that the bits hang on, the same on every rank. `free`: it may change, which only ends R2.

        Errors: Stop(NOT_COMPARABLE) if the run began with another value and may not go on with this.
        """
        before = self._environment["facts"].get(name)
        if self.resuming and before is not None and before != value:
            allowed = [name] if free else self._cfg.resume_allow
            ranks.from_rank_0(lambda: self._settle([(name, before, value)], self._environment, allowed))
        self._environment["facts"][name] = value

    def recorded(self, name: str) -> Any:
        """A fact of the first start; None for a new run."""
        return self._environment["facts"].get(name)

    def _settle(
        self,
        differences: list[tuple[str, Any, Any]],
        recorded: dict[str, Any],
        allowed: Sequence[str] | None = None,
    ) -> None:
        """Refuse what differs from the first start (name, value then, value now), or note which promise is
        lost if all of it is allowed.
        """
        differences = [(name, *differing(old, new)) for name, old, new in differences]
        allowed = self._cfg.resume_allow if allowed is None else allowed
        refused = [difference for difference in differences if difference[0] not in allowed]
        if refused:
            names = ", ".join(name for name, *_ in refused)
            raise Stop(
                Exit.NOT_COMPARABLE,
                "; ".join(
                    f"{name}: this run began with {old}, and now it is {new}" for name, old, new in refused
                ),
                "the same again: a resumed run gives the bits of an uninterrupted one (R2)",
                f"{names} back; or run=NAME for a new run; or resume_allow=[{names}] to go on and lose R2",
            )
        for name, old, new in differences:
            recorded["lost"].append(
                {"time": _now(), "promise": "R2", "because": name, "from": old, "to": new}
            )
            say(
                f"{name} differs from the start of this run ({old} -> {new}): promise R2 is lost, and"
                " environment.json says so"
            )

    def lost(self) -> list[str]:
        return [entry["because"] for entry in self._environment["lost"]]

    def promises(self) -> dict[str, bool]:
        """R1 re-run, R2 resume, R3 data-elastic, R4 weight-elastic: which of them this run keeps."""
        same_bits = self._cfg.deterministic and not self.lost()
        return {"R1": same_bits, "R2": same_bits, "R3": True, "R4": same_bits and self._cfg.reduce == "tree"}

    # ---- while it trains ----

    def start(self, step: int, clock: Clock, classes: list[str], notes: list[str], decoder: str) -> None:
        """Training goes on after `step`. Only now is the folder changed: whatever might refuse the run has
        agreed.

        `notes`: what is to be known of the data, such as that it is a lossy copy. `decoder`: what decodes its
        images from now on.
        """
        self.step, self._clock, self._end = step, clock, clock.end
        start = {"time": _now(), "after_step": step, "command": shlex.join([sys.executable, *sys.argv])}
        self._environment |= {
            "reconverge": reconverge.__version__,
            "git": environment.git(),
            "packages": environment.versions(),
            "promises": self.promises(),
            "data_notes": notes,
            "starts": [*self._environment["starts"], start | {"decoder": decoder} | environment.host()],
        }
        self._write("environment.json", json.dumps(self._environment, indent=1))
        self._write("config.yaml", config.to_text(self._cfg))
        self._write("classes.txt", "".join(f"{name}\n" for name in classes))
        for record in ranks.from_rank_0(lambda: self._cut_back(step)):
            self._note_top1(record["step"], record)
        self._status("running", Exit.DONE)
        if self.writes:
            self._metrics = open(self.folder / "metrics.jsonl", "a")  # noqa: SIM115, for the whole of the run
            self._record = open(self.folder / "record.jsonl", "a")  # noqa: SIM115
            self._progress = Progress(step, clock.end)
            self._tracker = Tracker(self._cfg.tracker, self.folder)
        self._interval = (time.perf_counter(), step, 0.0)

    def _cut_back(self, step: int) -> list[dict[str, Any]]:
        """What was logged after `step`, by a process that was killed, comes again; the lines of metrics.jsonl
        that stay.
        """
        for name in ("record.jsonl", "metrics.jsonl"):
            records = [record for record in jsonl.lines(self.folder / name) if record["step"] <= step]
            self._write(name, "".join(map(jsonl.line, records)))
        return records

    def records(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return jsonl.lines(self.folder / "metrics.jsonl")

    def watch(self, world: "World", feed: "Feed") -> None:
        """What each log interval asks: the ranks for their losses, the feed for the seconds waited."""
        self._world, self._feed = world, feed

    def step_done(self, step: int, losses: list[Any], grad_norm: Any, lr: float, images: list[int]) -> None:
        """After each step, with what record.Pending holds; tensors stay on the device until log_every.

        Errors: Stop(NOT_FINITE).
        """
        from reconverge.record import Pending

        self.step = step
        self._pending.append(Pending(step, losses, grad_norm, lr, images))
        if step % self._cfg.log_every == 0 or step == self._end:
            self.flush()

    def flush(self) -> None:
        """Wait for the device and for the other ranks, and write what is pending.

        Errors: Stop(NOT_FINITE, DAMAGED).
        """
        from reconverge.record import gathered

        if not self._pending:
            return
        steps = gathered(self._world, self._pending)
        self._pending.clear()
        if self._record:
            self._record.writelines(jsonl.line(step._asdict()) for step in steps)
            self._record.flush()
        self._stop_if_not_finite(steps)
        waited = max(self._world.gather_objects(self._feed.waited))
        self._feed.settle(self._world)
        last = steps[-1]
        began, first, waited_before = self._interval
        self._interval = (time.perf_counter(), last.step, waited)
        seconds = self._interval[0] - began
        loss = sum(step.loss for step in steps) / len(steps)
        speed = {
            "images_per_second": (last.step - first) * self._cfg.batch / seconds,
            "data_wait": (waited - waited_before) / seconds,
        }
        self.still_mine()
        self.log(last.step, loss=loss, lr=last.lr, grad_norm=last.grad_norm, **speed)
        self._status("running", Exit.DONE)
        if self._progress:
            self._progress.update(last.step, loss, last.lr, **speed)
        self._intervals += 1
        if (
            self._intervals == 2 and speed["data_wait"] > 0.05
        ):  # the first one has the start of the workers in it
            say(f"data-wait {speed['data_wait']:.0%}: the device waits for images. {ADVICE}")

    def _stop_if_not_finite(self, steps: "list[Step]") -> None:
        for step, loss, norm, *_ in steps:
            self._in_a_row = 0 if math.isfinite(norm) else self._in_a_row + 1
            if self._in_a_row > (OVERFLOWS if self._cfg.precision == "fp16" else 0):
                raise Stop(
                    Exit.NOT_FINITE,
                    f"step {step}: the loss is {loss} and the gradient's norm {norm}; its sample ids:"
                    f" {self.samples_of(step - 1)}",
                    "finite numbers; the weights are those before this step, and the last checkpoint is good",
                    "a lower optim.lr=, optim.clip=1, precision=fp32, or look at these images; a resumed run"
                    " meets the same step again",
                )

    def log(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl; a number that is not finite, as fp16 has them, becomes null."""
        self._note_top1(step, values)
        if self._metrics:
            self._metrics.write(jsonl.line({"step": step, **values}))
            self._metrics.flush()

    def _note_top1(self, step: int, values: dict[str, float]) -> None:
        if "raw_top1" in values:
            self._top1[step] = {
                kind: values[f"{kind}_top1"] for kind in ("raw", "ema") if f"{kind}_top1" in values
            }

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Evaluating and saving do not count in images/s."""
        stopped = time.perf_counter()
        yield
        began, first, waited = self._interval
        self._interval = (began + time.perf_counter() - stopped, first, waited)

    def evaluated(self, step: int) -> bool:
        return step in self._top1

    def _status(self, reason: str, code: int, summary: str = "") -> None:
        assert self._clock is not None, "start() comes first"
        entries = {
            "reason": reason,
            "exit_code": int(code),
            "step": self.step,
            "end": self._clock.end,
            "total": self._clock.total,
            "summary": summary,
            "time": _now(),
        }
        self._write("status.json", json.dumps(entries, indent=1))

    def best_steps(self) -> dict[str, int]:
        """For each kind of weights that was evaluated, raw and ema, the first step with its best top-1."""
        kinds = next(iter(self._top1.values()), {})
        return {kind: max(self._top1, key=lambda step: self._top1[step][kind]) for kind in kinds}

    def top1(self) -> dict[str, float]:
        """Of the last step, by kind of weights; empty if it was not evaluated."""
        return self._top1.get(self.step, {})

    def done(self, comparison: str | None) -> int:
        """The last line: top-1 of the last evaluation by the better weights, how it compares, the best
        checkpoint, where everything is.
        """
        parts = [f"not evaluated (evaluate_every={self._cfg.evaluate_every}); step {self.step}"]
        if top1 := self.top1():
            better = max(top1, key=lambda name: top1[name])
            others = "".join(f", {name} {value:.2f} %" for name, value in top1.items() if name != better)
            parts = [f"top-1 {top1[better]:.2f} % ({better} weights{others}) after step {self.step}"]
        if comparison:
            parts.append(comparison)
        for kind, best in self.best_steps().items():
            if best != self.step:
                parts.append(f"best of {kind} {self._top1[best][kind]:.2f} % in checkpoints/step-{best:08d}")
        if (replaced := self.folder / "quarantine.jsonl").exists():
            parts.append(
                f"{len(replaced.read_text().splitlines())} damaged images were replaced (quarantine.jsonl)"
            )
        summary = "; ".join([*parts, f"everything is in {self.folder}/"])
        self._status("done", Exit.DONE, summary)
        self._say_last(summary)
        return Exit.DONE

    def preempted(self) -> int:
        name = told_by()
        self._status("preempted", Exit.PREEMPTED, name)
        saved = (
            f"step {self.step} is saved in {self.folder}" if self.step else "stopped before the first step"
        )
        self._say_last(f"{name}: {saved}; the same command again goes on from here")
        return Exit.PREEMPTED

    def _say_last(self, line: str) -> None:
        self._close()
        say(line)

    def _close(self) -> None:
        if self._progress:
            self._progress.close()
        if self._tracker and (trouble := self._tracker.close()):
            say(trouble)
        for file in (self._metrics, self._record):
            if file:
                file.close()

    def still_mine(self) -> None:
        """Before anything is written that matters. Errors: Stop(IN_USE)."""
        if self._lock:
            self._lock.check()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._clock is not None:  # else the folder is as it was
            try:
                self._failed(error, explain(error))
            except OSError:
                pass  # a full disk is what ended the run; the exit code says so
        self.closing.close()
        self._close()
        if self._lock:
            self._lock.release()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _failed(self, error: BaseException, stop: Stop | None) -> None:
        if self.writes:
            self._status("failed", stop.code if stop else Exit.BUG, str(stop or repr(error)))
            return
        path = self.folder / "errors" / f"rank-{ranks.HERE.rank}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join([_now(), "\n", *traceback.format_exception(error), f"{stop or ''}\n"]))
        if stop:
            stop.told = True

    def _write(self, name: str, text: str) -> None:
        """Replace a file of the folder whole."""
        if not self.writes:
            return
        files.write_whole(self.folder / name, text)


def differing(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two tables the entries that differ; two values as they are."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: old.get(name) for name in names}, {name: new.get(name) for name in names}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
