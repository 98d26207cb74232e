"""What a training says of itself while it runs: record.jsonl, metrics.jsonl, status.json, the line on the
terminal, the tracker.

The numbers of a log interval are copied to the host when it is over, and read one step later, so that nobody
waits for them. Before an evaluation, a checkpoint and the end, all of them are read.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import appending, json_line, read_text
from reconverge.base.signals import told_by
from reconverge.base.terminal import Progress, counted, say
from reconverge.config.settings import SCORES, Train
from reconverge.data.loader import Feed
from reconverge.distributed import ranks
from reconverge.distributed.later import Later
from reconverge.distributed.world import World
from reconverge.run import reader
from reconverge.run.folder import Run
from reconverge.run.record import Pending, Step, gathered, sent
from reconverge.run.tracker import Tracker
from reconverge.training.clock import Clock

ADVICE = (
    "More workers= helps while cores are free; then the native decoder (environment.json says what decodes),"
    " data.decode=fast, a smaller copy (reconverge prepare --resize), or data.window= with data.stage= where"
    " the disk is slow. `reconverge bench data` measures where the time goes."
)
STATUS = 30.0  # seconds between two writings of status.json, each of which waits for the disk
OVERFLOWS = 30  # steps in a row that fp16 may skip while its loss scale settles
KINDS = {"ema": "EMA", "raw": "raw"}  # of weights, as they are named, in the order in which they are listed


class Sent(NamedTuple):
    """Steps whose numbers are on their way to the host."""

    steps: list[Pending]
    numbers: Later
    at: float  # time.perf_counter() when the host came so far
    waited: float  # seconds that it had waited for images until then


class Log:
    """Of a run that has begun; closed with it. Rank 0 writes; every rank knows what was evaluated."""

    def __init__(
        self,
        cfg: Train,
        run: Run,
        clock: Clock,
        world: World,
        feed: Feed,
        samples_of: Callable[[int], list[int]],
    ):
        """What was logged after run.step, by a process that was killed, comes again. `samples_of`: the sample
        ids of a step, for a message.
        """
        self._cfg, self._run, self._clock, self._world, self._feed = cfg, run, clock, world, feed
        self._samples_of = samples_of
        self._name = SCORES[cfg.task][1]
        lines = ranks.from_rank_0(self._cut_back)
        self._evaluated = reader.scores(lines)  # of each evaluation, by step
        # Step -> damaged validation images that its evaluation left out, if any.
        self._left_out = {line["step"]: line["left_out"] for line in lines if "left_out" in line}
        self._pending: list[Pending] = []
        self._sent: list[Sent] = []
        self._told = time.monotonic()  # when status.json was written
        self._intervals = 0
        self._save_wait = 0.0  # seconds that training waited for checkpoints, since the last line
        self._in_a_row = 0  # steps whose gradient was not finite
        self._metrics: TextIO | None = None
        self._record: TextIO | None = None
        self._progress: Progress | None = None
        self._tracker: Tracker | None = None
        if run.writes:
            self._metrics = appending(run.folder / "metrics.jsonl")  # for the whole of the run
            self._record = appending(run.folder / "record.jsonl")
            self._progress = Progress(run.step, clock.end)
            self._tracker = Tracker(cfg.tracker, run.folder)
            if self._tracker.note:
                say(self._tracker.note)
        self._interval = (
            time.perf_counter(),
            run.step,
            0.0,
        )  # when it began, after which step, seconds waited
        run.closing.callback(self.close)

    def _cut_back(self) -> list[dict[str, Any]]:
        """Leave in both files what is not after run.step; the lines of metrics.jsonl."""
        record, metrics = (
            [line for line in lines if line["step"] <= self._run.step]
            for lines in (reader.record(self._run.folder), reader.metrics(self._run.folder))
        )
        self._run.write("record.jsonl", "".join(map(json_line, record)))
        self._run.write("metrics.jsonl", "".join(map(json_line, metrics)))
        return metrics

    # ---- after each step ----

    def step_done(self, step: int, losses: list[Any], grad_norm: Any, lr: float, images: list[int]) -> None:
        """After each step, with what record.Pending holds."""
        self._run.step = step
        self._pending.append(Pending(step, losses, grad_norm, lr, images))
        if step % self._cfg.log_every == 0:
            self._send()

    def read(self, everything: bool) -> None:
        """After each step, when the hosts have talked: only a rank that is not lost makes the device wait.
        Write what was sent in a step before; or `everything`, for which the host waits.

        Errors: Stop(NOT_FINITE, DAMAGED, LOST).
        """
        if everything and self._pending:
            self._send()
        while self._sent and (everything or self._sent[0].steps[-1].step < self._run.step):
            self._write(self._sent.pop(0))
        if self._progress:
            self._progress.step_done(self._run.step)

    def _send(self) -> None:
        self._sent.append(Sent(self._pending, sent(self._pending), time.perf_counter(), self._feed.waited))
        self._pending = []

    def _write(self, interval: Sent) -> None:
        """Errors: Stop(NOT_FINITE, DAMAGED, LOST)."""
        began, first, waited_before = self._interval
        # The steps ended when the host came so far, or when the device did, if the host has to wait for it.
        ready = interval.numbers.there() and interval.at > began
        numbers = interval.numbers.read(self._cfg.world_timeout)
        ended = interval.at if ready else time.perf_counter()
        steps, waited, news = gathered(
            self._world, interval.steps, numbers, interval.waited, self._feed.news()
        )
        if self._record:
            self._record.writelines(json_line(step._asdict()) for step in steps)
            self._record.flush()
        self._stop_if_not_finite(steps)
        if news:
            self._feed.settle(self._world)
        last = steps[-1]
        self._interval = (ended, last.step, waited)
        loss = sum(step.loss for step in steps) / len(steps)
        speed = {
            "images_per_second": (last.step - first) * self._cfg.batch / (ended - began),
            "data_wait": (waited - waited_before) / (ended - began),
        }
        self._run.still_mine()
        saves = {"save_wait": self._save_wait} if self._save_wait else {}
        self._save_wait = 0.0
        self.metrics(last.step, loss=loss, lr=last.lr, grad_norm=last.grad_norm, **speed, **saves)
        if time.monotonic() - self._told > STATUS:
            self._told = time.monotonic()
            self._run.status("running", Exit.DONE)
        if self._progress:
            self._progress.update(last.step, loss, last.lr, **speed)
        self._intervals += 1
        if self._intervals == 2 and speed["data_wait"] > 0.05:  # the first one has the start of the workers
            say(f"data-wait {speed['data_wait']:.0%}: the device waits for images. {ADVICE}")

    def _stop_if_not_finite(self, steps: list[Step]) -> None:
        for step, loss, norm, *_ in steps:
            if norm == -math.inf:  # optim.checked
                raise Stop(
                    Exit.NOT_FINITE,
                    f"step {step}: the loss is {loss}, and after its update some weights are not finite",
                    "finite numbers; the last checkpoint is good: its weights were looked at before it was"
                    " written",
                    "a lower optim.lr=, or optim.clip=1; a resumed run meets the same step again",
                )
            self._in_a_row = 0 if math.isfinite(norm) else self._in_a_row + 1
            if self._in_a_row > (OVERFLOWS if self._cfg.precision == "fp16" else 0):
                raise Stop(
                    Exit.NOT_FINITE,
                    f"step {step}: the loss is {loss} and the gradient's norm {norm}; its sample ids:"
                    f" {self._samples_of(step - 1)}",
                    "finite numbers; the weights are those before this step, and the last checkpoint is good",
                    "a lower optim.lr=, optim.clip=1, precision=fp32, or look at these images; a resumed run"
                    " meets the same step again",
                )

    def metrics(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl; a number that is not finite, as fp16 has them, becomes null."""
        line = {"step": step, **values}
        self._evaluated |= reader.scores([line])
        if "left_out" in values:
            self._left_out[step] = int(values["left_out"])
        if self._metrics:
            self._metrics.write(json_line(line))
            self._metrics.flush()

    def evaluation(self, step: int, **values: float) -> None:
        """What was found after `step`: a line of metrics.jsonl, and one for a person."""
        self.metrics(step, **values)
        line = evaluation_line(self._name, self._evaluated, step, self._clock.steps_per_epoch)
        say(line + self._without(step))

    def _without(self, step: int) -> str:
        """Beside a score: how many damaged images it does not count."""
        left_out = self._left_out.get(step, 0)
        return f" (without {counted(left_out, 'damaged image')})" if left_out else ""

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Evaluating and saving, after everything was read, do not count in images/s."""
        stopped = time.perf_counter()
        yield
        began, first, waited = self._interval
        self._interval = (began + time.perf_counter() - stopped, first, waited)

    def save_waited(self, seconds: float) -> None:
        """For the next line of metrics.jsonl."""
        self._save_wait += seconds

    def trouble(self) -> Stop | None:
        """What the run has to stop for, on all ranks, although its steps are sound."""
        return self._feed.early.trouble if self._feed.early else None

    # ---- what was evaluated ----

    def evaluated(self, step: int) -> bool:
        return step in self._evaluated

    def best_steps(self) -> dict[str, int]:
        """For each kind of weights that was evaluated, raw and ema, the first step with its best score."""
        return reader.best_steps(self._evaluated)

    def scores(self) -> dict[str, float]:
        """Of the last step, by kind of weights; empty if it was not evaluated."""
        return self._evaluated.get(self._run.step, {})

    # ---- the end ----

    def done(self, comparison: str | None) -> int:
        """The last lines: where it stopped, the score there and the best, `comparison` with the published
        number, where everything is. status.json keeps them as its summary.
        """
        run, clock = self._run, self._clock
        part = f" of {clock.total}" if run.step < clock.total else ""
        epochs = f" of {epoch(clock.total, clock.steps_per_epoch)}" if part else ""
        rows = {self._name: f"not evaluated after this step (evaluate_every={self._cfg.evaluate_every})"}
        if scores := self.scores():
            rows[self._name] = percents(scores) + self._without(run.step)
        best = self.best_steps()
        for kind in filter(best.__contains__, KINDS):
            step = best[kind]
            rows[f"best {KINDS[kind]}" if len(best) > 1 else "best"] = (
                f"{self._evaluated[step][kind]:.2f} %, epoch {epoch(step, clock.steps_per_epoch)},"
                f" {reader.checkpoint_of(run.checkpoints, step).relative_to(run.folder)}{self._without(step)}"
            )
        if comparison:
            rows["compared"] = comparison
        if (replaced := run.folder / "quarantine.jsonl").exists():
            count = len(read_text(replaced).splitlines())
            verb = "was" if count == 1 else "were"
            rows["replaced"] = f"{counted(count, 'damaged image')} {verb} replaced (quarantine.jsonl)"
        rows["folder"] = f"{run.folder}/"
        first = f"step {run.step}{part}, epoch {epoch(run.step, clock.steps_per_epoch)}{epochs}"
        summary = "\n".join([first, *(f"  {name:<9} {text}" for name, text in rows.items())])
        run.status("done", Exit.DONE, summary, comparison)
        self.close()
        say(f"{self._cfg.run} is finished: {summary}")
        return Exit.DONE

    def preempted(self) -> int:
        name, step = told_by(), self._run.step
        self._run.status("preempted", Exit.PREEMPTED, name)
        saved = f"step {step} is saved in {self._run.folder}" if step else "stopped before the first step"
        self.close()
        say(f"{name}: {saved}; run the same command again to continue")
        return Exit.PREEMPTED

    def close(self) -> None:
        """At the end, or with the run; a second time it does nothing."""
        if self._progress:
            self._progress.close()
        if self._tracker and (trouble := self._tracker.close()):
            say(trouble)
        for file in (self._metrics, self._record):
            if file:
                file.close()


# ---- results in words; scores in percent ----


def percents(scores: Mapping[str, float]) -> str:
    """By kind of weights: 93.75 % EMA, 92.10 % raw. A single kind has no name."""
    named = [f"{scores[kind]:.2f} % {name}" for kind, name in KINDS.items() if kind in scores]
    return ", ".join(named) if len(named) > 1 else f"{next(iter(scores.values())):.2f} %"


def epoch(step: int, steps_per_epoch: int) -> str:
    """Epochs that have passed after `step`: 12, or 12.5 in the middle of one."""
    return f"{round(step / steps_per_epoch, 2):g}"


def evaluation_line(
    name: str, evaluated: Mapping[int, Mapping[str, float]], step: int, steps_per_epoch: int
) -> str:
    """Of the evaluation after `step`, beside the best until then; `evaluated`: the score called `name` by
    step and kind of weights.
    """
    steps = reader.best_steps(evaluated)
    kind = max(steps, key=lambda kind: (evaluated[steps[kind]][kind], -steps[kind], kind == "ema"))
    best = f"best {evaluated[steps[kind]][kind]:.2f} %"
    if steps[kind] != step:
        by = f"{KINDS[kind]}, " if len(steps) > 1 else ""
        best += f" ({by}epoch {epoch(steps[kind], steps_per_epoch)})"
    return f"epoch {epoch(step, steps_per_epoch)}  {name} {percents(evaluated[step])}  {best}"
