"""What a checkpoint holds: both sets of weights, the optimizer, and a few numbers. Nothing random: that is a function of the step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reconverge import checkpoint, optim
from reconverge.ema import Ema
from reconverge.errors import Exit, Stop


@dataclass
class State:
    net: nn.Module
    ema: Ema | None
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    best: dict[str, Any] | None = None  # step, top1 and weights (raw or ema) of the best evaluation so far

    def models(self) -> dict[str, nn.Module]:
        return {"raw": self.net} | ({"ema": self.ema.model} if self.ema else {})

    def save(self, folder: Path, step: int, keep: int) -> None:
        """Write the checkpoint of `step`, and remove those that are neither among the newest `keep` nor the best."""
        tensors = {"model": self.net.state_dict(), "optimizer": optim.state_tensors(self.optimizer)}
        if self.ema:
            tensors["ema"] = self.ema.model.state_dict()
        checkpoint.save(folder, step, tensors, {"best": self.best, "scaler": self.scaler.state_dict()})
        checkpoint.prune(folder, keep, self.best["step"] if self.best else None)

    def restore(self, folder: Path) -> tuple[int, list[str]]:
        """Load the newest valid checkpoint: its step (0: there is none), and why newer ones were skipped. Errors: Stop(DAMAGED)."""
        path, skipped = checkpoint.newest_valid(folder)
        if path is None:
            return 0, skipped
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
                "a checkpoint of this model with these parts",
                "run=NAME for a new run",
            ) from error
        self.scaler.load_state_dict(numbers["scaler"])
        self.best = numbers["best"]
        return numbers["step"], skipped

    def remember(self, step: int, top1: dict[str, float]) -> None:
        """Keep in mind the better of raw and EMA, if it is the best so far."""
        weights = max(top1, key=lambda name: top1[name])
        if self.best is None or top1[weights] > self.best["top1"]:
            self.best = {"step": step, "top1": top1[weights], "weights": weights}
