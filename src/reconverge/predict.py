"""The five most probable classes of images that nobody labelled: predictions.csv, and a sheet of pictures."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from reconverge import pictures
from reconverge.data import transforms
from reconverge.data.files import patiently
from reconverge.data.folder import suffixes
from reconverge.data.mix import Normalise
from reconverge.errors import Exit, Stop
from reconverge.evaluate import look, top5
from reconverge.progress import say
from reconverge.settings import Evaluate
from reconverge.signals import told_to_stop
from reconverge.world import World


class Files:
    """A source (see sources.py) of image files without labels."""

    def __init__(self, given: str | list[str]):
        """`given`: files, and folders, in which every image at any depth is taken. Errors: Stop(MISSING)."""
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
                    f"image files: {', '.join(sorted(known)[:8])}, ...",
                    "images=",
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
    given: str | list[str],
    folder: Path,
    nets: dict[str, nn.Module],
    classes: list[str],
    settings: Evaluate,
    normalise: Normalise,
    world: World,
    workers: int,
) -> int:
    """Write predictions.csv and predicted.png into `folder`: of the last kind of weights in `nets`, the EMA's
    where there are some.
    """
    source = Files(given)
    weights = list(nets)[-1]
    best = min(5, len(classes))
    tables = look(
        top5, 2 * best, {weights: nets[weights]}, source, settings, normalise, world, workers, told_to_stop
    )
    if tables is None:
        say("stopped before the end: nothing is written")
        return Exit.PREEMPTED
    table = tables[weights].numpy()
    if not np.isfinite(table).all():
        raise Stop(
            Exit.NOT_FINITE,
            f"the {weights} weights give probabilities that are not finite",
            "finite numbers",
            "precision=fp32",
        )
    answers, probabilities = table[:, :best].astype(int), table[:, best:]
    if world.rank == 0:
        with open(folder / "predictions.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                [
                    "image",
                    *(f"{what}{place}" for place in range(1, best + 1) for what in ("class", "probability")),
                ]
            )
            for path, labels, shares in zip(source.paths, answers, probabilities, strict=True):
                pairs: list[Any] = [
                    cell
                    for label, share in zip(labels, shares, strict=True)
                    for cell in (classes[label], f"{share:.6f}")
                ]
                writer.writerow([path, *pairs])
        _sheet(
            folder / "predicted.png",
            source,
            settings,
            weights,
            [classes[label] for label in answers[:, 0]],
            probabilities[:, 0],
        )
    say(
        f"{len(source)} images by the {weights} weights: {folder / 'predictions.csv'}, and the first of them"
        f" in {folder / 'predicted.png'}"
    )
    return Exit.DONE


def _sheet(
    path: Path, source: Files, settings: Evaluate, weights: str, names: list[str], shares: np.ndarray
) -> None:
    shown = range(min(32, len(source)))
    transform = transforms.evaluation(settings)
    images = torch.from_numpy(np.stack([transform(source.read(sample)) for sample in shown])).permute(
        0, 3, 1, 2
    )
    captions = [f"{shares[sample]:.0%}\n{names[sample]}" for sample in shown]
    pictures.sheet(
        path,
        images.float() / 255,
        captions,
        f"{len(source)} images: the most probable class by the {weights} weights",
    )
