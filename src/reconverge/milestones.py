"""What comes after a step once in a while: evaluate both sets of weights, save a checkpoint, stop."""

import torch

from reconverge.base.errors import Exit
from reconverge.base.signals import told_to_stop
from reconverge.config.settings import Train
from reconverge.data.sources import Source
from reconverge.distributed.world import World
from reconverge.report import pictures
from reconverge.run import predictions, reader
from reconverge.run.folder import Run
from reconverge.run.log import Log
from reconverge.run.state import State
from reconverge.training.clock import Clock
from reconverge.training.evaluate import Evaluator

NUMBERS = ("top1", "top5", "loss", "ece")  # of each kind of weights, for metrics.jsonl


class Milestones:
    """`validation`: None where there is nothing to evaluate on."""

    def __init__(
        self,
        cfg: Train,
        run: Run,
        log: Log,
        clock: Clock,
        world: World,
        state: State,
        evaluator: Evaluator,
        validation: Source | None,
        tracer: torch.profiler.profile | None,
    ):
        self._cfg, self._run, self._log, self._clock, self._world = cfg, run, log, clock, world
        self._state, self._evaluator, self._validation, self._tracer = state, evaluator, validation, tracer

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
        with self._log.clock_stopped():
            stopping = self._world.any(told_to_stop())
            evaluating = self._clock.due(self._clock.evaluate_every, step) and not stopping
            saving = self._clock.due(self._clock.save_every, step) or stopping
            if saving or evaluating:
                self._log.flush()  # stops here, before anything is saved, if a step was not finite
            trouble = self._log.trouble()
            if saving or trouble:
                self._save(step)
            if trouble:
                raise trouble
            if evaluating:
                try:
                    self._evaluate(step)
                except Exception:  # a damaged image, for example: the steps before it are not lost
                    if not saving:
                        self._save(step)
                    raise
                # A signal cuts the evaluation short: it comes again on resume.
                stopping = self._world.any(told_to_stop())
                if not saving and (stopping or step in self._log.best_steps().values()):
                    self._save(step)
        return stopping

    def _save(self, step: int) -> None:
        self._run.still_mine()
        if self._run.writes:
            self._state.save(self._run.checkpoints, step, self._cfg.keep, self._log.best_steps().values())
            self._run.saved = step
            self._run.status("running", Exit.DONE)

    def _evaluate(self, step: int) -> None:
        """metrics.jsonl, outcomes.npz, curves.png, predictions.png; nothing if a signal cuts it short."""
        validation = self._validation
        assert validation is not None, "without validation images evaluate_every is never"
        self._state.net.eval()
        results = self._evaluator(self._state.models(), validation)
        self._state.net.train()
        if results is None:
            return
        found = {f"{kind}_{key}": getattr(results[kind], key) for kind in results for key in NUMBERS}
        left_out = len(next(iter(results.values())).left_out)
        self._log.evaluation(step, **found, **({"left_out": left_out} if left_out else {}))
        if self._run.writes:
            folder = self._run.folder
            predictions.save(folder / "outcomes.npz", step, validation, results)
            pictures.curves(folder, reader.metrics(folder), self._clock.steps_per_epoch, self._cfg.mix)
            pictures.predictions(folder, validation, self._cfg.evaluate, results)
