"""The contents of a checkpoint: raw and EMA weights, the optimizer, and a few numbers.

It has no state of random generators, because random numbers are a function of the step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reconverge.base import launcher
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
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

    def contents(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """The tensors of a checkpoint by set and name, which training goes on to change, and the numbers of
        its state.json.
        """
        tensors = {"model": self.net.state_dict(), "optimizer": optim.state_tensors(self.optimizer)}
        if self.ema:
            tensors["ema"] = self.ema.model.state_dict()
        return tensors, {"scaler": self.scaler.state_dict()}

    def restore(self, folder: Path) -> tuple[int, list[str]]:
        """Load the newest valid checkpoint. Returns its step (0: there is none), and why newer ones were
        skipped.

        Errors: Stop(DAMAGED, NOT_COMPARABLE); then model and optimizer are unchanged.
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
        for name, model in self._models().items():
            if name not in tensors:
                raise Stop(
                    Exit.NOT_COMPARABLE,
                    f"{path} has no {name}.safetensors",
                    "a checkpoint of this model, with EMA weights if ema.decay is set",
                    "run=NAME to start a new run",
                )
            checkpoint.hold(str(path / f"{name}.safetensors"), tensors[name], model.state_dict())
        self._hold_optimizer(path, tensors.get("optimizer", {}), numbers["step"])
        self._hold_scaler(path, numbers.get("scaler"))
        # Nothing was changed so far. Now nothing can be refused any more.
        for name, model in self._models().items():
            model.load_state_dict(tensors[name])
        optim.load_state_tensors(self.optimizer, tensors.get("optimizer", {}))
        if numbers["scaler"]:
            self.scaler.load_state_dict(numbers["scaler"])  # does nothing if this run needs no loss scale
        elif self.scaler.is_enabled():
            say(f"{path} was trained without a loss scale: it starts at {self.scaler.get_scale():g}")
        return numbers["step"], skipped

    def _models(self) -> dict[str, nn.Module]:
        """By the name of their file."""
        return {"model": self.net} | ({"ema": self.ema.model} if self.ema else {})

    def _hold_optimizer(self, path: Path, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Errors: Stop(DAMAGED). The fused kernel would write past moments that are too short."""
        if not tensors and self.scaler.is_enabled() and not self.optimizer.defaults["fused"]:
            return  # fp16 has skipped every step so far
        where = str(path / "optimizer.safetensors")
        checkpoint.hold(where, tensors, optim.expected_state(self.optimizer))
        for name, tensor in tensors.items():
            bad = bool((tensor < 0).any()) and not name.endswith("/exp_avg")
            if bad or (name.endswith("/step") and float(tensor) > step):
                raise checkpoint.damaged(f"{where}: {name} has values that no training gives")

    def _hold_scaler(self, path: Path, state: object) -> None:
        """Accept the state of a loss scale, or none, whichever this run needs: resume_allow=[precision] may
        have changed that. Errors: Stop(DAMAGED).
        """
        whole = torch.amp.GradScaler("cpu").state_dict()
        right = isinstance(state, dict) and (not state or state.keys() == whole.keys())
        if right and isinstance(state, dict):
            numbers = state.values()
            right = all(type(number) in (int, float) and 0 <= number < float("inf") for number in numbers)
            right = right and state.get("scale", 1) > 0
        if not right:
            raise checkpoint.damaged(f"{path / 'state.json'}: the state of the loss scale is {state}")
