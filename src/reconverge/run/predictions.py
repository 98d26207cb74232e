"""outcomes.npz: prediction, confidence and loss of each validation image in the latest evaluation, for the
report; and the accuracy of each class.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reconverge.base import files
from reconverge.data.sources import Source
from reconverge.training.evaluate import Result


class Predictions(NamedTuple):
    """The predictions of one kind of weights (raw or EMA), one entry in each array per validation image."""

    labels: np.ndarray  # int64
    predicted: np.ndarray  # int64
    confidence: np.ndarray  # float64, probability of the predicted class
    losses: np.ndarray  # float64, cross-entropy


OF_WEIGHTS = Predictions._fields[1:]  # the labels are the same for all


def save(path: Path, step: int, source: Source, results: dict[str, Result]) -> None:
    """Replace the file atomically."""
    arrays = {
        f"{kind}/{name}": getattr(result, name) for kind, result in results.items() for name in OF_WEIGHTS
    }
    arrays["labels"] = source.labels(next(iter(results.values())).ids)
    file = io.BytesIO()
    np.savez(file, step=step, fingerprint=source.fingerprint, **arrays)  # type: ignore[arg-type]
    files.write_whole(path, file.getvalue())


def load(path: Path) -> tuple[int, str, dict[str, Predictions]]:
    """Step, fingerprint of the validation images, and the predictions by kind of weights: raw, ema."""
    with np.load(io.BytesIO(files.read_plain(path)), allow_pickle=False) as file:
        kinds = dict.fromkeys(name.partition("/")[0] for name in file if "/" in name)
        found = {
            kind: Predictions(file["labels"], *(file[f"{kind}/{name}"] for name in OF_WEIGHTS))
            for kind in kinds
        }
        return int(file["step"]), str(file["fingerprint"]), found


class OfClass(NamedTuple):
    label: int
    images: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / self.images


def per_class(labels: np.ndarray, predicted: np.ndarray) -> list[OfClass]:
    """The accuracy of each class that has images, in the order of labels."""
    images = np.bincount(labels)
    right = np.bincount(labels[labels == predicted], minlength=len(images))
    return [
        OfClass(label, int(images[label]), int(right[label])) for label in np.flatnonzero(images).tolist()
    ]
