"""Measures opening and seeking in an index of 14 M rows, and the memory of a worker. Prints a line of JSON.

    python benchmarks/index.py INDEX.npy SHARDS

tests/test_shards.py makes such an index and checks the counts; nothing checks the times.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from reconverge.data.index import Index
from reconverge.data.order import Order, Windows


def held() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def read() -> int:
    """Bytes that this process has read, including from the page cache."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def main() -> None:
    path, shards = Path(sys.argv[1]), int(sys.argv[2])
    seen: dict[str, object] = {}
    before, began = read(), time.perf_counter()
    index = Index(path)
    seen["opening, ms"] = 1000 * (time.perf_counter() - began)
    seen["opening reads"] = read() - before
    seen["rows"] = rows = len(index)
    random = np.random.default_rng(0)
    for name, windows in (
        ("all", None),
        ("windows of 8", Windows(np.full(shards, rows // shards), 8, seed=0)),
    ):
        order = Order(rows, 4096, 32, seed=0, windows=windows)
        times = []
        for step in random.integers(0, 90 * (rows // 4096), 30):
            began = time.perf_counter()
            ids = order.microbatch(int(step), 0).ids
            index.rows(ids)
            times.append(1000 * (time.perf_counter() - began))
        seen[f"seek to a step, {name}, ms: first, median"] = [times[0], sorted(times)[15]]
    before, correct = held(), True
    for step in random.integers(0, 90 * (rows // 4096), 2000):
        ids = order.microbatch(int(step), 5).ids
        correct &= bool((index.labels(ids) == ids % 21841).all())
    seen["held by 2000 microbatches"] = held() - before
    seen["correct labels"] = correct
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
