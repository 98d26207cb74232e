"""The contents of a checkpoint: raw and EMA weights, the optimizer, and a few numbers.

It has no state of random generators, because random numbers are a function of the step.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from reconverge.base import launcher
from reconverge.base.errors import Exit, Stop
from reconverge.distributed import ranks
from reconverge.run import checkpoint
from reconverge.training import optim
from reconverge.training.ema import Ema


@dataclass
class State:
    net: nn.Module
    ema: Ema | None
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler

    def models(self) -> dict[str, nn.Module]:
        return {"raw": self.net} | ({"ema": self.ema.model} if self.ema else {})

    def save(self, folder: Path, step: int, keep: int, best: Collection[int]) -> None:
        """Write the checkpoint of `step`, and remove all others except the newest `keep` and those of the
        steps `best`.
        """
        tensors = {"model": self.net.state_dict(), "optimizer": optim.state_tensors(self.optimizer)}
        if self.ema:
            tensors["ema"] = self.ema.model.state_dict()
        checkpoint.save(folder, step, tensors, {"scaler": self.scaler.state_dict()})
        checkpoint.prune(folder, step, keep, best)

    def restore(self, folder: Path) -> tuple[int, list[str]]:
        """Load the newest valid checkpoint. Returns its step (0: there is none), and why newer ones were
        skipped.

        Errors: Stop(DAMAGED).
        """
        path, skipped = ranks.from_rank_0(lambda: checkpoint.newest_valid(folder))
        if path is None:
            return 0, skipped
        if not path.exists():
            raise Stop(
                Exit.MISSING,
                f"{path} exists on the host of rank 0, but not on the host of rank {launcher.HERE.rank}",
                "a run's folder that all hosts share",
                "start the run in a folder on a shared file system",
            )
        tensors, numbers = checkpoint.load(path)
        try:
            self.net.load_state_dict(tensors["model"])
            if self.ema:
                self.ema.model.load_state_dict(tensors["ema"])
            optim.load_state_tensors(self.optimizer, tensors["optimizer"])
        except (KeyError, RuntimeError) as error:
            raise Stop(
                Exit.NOT_COMPARABLE,
                f"{path}: {str(error).splitlines()[0]}",
                "a checkpoint of this model, with EMA weights if ema.decay is set",
                "run=NAME to start a new run",
            ) from error
        self.scaler.load_state_dict(numbers["scaler"])
        return numbers["step"], skipped
