"""Labels of ImageNet's validation images, which are distributed in one folder with a separate label file."""

import csv
import io
import os
import tarfile
from pathlib import Path

from reconverge.base.errors import Exit, Stop


def find(root: Path) -> dict[str, str]:
    """File stem -> synset of validation images, from Kaggle's table or the devkit. Errors: Stop(MISSING)."""
    if (solution := root / "LOC_val_solution.csv").exists():
        return of_kaggle(solution.read_bytes())
    if (devkit := root / "ILSVRC2012_devkit_t12.tar.gz").exists():
        return _devkit(devkit)
    raise Stop(
        Exit.MISSING,
        f"{root} has validation images without class folders and without a file of labels",
        "the labels in ILSVRC2012_devkit_t12.tar.gz or LOC_val_solution.csv",
        f"put one of these files into {root}",
    )


def of_kaggle(text: bytes) -> dict[str, str]:
    """The rows are `ILSVRC2012_val_00000001,n01751748 111 108 329 150 ...`: a synset and a box, repeated. All
    boxes of an image have the same synset.
    """
    try:
        return {
            row["ImageId"]: row["PredictionString"].split()[0]
            for row in csv.DictReader(io.StringIO(text.decode("utf-8-sig")))
        }
    except (KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise Stop(
            Exit.DAMAGED,
            f"LOC_val_solution.csv is damaged: {error!r}",
            "the columns ImageId and PredictionString; the latter begins with a synset",
            "download it again",
        ) from error


def _devkit(path: Path) -> dict[str, str]:
    """The ground truth lists challenge ids. meta.mat has the synset of each id, which are not sorted."""
    from scipy.io import loadmat

    with _whole_archive(path) as archive:
        files = {
            os.path.basename(member.name): archive.extractfile(member)
            for member in archive
            if member.isfile()
        }
        truth, meta = files.get("ILSVRC2012_validation_ground_truth.txt"), files.get("meta.mat")
        if truth is None or meta is None:
            raise Stop(
                Exit.DAMAGED,
                f"{path} does not contain ILSVRC2012_validation_ground_truth.txt and meta.mat",
                "ILSVRC2012_devkit_t12.tar.gz as published",
                "download it again",
            )
        synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        ids = [int(line) for line in truth.read().split()]
    synset_of = {
        int(entry["ILSVRC2012_ID"]): str(entry["WNID"])
        for entry in synsets
        if int(entry["num_children"]) == 0
    }
    return {f"ILSVRC2012_val_{number:08d}": synset_of[challenge] for number, challenge in enumerate(ids, 1)}


def _whole_archive(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise Stop(
            Exit.DAMAGED, f"{path}: {error}", "the complete archive as published", "download it again"
        ) from error
