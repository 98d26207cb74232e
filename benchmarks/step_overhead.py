"""Measures the share of a step's CPU time that is not forward, backward, optimizer or EMA.

    python benchmarks/step_overhead.py [--steps 20] [override ...]

Runs train.py, and measures the CPU time of the main process (all its threads) in these four parts. The rest
is the cost of the loop, the preparation of images, the gradient norm and logging. Data workers are separate
processes and listed separately. Default: convnext_t at 224 px on generated JPEGs, batch=16 microbatch=8.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def photographs(root: Path, count: int) -> None:
    """Write smooth JPEGs with some noise, of the usual size in ImageNet, in two classes."""
    random = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 4)):
        for number in range(images):
            folder = root / split / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
                (500, 400), Image.Resampling.BICUBIC
            )
            grain = random.normal(0, 6, (400, 500, 3))
            Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(
                folder / f"{number}.jpg", quality=92
            )


def worker_seconds() -> float:
    """CPU seconds that the children of this process have used so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    arguments, overrides = parser.parse_known_args()

    import train
    from reconverge.models.drop_path import Masked
    from reconverge.run.log import Log
    from reconverge.training import optim
    from reconverge.training.ema import Ema

    spent = dict.fromkeys(("forward", "backward", "optimizer", "EMA"), 0.0)
    rows: list[dict[str, float]] = []
    last = {"cpu": 0.0, "workers": 0.0}

    def timed(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - began

        setattr(owner, name, wrapper)

    timed(Masked, "forward", "forward")
    timed(torch.Tensor, "backward", "backward")
    timed(optim, "update", "optimizer")
    timed(Ema, "update", "EMA")
    step_done = Log.step_done

    def after_step(log: Log, *values: Any) -> None:
        step_done(log, *values)
        now, workers = time.process_time(), worker_seconds()
        rows.append({"step": now - last["cpu"], "workers": workers - last["workers"], **spent})
        last.update(cpu=now, workers=workers)
        spent.update(dict.fromkeys(spent, 0.0))

    Log.step_done = after_step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder) / "images", 96)
        os.chdir(folder)
        sys.argv = ["train.py", "model=convnext_t", "recipe=in1k", "data=folder",
            f"data.root={folder}/images", "data.cache=cache", "batch=16",
            "microbatch=8", "workers=1", "threads=1", "save_every=0", "evaluate_every=0",
            "log_every=1", f"steps={arguments.steps + 2}", *overrides]  # fmt: skip
        train.main()
    rows = rows[2:]  # the first two steps fill caches and allocators
    shares = [1 - sum(row[part] for part in spent) / row["step"] for row in rows]
    print(f"\nCPU seconds of a step, median of {len(rows)}:")
    for part in (*spent, "step", "workers"):
        print(f"  {part:<10} {statistics.median(row[part] for row in rows):8.4f}")
    print(
        f"everything else in the main process: {statistics.median(shares):.2%} of a step (largest"
        f" {max(shares):.2%})"
    )


if __name__ == "__main__":
    main()
