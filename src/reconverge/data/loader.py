"""Loads microbatches in data workers and copies them to the device.

The images and their augmentation depend only on their keys, and not on the number of workers or on the step
where a run was resumed.
"""

import atexit
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from xxhash import xxh3_64_digest

from reconverge.base import chance, files
from reconverge.base.errors import Exit, Stop, reason
from reconverge.base.signals import CAUGHT
from reconverge.data.early import Early
from reconverge.data.image import Undecodable
from reconverge.data.mix import Noise
from reconverge.data.order import Microbatch
from reconverge.data.sources import Source
from reconverge.distributed.world import World


class Bad(NamedTuple):
    """A sample that cannot be read or decoded, and the sample that replaces it."""

    sample: int
    reason: str
    substitute: int | None  # None: the sample is left out


# (source, sample id) -> pixels uint8 (H, W, 3), then the targets: a label int64 (), or a label map uint8
# (H, W). Random numbers are drawn from the global generators, which are seeded for each sample.
Load = Callable[[Source, int], tuple[np.ndarray, ...]]


class Batch(NamedTuple):
    images: Tensor  # uint8 (N, 3, H, W), in memory as (N, H, W, 3)
    targets: tuple[Tensor, ...]  # what Load returns beside the pixels: labels int64 (N,), or uint8 (N, H, W)
    digest: int  # hash of images, targets and sample ids
    noise: Noise | None = None  # what erases parts of the images


class Images(Dataset):
    """Loads and augments the samples of one microbatch. A Stop is returned, not raised: raised in a worker,
    it would become a traceback.

    `on_bad_image`: "stop", or "substitute" to replace a damaged sample by another one, whose id is computed
    from the id of the damaged one. For an evaluation, which must not count another image in its place:
    `blank` takes the place of what `load` returns for a damaged sample, whose result has to be left out.
    `erase`: the probability of random erasing, whose noise comes with the images.
    """

    def __init__(
        self,
        source: Source,
        load: Load,
        seed: int,
        on_bad_image: str = "stop",
        blank: tuple[np.ndarray, ...] | None = None,
        erase: float = 0.0,
    ):
        self.source, self.load, self.seed, self.on_bad_image = source, load, seed, on_bad_image
        self._blank, self._erase = blank, erase

    def __getitem__(self, microbatch: Microbatch | Stop) -> tuple[Batch, list[Bad]] | Stop:
        if isinstance(microbatch, Stop):
            return microbatch
        bad: list[Bad] = []
        try:
            taken = [
                self._good(microbatch.epoch, sample, repeat, bad)
                for sample, repeat in zip(microbatch.ids.tolist(), microbatch.repeats.tolist(), strict=True)
            ]
        except Stop as stop:
            return stop
        images, *targets = (_stacked(parts) for parts in zip(*(loaded for loaded, _ in taken), strict=True))
        ids = np.array([sample for _, sample in taken])
        hashed = [xxh3_64_digest(images.numpy().data), *(target.numpy().tobytes() for target in targets)]
        digest = xxh3_64_digest(b"".join(hashed) + ids.tobytes())
        images = images.permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        key = (self.seed, *microbatch.place)
        noise = Noise.of(self._erase, images.shape, key) if self._erase else None
        number = int.from_bytes(digest, "little", signed=True)
        return Batch(images, tuple(targets), number, noise), bad

    def key(self, epoch: int, sample: int, repeat: int) -> tuple[int | str, ...]:
        """The random key for the augmentation of an image."""
        return self.seed, "augment", epoch, sample, repeat

    def sample(self, epoch: int, sample: int, repeat: int) -> tuple[np.ndarray, ...]:
        """One augmented image and its targets, as Load has them.

        Errors: Stop, with code DAMAGED if the content of the file is damaged.
        """
        try:
            with chance.scope(*self.key(epoch, sample, repeat)):
                return self.load(self.source, sample)
        except Undecodable as error:
            raise Stop(
                Exit.DAMAGED,
                f"{self.source.where(sample)}: {error}",
                "images that Pillow can decode completely",
                "repair or remove the file; or prepare the data with reconverge prepare --drop-unreadable; or"
                " replace damaged training images by others with data.on_bad_image=substitute",
            ) from None

    def _good(
        self, epoch: int, sample: int, repeat: int, bad: list[Bad]
    ) -> tuple[tuple[np.ndarray, ...], int]:
        """What is loaded of a sample, and its id. If it is damaged: of its substitute, and an entry is added
        to `bad`.
        """
        for _attempt in range(100):
            try:
                return self.sample(epoch, sample, repeat), sample
            except Stop as stop:
                if self.on_bad_image == "stop" or stop.code != Exit.DAMAGED:
                    raise
                if self._blank is not None:
                    bad.append(Bad(sample, stop.args[1], None))
                    return self._blank, sample
                other = chance.key("substitute", sample) % len(self.source)
                bad.append(Bad(sample, stop.args[1], other))
                trouble, sample = stop, other
        raise trouble


