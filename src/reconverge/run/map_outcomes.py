"""outcomes.npz of a segmenter: areas of each validation image in the latest evaluation, the confusion of
classes, and some predicted label maps, for the report.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reconverge.base import files
from reconverge.data.sources import Source
from reconverge.training.evaluate_maps import Result


class Outcomes(NamedTuple):
    """What one kind of weights (raw or EMA) predicted."""

    ids: np.ndarray  # int64 (images,): sample ids, without those of damaged images
    areas: np.ndarray  # int64 (images, 3, classes): as areas.areas of each image
    losses: np.ndarray  # float64 (images,): mean over the labelled pixels
    confusion: np.ndarray  # int64 (classes, classes): pixels by label (row) and prediction (column)
    shown: dict[int, np.ndarray]  # sample id -> uint8 (H, W): predicted classes, of some images


TABLES = ("ids", "areas", "losses", "confusion")


def save(path: Path, step: int, source: Source, results: dict[str, Result]) -> None:
    """Replace the file atomically."""
    arrays: dict[str, np.ndarray] = {}
    for kind, result in results.items():
        arrays |= {f"{kind}/{name}": getattr(result, name) for name in TABLES}
        arrays |= {f"{kind}/shown/{sample}": one for sample, one in result.shown.items()}
    file = io.BytesIO()
    np.savez_compressed(file, step=step, fingerprint=source.fingerprint, **arrays)  # type: ignore[arg-type]
    files.write_whole(path, file.getvalue())


def load(path: Path) -> tuple[int, str, dict[str, Outcomes]]:
    """Step, fingerprint of the validation images, and the outcomes by kind of weights: raw, ema."""
    with np.load(io.BytesIO(files.read_plain(path)), allow_pickle=False) as file:
        kinds = dict.fromkeys(name.partition("/")[0] for name in file if "/" in name)
        found = {}
        for kind in kinds:
            start = f"{kind}/shown/"
            shown = {int(name[len(start) :]): file[name] for name in file if name.startswith(start)}
            found[kind] = Outcomes(**{name: file[f"{kind}/{name}"] for name in TABLES}, shown=shown)
        return int(file["step"]), str(file["fingerprint"]), found
