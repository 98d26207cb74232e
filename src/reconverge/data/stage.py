"""Copies the shards that are needed next from slow storage to a local disk; one thread for each node.

The folder of the copies has a file with the name of its run. Nothing is removed from a folder without it, and
from such a folder only what has the name of a copy.
"""

import os
import re
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from reconverge.base.errors import Exit, Stop, explain
from reconverge.base.files import patiently, read_text, write_whole
from reconverge.data.order import Microbatch, Windows
from reconverge.data.shards import Shards, staged_name
from reconverge.data.sources import Source

MARK = "reconverge-stage.txt"  # one line: the run whose copies these are
COPY = re.compile(r"\d{6,}\.tar|\.draft-[0-9a-f]{32}")  # staged_name(shard), and one that is being made


class Stage:
    """Keeps copies of the shards of the current window and the following windows in `folder`, up to
    `gigabytes`.

    Data workers read a copy when it is complete and verified, and before that the same bytes from the source.
    A deleted copy stays readable for processes that have it open.
    """

    def __init__(
        self,
        source: Source,
        windows: Windows | None,
        folder: Path,
        gigabytes: float,
        copies: bool = True,
        run: str = "",
    ):
        """`copies`: whether this rank makes the copies. One rank of each host does; the others only read
        them. `run`: whose copies they are.

        Errors: Stop(USAGE) if two windows do not fit, or if `folder` has anything but copies of this run.
        """
        assert isinstance(source, Shards), "rules.check refuses data.stage for other kinds of data"
        assert windows is not None, "rules.check refuses data.stage with data.window=all"
        self.folder, self._source, self._windows, self._limit = folder, source, windows, gigabytes * 1e9
        largest = windows.width * max(shard["bytes"] for shard in source.shards)
        if self._limit < 2 * largest:
            raise Stop(
                Exit.USAGE,
                f"data.stage_gb={gigabytes:g}",
                f"space for two windows; one window takes up to {largest / 1e9:.3g} GB",
                f"data.stage_gb={2.2 * largest / 1e9:.2g}, or a smaller data.window=",
            )
        self._at: tuple[int, int] | None = None  # epoch and window that are being read
        self._brought: tuple[int, int] | None = None  # epoch and window for which all copies are complete
        self._changed = threading.Condition()
        self._trouble: Stop | None = None
        self._closed = False
        source.staged = folder
        self._thread: threading.Thread | None = None
        if copies:
            self._take(run)
            self._thread = threading.Thread(target=self._work, daemon=True, name="stage")
            self._thread.start()

    def follow(self, microbatches: Iterable[Microbatch]) -> Iterator[Any]:
        """Passes the microbatches on, and tells the copying thread the current window.

        If copying fails, the last item is the Stop(DAMAGED, DISK, ...).
        """
        for microbatch in microbatches:
            if self._trouble:
                yield self._trouble
                return
            at = (microbatch.epoch, microbatch.window)
            if at != self._at:
                with self._changed:
                    self._at = at
                    self._changed.notify()
            yield microbatch

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._source.staged = None
        if self._thread:
            self._thread.join()
            with suppress(OSError):  # of a local disk that failed, or files of others that came meanwhile
                for path in self._copies():
                    path.unlink()
                (self.folder / MARK).unlink()
                self.folder.rmdir()

    def _take(self, run: str) -> None:
        """Make the folder, or empty it of the copies that a killed process of this run left.

        Errors: Stop(USAGE).
        """
        said = f"copies of shards for the run {run}\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in self.folder.iterdir()}
        ours = MARK in there and read_text(self.folder / MARK) == said
        foreign = sorted(name for name in there if not (ours and (name == MARK or COPY.fullmatch(name))))
        if foreign or self.folder.is_symlink():
            raise Stop(
                Exit.USAGE,
                f"data.stage: {self.folder} has files that are not copies of this run:"
                f" {', '.join(foreign[:5]) or 'it is a link'}",
                "a folder in which only this run keeps its copies; nothing was removed",
                "another data.stage=, or remove these files if nobody needs them",
            )
        write_whole(self.folder / MARK, said)
        for path in self._copies():
            path.unlink()

    def _copies(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if COPY.fullmatch(path.name)]

    def _bytes(self, shards: object) -> int:
        return sum(self._source.shards[shard]["bytes"] for shard in shards)  # type: ignore[attr-defined]

    def _wanted(self, epoch: int, window: int) -> list[int]:
        """The shards of this window and of the following ones, as many as fit."""
        wanted: list[int] = []
        room = self._limit
        while True:
            coming = self._windows.shards(epoch, window)
            room -= self._bytes(coming)
            if room < 0 or set(coming.tolist()) & set(wanted):
                return wanted
            wanted += coming.tolist()
            epoch, window = (epoch, window + 1) if window + 1 < self._windows.count else (epoch + 1, 0)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._at != self._brought)
                at = self._at
            if self._closed or at is None:
                return
            try:
                if self._bring(at):
                    self._brought = at
            except Exception as error:
                self._trouble = explain(error) or Stop(
                    Exit.BUG,
                    f"copying shards to data.stage failed: {error!r}",
                    "a local disk that can be written",
                    "data.stage=null to read the shards from their source",
                )
                return

    def _bring(self, at: tuple[int, int]) -> bool:
        """Delete the copies that are not needed, and make the needed ones. False if the window has changed in
        the meantime.
        """
        names = {staged_name(shard): shard for shard in self._wanted(*at)}
        for path in self._copies():
            if path.name not in names:
                path.unlink()
        for name, shard in names.items():
            if self._closed or self._at != at:
                return False
            if not (self.folder / name).exists():
                patiently(partial(self._copy, shard), (self.folder / name).__str__)
        return True

    def _copy(self, shard: int) -> None:
        """Copy one shard. The copy gets its name when it is complete. Errors: Stop(DAMAGED)."""
        about = self._source.shards[shard]
        source, draft = self._source.root / about["name"], self.folder / f".draft-{uuid.uuid4().hex}"
        digest = sha256()
        made = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with open(source, "rb", buffering=0) as reading, open(made, "wb") as writing:
            while not self._closed and (block := reading.read(1 << 22)):
                digest.update(block)
                writing.write(block)
        if self._closed:
            return
        if digest.hexdigest() != about["sha256"]:
            raise Stop(
                Exit.DAMAGED,
                f"{source} is damaged: its sha256 is not the one in dataset.json",
                "shards as reconverge prepare wrote them",
                f"copy the shard again; reconverge check {self._source.root} lists every fault",
            )
        draft.rename(self.folder / staged_name(shard))
