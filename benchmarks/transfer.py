"""Does a start from other weights help? Pre-train on which digit it is, fine-tune on pairs of digits, with
few images at a larger resolution.

    python benchmarks/transfer.py [--seeds 3] [--parents 3] [--images 10] [--epochs 8] [--pretrain-epochs 12]
    [override ...]

For each seed three runs of train.py in a folder of their own: the pre-training at 64 px on ten classes, the
fine-tuning on five at 96 px with init=runs/NAME:ema, and the same command without it. No image is in both
training sets, and the held-out ones in neither. Prints top-1 of the EMA weights on the held-out images, and
whether the smallest gain of a seed is above the spread (largest less smallest) of either kind of run over the
seeds; exit code 1 if not.
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
    """root/digits and root/pairs: of each digit the first `images` train the second set, labelled 0-1, 2-3
    and so on, the others the first.

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
                (root / "pairs" / split / f"{digit // 2 * 2}-{digit // 2 * 2 + 1}", few),
            ):
                folder.mkdir(parents=True, exist_ok=True)
                for file in chosen:
                    shutil.copy(file, folder)


def train(folder: Path, run: str, *arguments: str) -> float:
    """Train, and return top-1 of the EMA weights after the last step, percent."""
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
        help="seeds that are pre-trained for; the others start from the last of these",
    )
    parser.add_argument("--images", type=int, default=10, help="to fine-tune, of each digit")
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tuning, and of the same from scratch")
    parser.add_argument("--pretrain-epochs", type=int, default=12)
    options, overrides = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp())
    label_sets(folder, options.images)
    # Both have a last stage of whole cells, 2 x 2 and 3 x 3: at 48 px a third of the image would be cut off.
    # The first sees crops of many sizes, so that its features outlast the change of resolution. Few steps: no
    # mixing, and an average of the last ones.
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
        f"smallest gain {gain:.2f}, largest spread over the seeds {spread:.2f}:"
        f" {'above it' if gain > spread else 'NOT above it'}"
    )
    shutil.rmtree(folder)
    sys.exit(0 if gain > spread else 1)


if __name__ == "__main__":
    main()
