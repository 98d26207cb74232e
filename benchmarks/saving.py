"""How long training waits for a checkpoint: written at once, and written in the background by Saver.

    python benchmarks/saving.py [--megabytes 200] [--repeats 7]

A model of so many megabytes with an EMA and AdamW's two moments, four times as much in all, on the CPU.
Between two saves the loop computes for as long as a save takes. The two ways take turns; medians are printed.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from reconverge.run.saving import Saver, prune, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tensors = {
        name: {f"layer{number}": torch.randn(given.megabytes * count * 10**6 // 80) for number in range(20)}
        for name, count in (("model", 1), ("ema", 1), ("optimizer", 2))
    }
    root = Path(tempfile.mkdtemp(dir=given.folder))
    saver, waited = Saver(root / "background"), {"at once": [], "in the background": []}
    try:
        for step in range(1, given.repeats + 1):
            began = time.perf_counter()
            save(root / "at once", step, tensors, {})
            prune(root / "at once", step, 1, [])
            seconds = time.perf_counter() - began
            waited["at once"].append(seconds)
            began = time.perf_counter()
            saver.begin(step, tensors, {}, 1, [])
            waited["in the background"].append(time.perf_counter() - began)
            end = time.perf_counter() + 2 * seconds
            while time.perf_counter() < end:  # the steps until the next save
                tensors["model"]["layer0"].mul_(1.0)
        saver.close()
    finally:
        shutil.rmtree(root)
    print(f"{4 * given.megabytes} MB a checkpoint, {given.repeats} of each way, seconds that the loop waits:")
    for way, seconds in waited.items():
        print(
            f"  {way:<18} median {statistics.median(seconds):.3f}, {min(seconds):.3f} to {max(seconds):.3f}"
        )
    ratio = statistics.median(waited["in the background"]) / statistics.median(waited["at once"])
    print(f"  ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
