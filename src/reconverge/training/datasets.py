"""The images of a run, opened, and what follows from their number: the clock and the order.

Imports no torch, so that data which cannot be trained on are refused within a second.
"""

from typing import NamedTuple

from reconverge.config.settings import Train
from reconverge.data import order, sources
from reconverge.data.sources import Source
from reconverge.distributed import ranks
from reconverge.training.clock import Clock


class Datasets(NamedTuple):
    training: Source
    validation: Source | None  # None where data.val is null
    clock: Clock
    order: order.Order

    def fingerprints(self) -> dict[str, str | None]:
        """Of what decides the images of each step."""
        validation = self.validation.fingerprint if self.validation else None
        return {"train": self.training.fingerprint, "val": validation, "order": order.VERSION}

    def notes(self) -> list[str]:
        """What whoever trains on them should know."""
        return self.training.notes + (self.validation.notes if self.validation else [])


def opened(cfg: Train) -> Datasets:
    """On every rank, on rank 0 first. Errors: Stop, also for fewer images than a batch."""
    training, validation = ranks.rank_0_first(lambda: sources.open_sources(cfg.data))
    return Datasets(training, validation, Clock.of(cfg, len(training)), order.Order.of(cfg, training))
