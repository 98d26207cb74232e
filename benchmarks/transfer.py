"""Measures the gain of pre-trained weights (init=): pre-training on ten digits, then fine-tuning on pairs of
digits with few images at a larger resolution.

    python benchmarks/transfer.py [--seeds 3] [--parents 3] [--images 10] [--epochs 8] [--pretrain-epochs 12]
    [override ...]

For each seed there are three runs of train.py: pre-training at 64 px on ten classes, fine-tuning at 96 px on
five classes with init=runs/NAME:ema, and the same fine-tuning without init=. No image is in both training
sets, and no validation image is in either. Prints top-1 of the EMA weights on the validation images. The exit
code is 1 if the smallest gain of a seed is not larger than the spread over the seeds (largest minus smallest
top-1) of each kind of run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from reconverge.config.settings import Data
from reconverge.data.sources import open_sources

ROOT = Path(__file__).parents[1]


def label_sets(root: Path, images: int) -> None:
    """Write root/digits and root/pairs. The first `images` training images of each digit go to root/pairs,
    with the classes 0-1, 2-3 and so on; the others go to root/digits.

    Both have the same validation images: those of data=digits.
    """
    open_sources(Data("digits", "digits"))  # writes the bundled digits as class folders
    bundled = Path(Data.cache).expanduser() / "digits-1"
    for split in ("train", "val"):
        for digit in range(10):
            files = sorted((bundled / split / str(digit)).iterdir())
            few, rest = (files[:images], files[images:]) if split == "train" else (files, files)
            for folder, chosen in (
                (root / "digits" / split / str(digit), rest),
                (root / "pairs" / split / f"{digit // 2 * 2}-{digit // 2 * 2 + 1}", few),
            ):
                folder.mkdir(parents=True, exist_ok=True)
                for file in chosen:
                    shutil.copy(file, folder)


def train(folder: Path, run: str, *arguments: str) -> float:
    """Train, and return top-1 of the EMA weights after the last step, in percent."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "data=folder",
        f"run={run}",
        "evaluate_every=0",
        "save_every=0",
        *arguments,
    ]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    records = [
        json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    ]
    return [record["ema_top1"] for record in records if "ema_top1" in record][-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--parents",
        type=int,
        default=None,
        help="number of pre-training runs; further seeds use the last of them",
    )
    parser.add_argument("--images", type=int, default=10, help="images of each digit for fine-tuning")
    parser.add_argument(
        "--epochs", type=int, default=8, help="epochs of fine-tuning and of training from scratch"
    )
    parser.add_argument("--pretrain-epochs", type=int, default=12)
    options, overrides = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp())
    label_sets(folder, options.images)
    # 64 and 96 px are multiples of 32, so the last stage has 2 x 2 and 3 x 3 cells; at 48 px a third of the
    # image would be cut off. Pre-training uses crops of many sizes, so that its features also work at the
    # other resolution. Because there are few steps, there is no mixing, and the EMA averages only the last
    # steps.
    plain = ["mix.mixup=0", "mix.cutmix=0", "optim.warmup_epochs=1"]
    first = [
        *plain, f"data.root={folder}/digits", f"epochs={options.pretrain_epochs}", "augment.size=64",
        "evaluate.size=64", "batch=64",
        "microbatch=64", "augment.scale=[0.25,1.0]", "ema.decay=0.95", *overrides,
    ]  # fmt: skip
    tune = [
        *plain, f"data.root={folder}/pairs", f"epochs={options.epochs}", "augment.size=96",
        "evaluate.size=96", "batch=20",
        "microbatch=20", "optim.lr=1e-3", "ema.decay=0.9", *overrides,
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
        print(
            f"{seed:<4}  {given:<21.2f}  {scratch:<12.2f}  {tuned:<10.2f}  {tuned - scratch:.2f}", flush=True
        )
    spread = max(max(column) - min(column) for column in zip(*rows, strict=True))
    gain = min(tuned - scratch for scratch, tuned in rows)
    print(
        f"smallest gain {gain:.2f}, largest spread over the seeds {spread:.2f}: the gain is"
        f" {'larger' if gain > spread else 'NOT larger'} than the spread"
    )
    shutil.rmtree(folder)
    sys.exit(0 if gain > spread else 1)


if __name__ == "__main__":
    main()
