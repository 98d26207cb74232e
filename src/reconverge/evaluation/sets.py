"""The evaluation sets for models of ImageNet-1K: the folder layout of each as it is distributed, and its
score.

ImageNet-C, mCE and AlexNet's errors: Hendrycks and Dietterich (2019); C-bar: Mintun et al. (2021); A:
Hendrycks et al. (2021); R: Hendrycks et al. (2021); Sketch: Wang et al. (2019); V2: Recht et al. (2019),
matched-frequency; ReaL: Beyer et al. (2020).
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.config.settings import CLASSIFY, Data, Evaluate, Suite
from reconverge.data import suitable
from reconverge.data.folder import Folder, open_folder
from reconverge.data.shards import Shards, open_evaluation
from reconverge.data.sources import Source, open_validation, root_of
from reconverge.training.evaluate import Result

# Mean error of AlexNet over the five severities of each corruption, as published by the authors. mCE divides
# by these numbers.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
GROUPS = (
    "noise",
    "blur",
    "weather",
    "digital",
)  # archives of ImageNet-C; the archive extra is not part of mCE
C_BAR = (
    "blue_noise_sample", "brownish_noise", "caustic_refraction", "checkerboard_cutout",
    "cocentric_sine_waves",
    "inverse_sparkles", "perlin_noise", "plasma_noise", "single_frequency_greyscale", "sparkles",
)  # fmt: skip
SEVERITIES = 5


class Part(NamedTuple):
    """Images that are evaluated separately. Most sets have only one part."""

    name: str  # for ImageNet-C: corruption/severity
    source: Source
    # The model's classes that may be predicted, in the order of the source's classes; None: all.
    among: list[int] | None = None


class EvalSet(NamedTuple):
    """An evaluation set, which data=eval/NAME selects."""

    images: int  # published number, over all parts
    parts: Callable[[Data, list[str]], list[Part]]  # (data, the model's classes). Errors: Stop
    # Scores in percent; the first one is the main score in papers.
    score: Callable[[Data, list[Part], list[Result]], dict[str, float]]
    folder: str  # folder below suite.root for suite=robustness: the name in the set's archive
    crop_ratio: float | None = None  # for sets with images that are already cropped; None: that of the model


# ---- folder layouts ----------------------------------------------------------------------------------------


def _validation(data: Data, classes: list[str]) -> list[Part]:
    """The validation images of ImageNet: shards, or class folders in root/val."""
    root = root_of(data)
    return [_all(data, root if _prepared(root) else root / str(data.val), classes)]


def _whole(data: Data, classes: list[str]) -> list[Part]:
    """Folders named by the model's classes, or shards; every class of the model may be predicted."""
    return [_all(data, root_of(data), classes)]


def _by_number(data: Data, classes: list[str]) -> list[Part]:
    """Folders named by the number of the class, 0 to 999."""
    return [Part("", open_folder(root_of(data), _cache(data), [str(label) for label in range(len(classes))]))]


def _subset(data: Data, classes: list[str]) -> list[Part]:
    """Folders of some of the model's classes, or shards; only these classes may be predicted."""
    root = root_of(data)
    source = open_evaluation(root) if _prepared(root) else open_folder(root, _cache(data))
    places = {name: label for label, name in enumerate(classes)}
    if strangers := [name for name in source.classes if name not in places]:
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"{root}: {len(strangers)} of {len(source.classes)} classes are not classes of the model:"
            f" {', '.join(strangers[:5])}",
            f"only classes of the model, which has {len(classes)}",
            "correct data.root=, or evaluate a model of ImageNet-1K",
        )
    return [Part("", source, [places[name] for name in source.classes])]


def _all(data: Data, root: Path, classes: list[str]) -> Part:
    if not _prepared(root):
        return Part("", open_folder(root, _cache(data), classes))
    source = open_evaluation(root)
    if source.classes != classes:
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"the classes of {root} ({len(source.classes)}) are not those of the model ({len(classes)})",
            "a data set with the classes of the model",
            "correct data.root=, or choose another model",
        )
    return Part("", source)


def _prepared(root: Path) -> bool:
    return (root / "dataset.json").exists()


