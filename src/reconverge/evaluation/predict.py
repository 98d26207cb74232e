"""Predicts the five most probable classes of images without labels: predictions.csv and a picture."""

import csv
from itertools import chain
from pathlib import Path

import numpy as np
from torch import nn

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import anew, patiently
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
                if found.suffix.lower() in known
                and not found.name.startswith(".")
                and (found.is_file() or found.is_symlink())  # never a pipe or a device
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
        """Errors: Stop(DAMAGED, DISK)."""
        try:
            return patiently(self.paths[sample].read_bytes, self.paths[sample].__str__)
        except OSError as error:
            raise Stop(
                Exit.DAMAGED,
                f"{self.paths[sample]}: {error.strerror}",
                "files that this user may read",
                "correct images=, or the permissions",
            ) from None

    def where(self, sample: int) -> str:
        return str(self.paths[sample])


def predict(
    given: str | list[str], folder: Path, nets: dict[str, nn.Module], classes: list[str], evaluator: Evaluator
) -> int:
    """Write predictions.csv and predicted.png into `folder`, with the EMA weights if there are any.

    Errors: Stop(DAMAGED) after both are written, if images were broken; predictions.csv names them.
    """
    source, weights, best = Files(given), list(nets)[-1], min(5, len(classes))  # ema comes after raw
    evaluator = evaluator._replace(on_bad_image="substitute")  # leaves broken images out
    tables = evaluator.table(top5, 2 * best, {weights: nets[weights]}, source)
    if tables is None:
        say("stopped before the end; no file was written")
        return Exit.PREEMPTED
    table = tables.of[weights].numpy()
    if not np.isfinite(table).all():
        raise Stop(
            Exit.NOT_FINITE,
            f"the probabilities of the {weights} weights are not finite",
            "finite probabilities",
            "precision=fp32; if that does not help, the weights are broken",
        )
    rows, picture = folder / "predictions.csv", folder / "predicted.png"
    answers = [[classes[label] for label in row] for row in table[:, :best].astype(int)]
    shares, broken = table[:, best:], {bad.sample: bad.reason for bad in tables.left_out}
    if evaluator.world.rank == 0:
        written = dict(zip(tables.ids.tolist(), zip(answers, shares, strict=True), strict=True))
        _write(rows, source, best, written, broken)
        shown = tables.ids[:32].tolist()
        captions = [
            pictures.captioned(answers[row][0], shares[row, 0], source.where(sample))
            for row, sample in enumerate(shown)
        ]
        title = f"{len(answers)} images: most probable class ({weights} weights)"
        if shown:
            pictures.sheet(picture, pixels(source, shown, evaluator.settings), captions, title)
    say(f"predicted {len(answers)} images with the {weights} weights: {rows}; the first images: {picture}")
    if broken:
        raise Stop(
            Exit.DAMAGED,
            f"{len(broken)} of {len(source)} images could not be read: {'; '.join(list(broken.values())[:5])}"
            f"{f'; and {len(broken) - 5} more' if len(broken) > 5 else ''}",
            f"images that Pillow can decode completely; the other {len(answers)} are in {rows}, whose column"
            " error names the broken ones",
            "repair or remove these files",
        )
    return Exit.DONE


def _write(
    path: Path,
    source: Files,
    best: int,
    found: dict[int, tuple[list[str], np.ndarray]],
    broken: dict[int, str],
) -> None:
    """The table of all images in order. There is a column `error` if some were broken."""
    with anew(path) as draft, open(draft, "w", newline="") as file:
        heads = [f"{what}{place}" for place in range(1, best + 1) for what in ("class", "probability")]
        csv.writer(file).writerow(["image", *heads, *(["error"] if broken else [])])
        for sample, image in enumerate(source.paths):
            cells = [""] * (2 * best)
            if sample in found:
                names, shares = found[sample]
                cells = list(chain(*zip(names, (f"{share:.6f}" for share in shares), strict=True)))
            csv.writer(file).writerow([image, *cells, *([broken.get(sample, "")] if broken else [])])
