"""Distributes samples over shards in one pass with limited memory. A journal makes it possible to continue
after a kill.
"""

import io
import json
import os
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import xxhash
from webdataset.writer import TarWriter

from reconverge.base import files
from reconverge.data.samples import LABEL_MAP

MEMORY = 256 << 20, 4 << 30  # smallest and largest buffer for samples before they are written, in bytes
# Bytes that are appended to a shard at a time. With 6,000 shards on a hard disk, appending single samples
# would take weeks.
PIECE = 1 << 20
END = bytes(1024)  # end-of-archive blocks


class Scatter:
    """The shards of several splits. Only the key of a sample decides its shard. Samples count as written when
    commit() has written the journal.

    After a kill, shards and report are truncated to the lengths in the journal.
    """

    def __init__(self, folder: Path, work: Path, shards: dict[str, int], threads: Executor):
        self.folder, self._work, self._shards, self._threads = folder, work, shards, threads
        self._waiting: dict[str, tuple[io.BytesIO, TarWriter]] = {}
        self._report: list[str] = []
        self._buffered = 0
        self._limit = min(max(PIECE * sum(shards.values()), MEMORY[0]), MEMORY[1])
        journal = work / "journal.json"
        self.state: dict[str, Any] = {
            "split": 0,
            "taken": 0,
            "images": {},
            "content": {},
            "dropped": 0,
            "read": 0,
            "lengths": {"report.jsonl": 0},
        }
        if journal.exists():
            self.state = json.loads(journal.read_text())
        for path in [folder / name for split in shards for name in self.names(split)] + [
            folder / "report.jsonl"
        ]:
            if path.exists() and path.name not in self.state["lengths"]:
                path.unlink()
            elif path.exists():
                os.truncate(path, self.state["lengths"][path.name])

    def names(self, split: str) -> list[str]:
        return [f"{split}-{number:06d}.tar" for number in range(self._shards[split])]

    def add(self, split: str, key: str, suffix: str, data: bytes, target: dict[str, bytes]) -> None:
        """Add a sample: the image KEY.suffix, and its label or label map, {suffix: content}."""
        place = xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape")) % self._shards[split]
        name = f"{split}-{place:06d}.tar"
        if name not in self._waiting:
            buffer = io.BytesIO()
            self._waiting[name] = (
                buffer,
                TarWriter(buffer, user="reconverge", group="reconverge", mtime=0, encoder=False),
            )
        self._waiting[name][1].write({"__key__": key, suffix: data} | target)
        self._buffered += len(data) + sum(map(len, target.values()))
        self.state["images"][split] = self.state["images"].get(split, 0) + 1
        hashed = content(key, data, target.get(LABEL_MAP))
        self.state["content"][split] = self.state["content"].get(split, 0) ^ hashed

    def report(self, line: dict[str, Any]) -> None:
        self._report.append(json.dumps(line) + "\n")

    def full(self) -> bool:
        return self._buffered >= self._limit

    def commit(self) -> None:
        """Write the buffered samples and sync them; then write the journal, which makes them valid."""
        lengths: dict[str, int] = self.state["lengths"]

        def append(name: str, data: bytes | memoryview) -> tuple[str, int]:
            with open(self.folder / name, "ab") as file:
                file.write(data)
            return name, lengths.get(name, 0) + len(data)

        pieces: dict[str, bytes | memoryview] = {"report.jsonl": "".join(self._report).encode()}
        for name, (buffer, writer) in self._waiting.items():
            size = writer.tarstream.offset  # without the end-of-archive blocks, which close() writes
            writer.close()
            pieces[name] = buffer.getbuffer()[:size]
        lengths.update(dict(self._threads.map(append, pieces.keys(), pieces.values())))
        os.sync()  # one call, because fsync for each of thousands of files takes longer than writing them
        self._waiting.clear()
        self._report.clear()
        self._buffered = 0
        files.write_whole(self._work / "journal.json", json.dumps(self.state))

    def abandon(self) -> None:
        """Discard the buffered samples."""
        for _, writer in self._waiting.values():
            writer.close()
        self._waiting.clear()

    def end(self) -> None:
        """Append the end-of-archive blocks to every shard. It may be repeated after a kill."""
        for split in self._shards:
            for name in self.names(split):
                with open(self.folder / name, "ab") as file:
                    file.truncate(self.state["lengths"].get(name, 0))
                    file.write(END)
        os.sync()


def content(key: str, data: bytes, label_map: bytes | None = None) -> int:
    """A 64-bit hash of a sample. The hashes of a split are combined with exclusive or, in any order."""
    seed = xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))
    hashed = xxhash.xxh3_64_intdigest(data, seed=seed)
    return hashed if label_map is None else hashed ^ xxhash.xxh3_64_intdigest(label_map, seed=seed ^ 1)