def _corrupted(corruptions: Sequence[str]) -> Callable[[Data, list[str]], list[Part]]:
    """CORRUPTION/SEVERITY/SYNSET as distributed, in one folder or in the folders of the archives."""

    def parts(data: Data, classes: list[str]) -> list[Part]:
        root, found = root_of(data), {}
        for name in corruptions:
            folders = [
                path
                for group in ("", *GROUPS)
                for path in (root / group / name).glob("[0-9]*")
                if path.is_dir()
            ]
            found[name] = sorted(folders, key=lambda path: path.name)
        lacking = [
            f"{name} ({len(folders)} severities)"
            for name, folders in found.items()
            if len(folders) != SEVERITIES
        ]
        if lacking:
            raise Stop(
                Exit.MISSING,
                f"{root} lacks"
                f" {', '.join(lacking[:8])}{f' and {len(lacking) - 8} more' if lacking[8:] else ''}",
                f"CORRUPTION/SEVERITY/SYNSET/*.JPEG of {len(corruptions)} corruptions, with {SEVERITIES}"
                " severities each",
                "correct data.root=, or unpack the missing archives there",
            )
        return [
            Part(f"{name}/{folder.name}", open_folder(folder, _cache(data), classes))
            for name, folders in found.items()
            for folder in folders
        ]

    return parts


def _cache(data: Data) -> Path:
    return Path(data.cache).expanduser()


# ---- scores ------------------------------------------------------------------------------------------------


def top1(data: Data, parts: list[Part], results: list[Result]) -> dict[str, float]:
    (result,) = results
    return {"top1": result.top1, "top5": result.top5}


def _real(data: Data, parts: list[Part], results: list[Result]) -> dict[str, float]:
    """A prediction is right if it is one of the labels of the image. Images without labels do not count."""
    path = Path(data.labels).expanduser() if data.labels else root_of(data) / "real.json"
    try:
        labels = json.loads(path.read_text())
        accepted = [set(map(int, entry)) for entry in labels]
    except FileNotFoundError:
        raise Stop(
            Exit.MISSING,
            f"{path} does not exist",
            "real.json of github.com/google-research/reassessed-imagenet",
            "download it, and give its path with data.labels=PATH",
        ) from None
    except (ValueError, TypeError) as error:
        raise Stop(
            Exit.DAMAGED,
            f"{path} is damaged: {error}",
            "a list of labels for each validation image",
            "download it again",
        ) from None
    (part,), (result,) = parts, results
    assert isinstance(part.source, Folder | Shards), "the images have names"
    order = _in_order_of_names(part.source)
    if len(accepted) <= order.max(initial=-1) or (len(accepted) != len(order) and not _numbered(part.source)):
        raise Stop(
            Exit.NOT_COMPARABLE,
            f"{path} has {len(accepted)} entries, but there are {len(order)} images",
            "one entry for each validation image, in the order of file names",
            "correct data.labels= or data.root=",
        )
    if not any(accepted[entry] for entry in order.tolist()):
        raise Stop(
            Exit.DAMAGED,
            f"{path}: no image has a label",
            "a list of labels for each validation image",
            "download it again",
        )
    return {"real": real_accuracy(accepted, order[result.ids], result.predicted)}


def real_accuracy(accepted: Sequence[set[int]], order: np.ndarray, predicted: np.ndarray) -> float:
    """Accuracy in percent over images with labels. `order`: the index in `accepted` for each sample."""
    counted = [
        int(answer) in accepted[entry]
        for entry, answer in zip(order.tolist(), predicted, strict=True)
        if accepted[entry]
    ]
    return 100 * sum(counted) / len(counted)


def _in_order_of_names(source: Folder | Shards) -> np.ndarray:
    """For each sample, the position of its image among all: the number in its name, or else the position of
    its name in sorted order.
    """
    numbers = _numbered(source)
    if numbers:
        return np.array(numbers) - 1
    names = [source.index.key(sample).rpartition("/")[2] for sample in range(len(source))]
    order = np.empty(len(names), np.int64)
    order[np.argsort(np.array(names))] = np.arange(len(names))
    return order


