"""Predicts the five most probable classes of images without labels: predictions.csv and a picture."""

import csv
from itertools import chain
from pathlib import Path

import numpy as np
from torch import nn

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import patiently
from reconverge.base.terminal import say
from reconverge.data.image import suffixes
from reconverge.report import pictures
from reconverge.report.pictures import pixels
from reconverge.training.evaluate import Evaluator, top5


class Files:
    """A source (see sources.py) of image files without labels."""

    def __init__(self, given: str | list[str]):
        """`given`: files and folders; all images below a folder are used. Errors: Stop(MISSING)."""
        self.paths: list[Path] = []
        known = suffixes()
        for path in map(Path, [given] if isinstance(given, str) else given):
            below = sorted(
                found
                for found in path.rglob("*")
                if found.suffix.lower() in known and not found.name.startswith(".")
            )
            if not path.exists() or not (below or path.is_file()):
                what = "has no image" if path.exists() else "does not exist"
                raise Stop(
                    Exit.MISSING,
                    f"images: {path} {what}",
                    f"image files, or folders with image files: {', '.join(sorted(known)[:8])}, ...",
                    "correct images=",
                )
            self.paths += below or [path]
        self.classes: list[str] = []
        self.fingerprint = ""
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros_like(ids)

    def read(self, sample: int) -> bytes:
        return patiently(self.paths[sample].read_bytes, self.paths[sample].__str__)

    def where(self, sample: int) -> str:
        return str(self.paths[sample])


def predict(
    given: str | list[str], folder: Path, nets: dict[str, nn.Module], classes: list[str], evaluator: Evaluator
) -> int:
    """Write predictions.csv and predicted.png into `folder`, with the EMA weights if there are any."""
    source, weights, best = Files(given), list(nets)[-1], min(5, len(classes))  # ema comes after raw
    tables = evaluator.table(top5, 2 * best, {weights: nets[weights]}, source)
    if tables is None:
        say("stopped before the end; no file was written")
        return Exit.PREEMPTED
    table = tables[weights].numpy()
    if not np.isfinite(table).all():
        raise Stop(
            Exit.NOT_FINITE,
            f"the probabilities of the {weights} weights are not finite",
            "finite probabilities",
            "precision=fp32; if that does not help, the weights are broken",
        )
    answers, shares = (
        [[classes[label] for label in row] for row in table[:, :best].astype(int)],
        table[:, best:],
    )
    rows, picture = folder / "predictions.csv", folder / "predicted.png"
    if evaluator.world.rank == 0:
        with open(rows, "w", newline="") as file:
            heads = [f"{what}{place}" for place in range(1, best + 1) for what in ("class", "probability")]
            csv.writer(file).writerow(["image", *heads])
            for path, names, of in zip(source.paths, answers, shares, strict=True):
                pairs = zip(names, (f"{share:.6f}" for share in of), strict=True)
                csv.writer(file).writerow([path, *chain.from_iterable(pairs)])
        shown = range(min(32, len(source)))
        captions = [f"{shares[sample, 0]:.0%}\n{answers[sample][0]}" for sample in shown]
        title = f"{len(source)} images: most probable class ({weights} weights)"
        pictures.sheet(picture, pixels(source, shown, evaluator.settings), captions, title)
    say(f"predicted {len(source)} images with the {weights} weights: {rows}; the first images: {picture}")
    return Exit.DONE
