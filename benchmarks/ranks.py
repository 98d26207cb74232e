"""Measures how training scales from one rank to two, and the cost of reduce=tree.

    python benchmarks/ranks.py [--repeats 5] [--steps 6] [override ...]

Runs train.py with one thread per rank: with one and two ranks, and with reduce=ddp and tree. The runs take
turns, so that noise of the machine affects all of them. Prints medians of images/s. For comparison, two
independent runs with one rank at the same time show the highest possible speed on two cores. Default:
convnext_t at 96 px on the digits, with eight microbatches of 4.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from reconverge.base import files
from reconverge.commands import processes

JOB = ["model=convnext_t", "recipe.name=mine", "augment.size=96", "evaluate.size=96", "batch=32",
    "microbatch=4", "model.drop_path=0.1",
    "threads=1", "workers=0", "evaluate_every=never", "save_every=0", "log_every=1"]  # fmt: skip


def images_per_second(
    folder: Path, ranks: int, reduce: str, steps: int, overrides: list[str], runs: int = 1
) -> float:
    """The sum over `runs` simultaneous runs of the median speed of each, without its first two steps."""
    names = [f"{reduce}-{ranks}-{number}" for number in range(runs)]
    started = []
    for name in names:
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
        command = [
            *processes.command(processes.script(), ranks),
            *JOB,
            f"steps={steps}",
            f"reduce={reduce}",
            f"run={name}",
            *overrides,
        ]
        started.append(
            subprocess.Popen(
                command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
            )
        )
    assert not any([process.wait() for process in started])
    lines = [files.json_lines(folder / "runs" / name / "metrics.jsonl")[2:] for name in names]
    return sum(statistics.median(line["images_per_second"] for line in of_run) for of_run in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    arguments, overrides = parser.parse_known_args()
    ways = {
        "ddp, 1 rank": (1, "ddp", 1),
        "ddp, 2 ranks": (2, "ddp", 1),
        "two runs of 1 rank": (1, "ddp", 2),
        "tree, 1 rank": (1, "tree", 1),
        "tree, 2 ranks": (2, "tree", 1),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for way, (ranks, reduce, runs) in ways.items():
                found[way].append(
                    images_per_second(Path(folder), ranks, reduce, arguments.steps, overrides, runs)
                )
    medians = {way: statistics.median(speeds) for way, speeds in found.items()}
    print(f"{'':<20} images/s   / one rank    / two separate runs   (medians of {arguments.repeats})")
    for way, speed in medians.items():
        print(
            f"{way:<20} {speed:<10.2f} {speed / medians['ddp, 1 rank']:<13.2f}"
            f" {speed / medians['two runs of 1 rank']:.2f}"
        )
    for way, speeds in found.items():
        print(f"{way:<20} {' '.join(f'{speed:.2f}' for speed in speeds)}")


if __name__ == "__main__":
    main()
