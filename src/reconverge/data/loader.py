"""Microbatches from data workers to the device. Which images, and how they are augmented, is a function of the key alone:
the number of workers and the step where one starts change nothing.
"""

import atexit
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reconverge import chance
from reconverge.data.sources import Source
from reconverge.data.transforms import Transform
from reconverge.errors import Exit, Stop


class Batch(NamedTuple):
    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,)


def in_sequence(images: int, batch: int) -> list[tuple[int, np.ndarray]]:
    """Every sample id once, in order, for evaluation."""
    return [(0, np.arange(first, min(first + batch, images))) for first in range(0, images, batch)]


class Images(Dataset):
    """Decodes and augments the images of one batch. A Stop is returned as a value: raised in a worker, it would arrive as a traceback."""

    def __init__(self, source: Source, transform: Transform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, at: tuple[int, np.ndarray]) -> Batch | Stop:
        epoch, ids = at
        try:
            images = torch.stack([self.sample(epoch, sample) for sample in ids.tolist()])
        except Stop as stop:
            return stop
        return Batch(images, torch.from_numpy(self.source.labels(ids)))

    def sample(self, epoch: int, sample: int) -> Tensor:
        """One augmented image, uint8 (3, H, W)."""
        image = self.source.image(sample)
        with chance.scope(self.seed, "augment", epoch, sample, 0):  # 0: the first of a recipe's repeats
            return self.transform(image)


class Feed:
    """Iterates over batches on the device; `waited` adds up the seconds in which the host had nothing to hand out.

    With `ahead`, the copy of the next batch runs on a side stream while the device works on this one.
    """

    def __init__(self, images: Images, batches: Iterable[tuple[int, np.ndarray]], workers: int, device: torch.device, ahead: bool):
        self.waited = 0.0
        self._device = device
        self._ahead = ahead
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and ahead else None
        self._loader = DataLoader(
            images,
            sampler=batches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else each iterator draws a seed from the global one
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            collate_fn=_as_it_is,
        )

    def __iter__(self) -> Iterator[Batch]:
        loaded = iter(self._loader)
        end = partial(_end_workers, loaded)
        atexit.register(end)  # an error may keep this generator alive until the process ends
        try:
            following = self._next(loaded)
            while following is not None:
                batch = self._arrived(following)
                if self._ahead:
                    following = self._next(loaded)
                    yield batch
                else:
                    yield batch
                    following = self._next(loaded)
        finally:
            end()
            atexit.unregister(end)

    def _next(self, loaded: Iterator[Batch | Stop]) -> Batch | None:
        started = time.perf_counter()
        try:
            batch = next(loaded, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise Stop(
                Exit.OUT_OF_MEMORY if "Killed" in str(error) else Exit.BUG,
                f"a data worker died: {str(error).splitlines()[0]}",
                "workers with enough memory, shared memory and no signals",
                "run the same command again; fewer workers= if memory was short",
            ) from error
        finally:
            self.waited += time.perf_counter() - started
        if isinstance(batch, Stop):
            raise batch
        if batch is None or self._device.type == "cpu":
            return batch
        with torch.cuda.stream(self._side):  # None: the current one
            images = batch.images.to(self._device, non_blocking=True)
            return Batch(images, batch.labels.to(self._device, non_blocking=True))

    def _arrived(self, batch: Batch) -> Batch:
        if self._side is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._side)
            batch.images.record_stream(current)
            batch.labels.record_stream(current)
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _end_workers(loaded: Any) -> None:
    """Python ends workers by SIGTERM, which ours ignore, and would then wait for them for ever."""
    if hasattr(loaded, "_shutdown_workers"):
        loaded._shutdown_workers()
        for worker in loaded._workers:
            worker.kill()


def _ignore_signals(worker: int) -> None:
    """SLURM and terminals signal every process of a job; the main process alone decides, and it ends its workers itself."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
