"""What comes after a step once in a while: evaluate both sets of weights, save a checkpoint, stop."""

import time

import torch

from reconverge.base.errors import Exit
from reconverge.base.signals import told_to_stop
from reconverge.config.settings import Train
from reconverge.distributed.world import World
from reconverge.run.folder import Run
from reconverge.run.log import Log
from reconverge.run.saving import Saver
from reconverge.run.state import State
from reconverge.tasks import Task
from reconverge.training.clock import Clock


class Milestones:
    def __init__(
        self,
        cfg: Train,
        run: Run,
        log: Log,
        clock: Clock,
        world: World,
        state: State,
        task: Task,
        tracer: torch.profiler.profile | None,
    ):
        self._cfg, self._run, self._log, self._clock, self._world = cfg, run, log, clock, world
        self._state, self._task, self._tracer = state, task, tracer
        self._saver = Saver(run.checkpoints)
        run.closing.callback(self._saver.close)

    def before(self, start: int) -> bool:
        """Make up for an evaluation after step `start` that is missing: a signal came between the two, or
        steps= is now below it. Whether training is to stop before it goes on.
        """
        due = self._clock.due(self._clock.evaluate_every, min(start, self._clock.end))
        if start > 0 and due and not self._log.evaluated(start):
            self._evaluate(start)
        return self._world.any(told_to_stop())

    def after(self, step: int) -> bool:
        """Whether training is to stop after `step`: then it is saved."""
        if self._tracer:
            self._tracer.step()
        stopping = self._world.any(told_to_stop())  # here a lost rank is named, before a device waits for it
        evaluating = self._clock.due(self._clock.evaluate_every, step) and not stopping
        saving = self._clock.due(self._clock.save_every, step) or stopping
        # Stops here, before anything is saved, if a step was not finite.
        self._log.read(everything=saving or evaluating or step == self._clock.end)
        trouble = self._log.trouble()
        if trouble:
            self._log.read(everything=True)
        with self._log.clock_stopped():
            if saving or trouble:
                self._save(step)
            self._note_saved(wait=trouble is not None)
            if trouble:
                raise trouble
            if evaluating:
                try:
                    self._evaluate(step)
                except Exception:  # a damaged image, for example: the steps before it are not lost
                    if not saving:
                        self._save(step)
                    self._note_saved(wait=True)
                    raise
                # A signal cuts the evaluation short: it comes again on resume.
                stopping = self._world.any(told_to_stop())
                if not saving and (stopping or step in self._log.best_steps().values()):
                    self._save(step)
            if stopping or step == self._clock.end:
                self._note_saved(wait=True)
        return stopping

    def _save(self, step: int) -> None:
        """Begin to save, while training goes on."""
        self._run.still_mine()
        if self._run.writes:
            began = time.perf_counter()
            self._saver.begin(step, *self._state.contents(), self._cfg.keep, self._log.best_steps().values())
            self._log.save_waited(time.perf_counter() - began)

    def _note_saved(self, wait: bool = False) -> None:
        """Write to status.json which checkpoint is complete by now. Errors: Stop(DISK)."""
        saved = self._saver.wait() if wait else self._saver.saved()
        if saved > self._run.saved:
            self._run.saved = saved
            self._run.status("running", Exit.DONE)

    def _evaluate(self, step: int) -> None:
        """A line of metrics.jsonl, and what the task draws; nothing if a signal cuts it short."""
        self._state.net.eval()
        results = self._task.evaluate(self._state.models())
        self._state.net.train()
        if results is None:
            return
        scores = self._task.scores
        found = {f"{kind}_{name}": getattr(results[kind], name) for kind in results for name in scores}
        left_out = len(next(iter(results.values())).left_out)
        self._log.evaluation(step, **found, **({"left_out": left_out} if left_out else {}))
        if self._run.writes:
            self._task.draw_results(self._run.folder, step, results)
