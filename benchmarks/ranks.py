"""How training scales from one rank to two, and what adding gradients by a tree costs.

    python benchmarks/ranks.py [--repeats 5] [--steps 6] [override ...]

Runs train.py itself, one thread a rank: one rank and two, reduce=ddp and tree, in turn, so that a noisy machine is noisy to all; medians
of images/s. Default: convnext_t at 96 px on the digits, eight microbatches of 4.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from reconverge import jobs, jsonl

JOB = ["model=convnext_t", "recipe.name=mine", "augment.size=96", "evaluate.size=96", "batch=32", "microbatch=4", "model.drop_path=0.1",
       "threads=1", "workers=0", "evaluate_every=never", "save_every=0", "log_every=1"]  # fmt: skip


def images_per_second(folder: Path, ranks: int, reduce: str, steps: int, overrides: list[str]) -> float:
    """Of a run of its own: the median over its steps after the second."""
    name = f"{reduce}-{ranks}"
    command = [*jobs.command(jobs.script(), ranks), *JOB, f"steps={steps}", f"reduce={reduce}", f"run={name}", *overrides]
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    return statistics.median(line["images_per_second"] for line in jsonl.lines(folder / "runs" / name / "metrics.jsonl")[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    arguments, overrides = parser.parse_known_args()
    found: dict[tuple[int, str], list[float]] = {(ranks, reduce): [] for reduce in ("ddp", "tree") for ranks in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for (ranks, reduce), speeds in found.items():
                speeds.append(images_per_second(Path(folder), ranks, reduce, arguments.steps, overrides))
    one = statistics.median(found[1, "ddp"])
    print(f"{'reduce':<8} {'ranks':<6} images/s   to one rank by ddp   (medians of {arguments.repeats})")
    for (ranks, reduce), speeds in found.items():
        print(f"{reduce:<8} {ranks:<6} {statistics.median(speeds):<10.2f} {statistics.median(speeds) / one:.2f}")


if __name__ == "__main__":
    main()
