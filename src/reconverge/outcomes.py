"""What the models of a run said of each validation image: outcomes.npz, kept of the newest evaluation, for
the report.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reconverge.data import files
from reconverge.data.sources import Source
from reconverge.evaluate import Result


class Outcomes(NamedTuple):
    """Of one kind of weights; one entry an image, in the order of the validation images."""

    labels: np.ndarray  # int64
    predicted: np.ndarray  # int64
    confidence: np.ndarray  # float64, probability of the predicted class
    losses: np.ndarray  # float64, cross-entropy


def by_class(labels: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each class the images, and how many of them are right: int64 (classes,) each."""
    return np.bincount(labels, minlength=classes), np.bincount(labels[labels == predicted], minlength=classes)


def save(path: Path, step: int, source: Source, results: dict[str, Result]) -> None:
    """Replace the file whole."""
    arrays = {
        f"{kind}/{name}": getattr(result, name)
        for kind, result in results.items()
        for name in Outcomes._fields[1:]
    }
    file = io.BytesIO()
    np.savez(
        file,
        step=step,
        fingerprint=source.fingerprint,
        labels=source.labels(np.arange(len(source))),
        **arrays,
    )  # type: ignore[arg-type]
    files.write_whole(path, file.getvalue())


def load(path: Path) -> tuple[int, str, dict[str, Outcomes]]:
    """Step, fingerprint of the validation images, and the outcomes by kind of weights: raw, ema."""
    with open(path, "rb") as opened, np.load(opened) as file:  # numpy would leave a damaged one open
        kinds = dict.fromkeys(name.partition("/")[0] for name in file if "/" in name)
        found = {
            kind: Outcomes(file["labels"], *(file[f"{kind}/{name}"] for name in Outcomes._fields[1:]))
            for kind in kinds
        }
        return int(file["step"]), str(file["fingerprint"]), found
