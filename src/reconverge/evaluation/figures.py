"""Published accuracy on the evaluation sets: Table 8, and timm's own evaluations."""

import csv
from pathlib import Path

from reconverge.config.settings import Evaluate

# Table 8: (model, pixels) -> clean, C (mCE), C-bar (mean error), A, R, Sketch; percent. At 384 px pre-trained
# on ImageNet-22K.
COLUMNS = ("imagenet1k", "c", "c_bar", "a", "r", "sketch")
TABLE_8: dict[tuple[str, int], tuple[float | None, ...]] = {
    ("resnet50", 224): (76.1, 76.7, 57.7, 0.0, 36.1, 24.1),
    ("swin_t", 224): (81.2, 62.0, None, 21.6, 41.3, 29.1),
    ("convnext_t", 224): (82.1, 53.2, 40.0, 24.2, 47.2, 33.8),
    ("swin_b", 224): (83.4, 54.4, None, 35.8, 46.6, 32.4),
    ("convnext_b", 224): (83.8, 46.8, 34.4, 36.7, 51.3, 38.2),
    ("convnext_b", 384): (86.8, 43.1, 30.7, 62.3, 64.9, 51.6),
    ("convnext_l", 384): (87.5, 40.2, 29.9, 65.5, 66.7, 52.8),
    ("convnext_xl", 384): (87.8, 38.8, 27.1, 69.3, 68.2, 55.0),
}
# Set -> its column in timm's own evaluations (results/ of timm's repository).
TIMM = {
    "imagenet1k": "in1k_top1",
    "real": "real_top1",
    "v2": "v2_top1",
    "a": "a_top1",
    "r": "r_top1",
    "sketch": "sketch_top1",
}


def published_accuracy(model: str, settings: Evaluate) -> tuple[str, dict[str, float]]:
    """The source of published numbers for a model at this size, and set -> percent. Empty if neither source
    has the model.
    """
    if row := TABLE_8.get((model, settings.size)):
        return "Table 8", {name: value for name, value in zip(COLUMNS, row, strict=True) if value is not None}
    with open(Path(__file__).with_name("published_accuracy.csv")) as file:
        for line in csv.DictReader(file):
            evaluated = line["model"], int(line["img_size"]), float(line["crop_pct"])
            if evaluated == (model, settings.size, settings.crop_ratio):
                return "timm", {name: float(line[column]) for name, column in TIMM.items() if line[column]}
    return "published", {}
