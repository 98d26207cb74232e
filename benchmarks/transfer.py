"""Does a start from other weights help? Pre-train on which digit it is, fine-tune on odd or even, with few images at a larger resolution.

    python benchmarks/transfer.py [--seeds 3] [--parents 3] [--images 4] [--epochs 40] [--pretrain-epochs 25] [override ...]

For each seed three runs of train.py in a folder of their own: the pre-training at 32 px on ten classes, the fine-tuning on two at
48 px with init=runs/NAME:ema, and the same command without it. No image is in both training sets, and the held-out ones in neither.
Prints top-1 of the EMA weights on the held-out images, and whether the smallest gain of a seed is above the spread (largest less
smallest) of either kind of run over the seeds; exit code 1 if not.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from reconverge.data.sources import open_sources
from reconverge.settings import Data

ROOT = Path(__file__).parents[1]


def label_sets(root: Path, images: int) -> None:
    """root/digits and root/parity: of each digit the first `images` train the second set, with the labels odd and even, the others the first.

    The held-out fifth of the digits is the validation set of both.
    """
    open_sources(Data("digits", "digits"))  # writes the bundled digits as class folders
    bundled = Path(Data.cache).expanduser() / "digits-1"
    for split in ("train", "val"):
        for digit in range(10):
            files = sorted((bundled / split / str(digit)).iterdir())
            few, rest = (files[:images], files[images:]) if split == "train" else (files, files)
            for folder, chosen in (
                (root / "digits" / split / str(digit), rest),
                (root / "parity" / split / ("even", "odd")[digit % 2], few),
            ):
                folder.mkdir(parents=True, exist_ok=True)
                for file in chosen:
                    shutil.copy(file, folder)


def train(folder: Path, run: str, *arguments: str) -> float:
    """Train, and return top-1 of the EMA weights after the last step, percent."""
    command = [sys.executable, str(ROOT / "train.py"), "data=folder", f"run={run}", "evaluate_every=0", "save_every=0", *arguments]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return [record["ema_top1"] for record in records if "ema_top1" in record][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parents", type=int, default=None, help="seeds that are pre-trained for; the others start from the last of these")
    parser.add_argument("--images", type=int, default=4, help="to fine-tune, of each digit")
    parser.add_argument("--epochs", type=int, default=40, help="of fine-tuning, and of the same from scratch")
    parser.add_argument("--pretrain-epochs", type=int, default=25)
    options, overrides = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp())
    label_sets(folder, options.images)
    # The first sees crops of many sizes, so that its features outlast the change of resolution; the others do without mixing (Table 6).
    first = [f"data.root={folder}/digits", f"epochs={options.pretrain_epochs}", "augment.scale=[0.3,1.0]", *overrides]
    tune = [
        f"data.root={folder}/parity", f"epochs={options.epochs}", "augment.size=48", "evaluate.size=48", "batch=20", "microbatch=20",
        "optim.lr=1e-3", "optim.warmup_epochs=1", "mix.mixup=0", "mix.cutmix=0", "ema.decay=0.9", *overrides,
    ]  # fmt: skip
    rows = []
    print("seed  pre-trained on digits  from scratch  from init=  gain", flush=True)
    for seed in range(options.seeds):
        parent = min(seed, (options.parents or options.seeds) - 1)
        if parent == seed:
            given = train(folder, f"digits{seed}", *first, f"seed={seed}")
        scratch = train(folder, f"scratch{seed}", *tune, f"seed={seed}")
        tuned = train(folder, f"tuned{seed}", *tune, f"seed={seed}", f"init=runs/digits{parent}:ema")
        rows.append((scratch, tuned))
        print(f"{seed:<4}  {given:<21.2f}  {scratch:<12.2f}  {tuned:<10.2f}  {tuned - scratch:.2f}", flush=True)
    spread = max(max(column) - min(column) for column in zip(*rows, strict=True))
    gain = min(tuned - scratch for scratch, tuned in rows)
    print(f"smallest gain {gain:.2f}, largest spread over the seeds {spread:.2f}: {'above it' if gain > spread else 'NOT above it'}")
    shutil.rmtree(folder)
    sys.exit(0 if gain > spread else 1)


if __name__ == "__main__":
    main()