class Quarantine:
    """quarantine.jsonl lists every replaced sample once. More than `limit` of them stop the run."""

    def __init__(self, path: Path, limit: int):
        self.path, self._limit = path, limit
        self.samples = {entry["sample"] for entry in files.json_lines(path)}

    def note(self, bad: list[Bad], writes: bool = True) -> None:
        """Record `bad`, the replaced samples of all ranks. Each rank counts them; only one rank `writes`.

        Errors: Stop(DAMAGED).
        """
        for entry in bad:
            if entry.sample in self.samples:
                continue
            self.samples.add(entry.sample)
            if writes:
                with files.appending(self.path) as file:
                    file.write(files.json_line(entry._asdict()))
            if len(self.samples) > self._limit:
                raise Stop(
                    Exit.DAMAGED,
                    f"{len(self.samples)} damaged images were replaced; the last one is {entry.reason}",
                    f"at most data.max_substitutes={self._limit} damaged images",
                    f"repair the images that {self.path} lists, or use a larger data.max_substitutes=",
                )


class Feed:
    """Iterates over batches on the device. `waited` is the sum of seconds that the host waited for data
    workers.

    With `ahead`, the next batch is copied on a second CUDA stream while the device computes the current one.
    """

    def __init__(
        self,
        images: Images,
        microbatches: Iterable[Microbatch | Stop],
        workers: int,
        device: torch.device,
        ahead: bool,
        quarantine: Quarantine | None = None,
    ):
        self.waited = 0.0
        self.early: Early | None = None
        self._quarantine = quarantine
        self._bad: list[Bad] = []
        self._device = device
        self._ahead = ahead
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and ahead else None
        self._loader = DataLoader(
            images,
            sampler=microbatches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # otherwise each iterator draws a seed from the global generator
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            collate_fn=_as_it_is,
        )

    def __iter__(self) -> Iterator[Batch]:
        loaded = iter(self._loader)
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
            _end_workers(loaded)

    def _next(self, loaded: Iterator[tuple[Batch, list[Bad]] | Stop]) -> Batch | None:
        started = time.perf_counter()
        try:
            arrived = next(loaded, None)
        # torch reports a dead worker itself, except one that dies while it sends a batch.
        except (ConnectionError, EOFError) as error:
            raise RuntimeError(f"DataLoader worker Killed while it sent a batch ({reason(error)})") from error
        finally:
            self.waited += time.perf_counter() - started
        if isinstance(arrived, Stop):
            raise arrived
        if arrived is None:
            return None
        batch, bad = arrived
        self._bad += bad
        if self._device.type == "cpu":
            return batch
        with torch.cuda.stream(self._side):  # None means the current stream
            images = batch.images.to(self._device, non_blocking=True)
            targets = tuple(target.to(self._device, non_blocking=True) for target in batch.targets)
            noise = batch.noise and batch.noise.to(self._device)
            return Batch(images, targets, batch.digest, noise)

    def news(self) -> bool:
        """Whether this rank has something for `settle`, which all ranks call if one of them has."""
        return bool(self._bad) or (self.early is not None and self.early.news())

    def settle(self, world: World) -> None:
        """Record the samples that any rank has replaced since the last call. Errors: Stop(DAMAGED), also if
        a validation image is damaged, at which the next evaluation would stop.
        """
        bad = self.damaged(world)
        if self.early is not None:
            self.early.settle(world)
        if self._quarantine:
            self._quarantine.note(bad, writes=world.rank == 0)

    def damaged(self, world: World) -> list[Bad]:
        """The damaged samples that any rank has met since the last call."""
        bad = [entry for entries in world.gather_objects(self._bad) for entry in entries]
        self._bad = []
        return bad

    def _arrived(self, batch: Batch) -> Batch:
        if self._side is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._side)
            for part in (batch.images, *batch.targets, *(batch.noise or ())):
                part.record_stream(current)
        return batch


def _stacked(parts: tuple[np.ndarray, ...]) -> Tensor:
    """One part of each sample, such as its pixels (H, W, 3) or its label, as one tensor (N, ...). In a data
    worker it is in shared memory, as with torch's own collate function.
    """
    shape, kind = (len(parts), *parts[0].shape), torch.from_numpy(np.empty(0, parts[0].dtype)).dtype
    if get_worker_info() is None:
        stacked = torch.empty(shape, dtype=kind)
    else:
        shared = torch.UntypedStorage._new_shared(math.prod(shape) * kind.itemsize)
        stacked = torch.empty(0, dtype=kind).set_(shared, 0, shape)  # type: ignore[call-overload]
    np.stack(parts, out=stacked.numpy())
    return stacked


def _as_it_is(batch: Any) -> Any:
    return batch


def _end_workers(loaded: Any) -> None:
    if hasattr(loaded, "_shutdown_workers"):
        loaded._shutdown_workers()
        for worker in loaded._workers:
            worker.kill()


@atexit.register
def _kill_children() -> None:
    """Kill data workers that are left after an error.

    At exit, Python sends them SIGTERM, which they ignore, and would then wait for them forever.
    """
    for process in multiprocessing.active_children():
        process.kill()


def _ignore_signals(worker: int) -> None:
    """Slurm and terminals send signals to every process of a job. Only the main process reacts, and it ends
    its workers itself.
    """
    for number in CAUGHT:
        signal.signal(number, signal.SIG_IGN)