def _numbered(source: Folder | Shards) -> list[int] | None:
    """The numbers in the names ILSVRC2012_val_NUMBER; None if not all images have such a name."""
    found = [re.search(r"ILSVRC2012_val_(\d{8})", source.index.key(sample)) for sample in range(len(source))]
    return [int(match[1]) for match in found if match] if all(found) else None


def _mean_error(data: Data, parts: list[Part], results: list[Result]) -> dict[str, float]:
    errors = errors_of(parts, results)
    return {"mean_error": sum(errors.values()) / len(errors), **errors}


def _mce(data: Data, parts: list[Part], results: list[Result]) -> dict[str, float]:
    errors = errors_of(parts, results)
    return {"mce": mce(errors), "mean_error": sum(errors.values()) / len(errors), **errors}


def errors_of(parts: list[Part], results: list[Result]) -> dict[str, float]:
    """Corruption -> error in percent, the mean over its severities."""
    errors: dict[str, list[float]] = {}
    for part, result in zip(parts, results, strict=True):
        errors.setdefault(part.name.partition("/")[0], []).append(100 - result.top1)
    return {name: sum(values) / len(values) for name, values in errors.items()}


def mce(errors: dict[str, float]) -> float:
    """mCE in percent: the mean over all corruptions of the error divided by AlexNet's error."""
    return sum(errors[name] / ALEXNET[name] for name in ALEXNET) / len(ALEXNET)


SETS = {
    "imagenet1k": EvalSet(50_000, _validation, top1, "imagenet"),
    "real": EvalSet(50_000, _validation, _real, "imagenet"),
    "v2": EvalSet(10_000, _by_number, top1, "imagenetv2-matched-frequency-format-val"),
    "a": EvalSet(7_500, _subset, top1, "imagenet-a"),
    "r": EvalSet(30_000, _subset, top1, "imagenet-r"),
    "sketch": EvalSet(50_889, _whole, top1, "sketch"),
    "c": EvalSet(15 * 5 * 50_000, _corrupted(list(ALEXNET)), _mce, "imagenet-c", crop_ratio=1.0),
    "c_bar": EvalSet(10 * 5 * 50_000, _corrupted(C_BAR), _mean_error, "imagenet-c-bar", crop_ratio=1.0),
}


def chosen(suite: Suite, data: Data) -> list[Data]:
    """The sets of a suite whose folders exist below suite.root, with the other settings of `data`. Without a
    suite: `data` itself.

    Errors: Stop(USAGE, MISSING).
    """
    if suite.name == "none":
        return [data]
    if strangers := [name for name in suite.sets if name not in SETS]:
        raise Stop(
            Exit.USAGE,
            f"suite.sets={suite.sets}",
            f"some of {', '.join(SETS)}",
            f"remove {', '.join(strangers)} from suite.sets",
        )
    root = Path(str(suite.root)).expanduser()
    places = {name: root / SETS[name].folder for name in suite.sets}
    there = {name: path for name, path in places.items() if path.is_dir()}
    if lacking := [str(path) for name, path in places.items() if name not in there]:
        say(f"left out, because the folder does not exist: {', '.join(lacking)}")
    if not there:
        raise Stop(
            Exit.MISSING,
            f"{root} has none of the sets of suite={suite.name}",
            f"at least one of the folders {', '.join(map(str, places.values()))}",
            "correct suite.root=",
        )
    return [
        replace(data, name=name, kind="evaluation", dataset=name, root=str(path))
        for name, path in there.items()
    ]


def parts(data: Data, classes: list[str]) -> list[Part]:
    """The parts of the set to evaluate. `classes`: the classes of the model. Errors: Stop."""
    if data.kind != "evaluation":
        source = open_validation(data, classes)
        suitable.refuse_other_task(CLASSIFY, source, data.name)
        return [Part("", source)]
    return SETS[str(data.dataset)].parts(data, classes)


def settings_of(data: Data, settings: Evaluate, named: Collection[str]) -> Evaluate:
    """How the images of a set are resized: as for the model, but images that are already cropped keep their
    crop, unless the crop ratio was set explicitly (it is in `named`).
    """
    ratio = SETS[str(data.dataset)].crop_ratio if data.kind == "evaluation" else None
    return settings if ratio is None or "crop_ratio" in named else replace(settings, crop_ratio=ratio)
