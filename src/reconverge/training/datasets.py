"""Opens the images of a run, and computes the clock and the order of images from their number.

Imports no torch, so that missing or wrong data are reported within a second.
"""

from typing import NamedTuple

from reconverge.config.settings import Train
from reconverge.data import order, sources, suitable
from reconverge.data.sources import Source
from reconverge.distributed import ranks
from reconverge.training.clock import Clock


class Datasets(NamedTuple):
    training: Source
    validation: Source | None  # None if data.val is null
    clock: Clock
    order: order.Order

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of everything that decides the images of each step."""
        validation = self.validation.fingerprint if self.validation else None
        return {"train": self.training.fingerprint, "val": validation, "order": order.VERSION}

    def notes(self) -> list[str]:
        """Remarks about the data that the user should see before training."""
        return self.training.notes + (self.validation.notes if self.validation else [])


def opened(cfg: Train) -> Datasets:
    """Open the data on rank 0 first, then on the others. Errors: Stop, also if a batch exceeds the images."""
    training, validation = ranks.rank_0_first(lambda: sources.open_sources(cfg.data))
    suitable.refuse_other_task(cfg.task, training, cfg.data.name)
    suitable.refuse_one_class(training)
    if cfg.data.on_bad_image == "stop":
        suitable.refuse_broken([training, validation])
    training.notes = training.notes + suitable.doubts(training, validation)
    return Datasets(training, validation, Clock.of(cfg, len(training)), order.Order.of(cfg, training))
