"""Checks that two checkouts of this repository train the same bits, for changes that must not change results.

    git worktree add /tmp/before COMMIT
    python benchmarks/same_bits.py /tmp/before

Trains the same short runs with the code of both checkouts and the packages of this Python. Compares every
line of record.jsonl, and the sha256 of raw weights, EMA weights and optimizer state. Prints a Markdown table;
the exit code is 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
FAST = ["threads=1", "evaluate_every=never", "save_every=0", "log_every=1", "device=cpu"]
AUGMENTED = [
    "augment.size=64", "evaluate.size=64", "augment.auto=rand-m9-mstd0.5-inc1", "augment.scale=[0.08,1.0]",
    "augment.flip=0.5", "augment.erase=0.25", "augment.repeats=2", "mix.mixup=0.8", "mix.cutmix=1.0",
    "model.drop_path=0.2",
]  # fmt: skip
BATCH_NORM = [
    "model=timm", "model.timm=test_resnet", "model.drop_path=0.1", "batch=64", "microbatch=8",
    "augment.erase=0.25", "mix.mixup=0.8", "mix.cutmix=1.0", "optim.clip=1.0", "steps=8",
]  # fmt: skip


class Job(NamedTuple):
    arguments: list[str]
    ranks: int = 1


JOBS = {
    "demo, workers=0": Job(["steps=20", "workers=0"]),
    "demo, workers=1": Job(["steps=20", "workers=1"]),
    "every augmentation at 64 px": Job(["batch=32", "microbatch=8", "steps=6", "workers=1", *AUGMENTED]),
    "the same by forward passes of 4": Job(
        ["batch=32", "microbatch=8", "forward_images=4", "steps=3", "workers=0", *AUGMENTED]
    ),
    "BatchNorm, 2 ranks, ddp": Job([*BATCH_NORM, "reduce=ddp", "workers=0"], ranks=2),
    "BatchNorm, 2 ranks, tree": Job([*BATCH_NORM, "reduce=tree", "workers=0"], ranks=2),
    "EMA, evaluated": Job(["steps=10", "workers=0", "ema.decay=0.9", "evaluate_every=5", "save_every=5"]),
    "fine-tuned with layer decay": Job(
        ["init=runs/EMA-evaluated:ema", "optim.layer_decay=0.7", "model.head_init_scale=0.001",
         "init_head=fresh", "recipe.starts_from=demo", "steps=6", "workers=0"]
    ),
}  # fmt: skip


def trained(checkout: Path, folder: Path, name: str, job: Job) -> dict[str, str]:
    """The results of a run: file name -> sha256 of the tensors, and the text of record.jsonl."""
    run = name.replace(", ", "-").replace(" ", "-").replace("=", "-")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
    command = [sys.executable, *(launcher if job.ranks > 1 else []), str(checkout / "train.py")]
    arguments = [*FAST, f"data.cache={folder / 'cache'}", f"run={run}", *job.arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{checkout}: {name} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    path = folder / "runs" / run
    newest = sorted((path / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "MANIFEST.json").read_text())["files"]
    tensors = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return tensors | {"record.jsonl": (path / "record.jsonl").read_text()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--only", nargs="+", choices=JOBS, metavar="JOB", help="run only these jobs")
    arguments = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            checkout: Path(scratch) / str(number) for number, checkout in enumerate((arguments.other, HERE))
        }
        for folder in folders.values():
            folder.mkdir()
        print("| run | steps | raw | EMA | optimizer | record.jsonl |\n|---|---|---|---|---|---|")
        for name in arguments.only or JOBS:
            before, now = (trained(*place, name, JOBS[name]) for place in folders.items())
            cells = [str(len(now["record.jsonl"].splitlines()))]
            for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "record.jsonl"):
                one, other = before.get(file), now.get(file)
                different += one != other
                same = "equal" if file == "record.jsonl" else f"equal, {str(now.get(file))[:12]}"
                cells.append("none" if one is other is None else same if one == other else "DIFFERENT")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
