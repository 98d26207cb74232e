"""The index of a data set: one array on disk with one row per sample, and no Python object per image."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format

from reconverge.base.files import ByPosition


def row(key_bytes: int, maps: bool = False) -> np.dtype:
    """The dtype of a row: shard number, byte offset in the shard, size in bytes, label, xxh3_64 of the bytes,
    and the key in `key_bytes` bytes. With `maps`, the row has offset, size and xxh3_64 of a label map too.

    For folders, shard, offsets and the image's checksum are 0, and the key is the path below the folder. The
    label of an image with a map is 0.
    """
    of_map = [("map_offset", "<u8"), ("map_size", "<u8"), ("map_checksum", "<u8")]
    return np.dtype(
        [
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("size", "<u8"),
            ("label", "<i4"),
            ("checksum", "<u8"),
            *(of_map if maps else []),
            ("key", f"S{max(1, key_bytes)}"),
        ]
    )


class Index:
    """Rows of one split, by sample id. `table` maps the whole file into memory; `rows` reads single rows.

    Data workers use `rows`: with `table`, each worker would at last hold all 14 M rows in memory.
    """

    def __init__(self, path: Path):
        self.path = path
        self.table = np.load(path, mmap_mode="r")
        self._first = self.table.offset  # byte of row 0 in the file
        self._file = ByPosition(path)

    def __reduce__(self) -> Any:
        return Index, (self.path,)

    def __len__(self) -> int:
        return len(self.table)

    def row(self, sample: int) -> Any:
        return self.rows(np.array(sample))[()]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of sample ids; `ids` has any shape. It takes one or two microseconds per row."""
        dtype = self.table.dtype
        size = dtype.itemsize
        data = b"".join(self._file.read(size, self._first + sample * size) for sample in ids.ravel().tolist())
        return np.frombuffer(data, dtype).reshape(ids.shape)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels (int64) of sample ids; `ids` has any shape."""
        return self.rows(ids)["label"].astype(np.int64)

    def key(self, sample: int) -> str:
        return os.fsdecode(self.row(sample)["key"])


def write(path: Path, parts: list[np.ndarray]) -> None:
    """Write an index of the rows of all parts in order. The parts may have keys of different widths."""
    dtype = row(max(part.dtype["key"].itemsize for part in parts), "map_size" in (parts[0].dtype.names or ()))
    table = format.open_memmap(path, "w+", dtype, (sum(len(part) for part in parts),))
    first = 0
    for part in parts:
        table[first : first + len(part)] = part
        first += len(part)
    table.flush()
