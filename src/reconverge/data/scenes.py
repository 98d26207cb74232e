"""The bundled scenes: stickers with real scanned digits, on two real photographs, with exact labels.

The photographs are china.jpg and flower.jpg of scikit-learn (CC BY 2.0). Training scenes show parts of their
left halves, validation scenes of their right halves. The digits are those of scikit-learn; a fifth of each
class is only in validation scenes. The class of a sticker is its shape, and each shape has its own colours.
"""

import colorsys
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from reconverge.base import chance, files
from reconverge.base.terminal import say

SIZE = 96  # pixels, of a side
STICKERS = 4  # at most, in a scene
SIDES = 24, 44  # pixels, of the smallest and the largest sticker
SHAPES = ("disc", "square", "diamond", "triangle", "star")
CLASSES = ("photograph", *SHAPES)  # of the label maps
COUNTS = {"train": 3200, "val": 200}
NAME = "scenes-1"  # of the folder in the cache, and of the random keys


class Scene(NamedTuple):
    """One scene. Where stickers overlap, the later one hides the earlier one, in everything here."""

    pixels: np.ndarray  # uint8 (SIZE, SIZE, 3)
    labels: np.ndarray  # uint8 (SIZE, SIZE): class of each pixel, as a position in CLASSES
    shapes: np.ndarray  # int64 (N,): class of each sticker, as a position in SHAPES
    boxes: (
        np.ndarray
    )  # float32 (N, 4): left, top, right, bottom of its visible part, right and bottom outside
    masks: np.ndarray  # bool (N, SIZE, SIZE): its visible part


def scene(split: str, number: int) -> Scene:
    """Scene `number` of a split, train or val: a pure function of both."""
    draw = _draws(split, number)
    canvas = _ground(split, draw)
    shapes: list[int] = []
    masks: list[np.ndarray] = []
    inks = _inks()[split]
    for _ in range(1 + _below(STICKERS, draw)):
        ink = inks[_below(len(inks), draw)]
        side = SIDES[0] + _below(SIDES[1] - SIDES[0], draw)
        pixels, inside, shape = _sticker(draw, side, ink)
        top, left = _below(SIZE - side + 1, draw), _below(SIZE - side + 1, draw)
        here = slice(top, top + side), slice(left, left + side)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[here] = inside
        if any((other & mask).sum() > 0.25 * other.sum() for other in masks):
            continue  # it would hide more than a quarter of another one
        masks = [other & ~mask for other in masks]
        canvas[here][inside] = pixels[inside]
        shapes.append(shape)
        masks.append(mask)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for shape, mask in zip(shapes, masks, strict=True):
        labels[mask] = shape + 1
    boxes = np.array([_box(mask) for mask in masks], np.float32)
    return Scene(
        canvas.round().clip(0, 255).astype(np.uint8), labels, np.array(shapes), boxes, np.array(masks)
    )


Draw = Callable[[], float]  # the next number of the scene, uniform in [0, 1)


def _draws(split: str, number: int) -> Draw:
    # 4 for the photograph, 1 for the number of stickers, 7 for each sticker.
    return iter(chance.uniform((5 + 7 * STICKERS,), NAME, split, number).tolist()).__next__


def _below(most: int, draw: Draw) -> int:
    """A whole number from 0 to most - 1."""
    return int(draw() * most)


def _ground(split: str, draw: Draw) -> np.ndarray:
    """A square part of a photograph: float32 (SIZE, SIZE, 3)."""
    photograph = _photographs()[_below(2, draw)]
    width, height = photograph.size
    half = width // 2
    side = int((0.4 + 0.35 * draw()) * half)
    left = (0 if split == "train" else half) + _below(half - side, draw)
    top = _below(height - side, draw)
    part = photograph.crop((left, top, left + side, top + side))
    return np.array(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)


def _sticker(draw: Draw, side: int, ink: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Colours (side, side, 3) in 0..255, which pixels (side, side) it covers, and its shape.

    `ink` (8, 8): the scanned digit, 0 to 16.
    """
    shape = _below(len(SHAPES), draw)
    hue = (shape / len(SHAPES) + 0.12 * draw() - 0.06) % 1
    dark = draw() < 0.5
    paper = np.array(colorsys.hsv_to_rgb(hue, 0.75, 0.45 if dark else 0.95)) * 255
    pen = 255.0 if dark else 20.0
    inner = round(side * 0.5)
    pad = (side - inner) // 2
    digit = Image.fromarray((ink / 16 * 255).astype(np.uint8)).resize(
        (inner, inner), Image.Resampling.BICUBIC
    )
    drawn = np.zeros((side, side, 1))
    drawn[pad : pad + inner, pad : pad + inner, 0] = np.asarray(digit) / 255
    drawn = np.clip(drawn * 1.4 - 0.15, 0, 1)  # more contrast
    return paper * (1 - drawn) + pen * drawn, _covered(shape, side), shape


@cache
def _covered(shape: int, side: int) -> np.ndarray:
    """The pixels (side, side) of a shape, as truth values."""
    y, x = np.mgrid[:side, :side] * 2 / (side - 1) - 1
    fifth = (np.arctan2(x, -y) / (2 * np.pi / 5)) % 1  # where between two points of the star
    return (
        x**2 + y**2 <= 1,
        np.maximum(abs(x), abs(y)) <= 0.86,
        abs(x) + abs(y) <= 1.1,
        (y <= 0.95) & (y >= 2.1 * abs(x) - 0.95),
        np.hypot(x, y) <= 0.45 + 0.55 * abs(1 - 2 * fifth) ** 1.3,
    )[shape]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def split_digits(targets: np.ndarray) -> dict[str, list[int]]:
    """Split -> ids of scikit-learn's digits, whose classes are `targets`. A fifth of each class is for
    validation: those with the smallest hashes, which are the same on every machine.
    """
    chosen: dict[str, list[int]] = {"train": [], "val": []}
    for label in range(10):
        ids = sorted(np.flatnonzero(targets == label).tolist(), key=lambda one: chance.key("digits-1", one))
        held = round(len(ids) / 5)
        chosen["val"] += ids[:held]
        chosen["train"] += ids[held:]
    return chosen


@cache
def _inks() -> dict[str, np.ndarray]:
    """Split -> its scanned digits (N, 8, 8)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {split: digits.images[ids] for split, ids in split_digits(digits.target).items()}


# ---- as files ----------------------------------------------------------------------------------------------


def written(cache: Path, counts: dict[str, int] = COUNTS) -> Path:
    """The folder of all scenes as files. They are written once. At every call they are compared with their
    checksum, and written again if one of them is damaged or missing.

    images/SPLIT/NUMBER.png, maps/SPLIT/NUMBER.png (label maps, see maps.py), classes.txt, and
    annotations/instances_SPLIT.json with boxes and masks in the format of COCO.
    """
    root = cache / NAME
    if root.exists():
        try:
            kept = json.loads((root / "checksum.json").read_text())
            if kept == {"counts": counts, "sha256": _checksum(root)}:
                return root
        except (OSError, ValueError):
            pass
        say(f"the scenes in {root} are damaged, or not the ones asked for; they are written again")
        shutil.rmtree(root)
    cache.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=cache))
    for split, count in counts.items():
        _write(new, split, count)
    (new / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (new / "checksum.json").write_text(json.dumps({"counts": counts, "sha256": _checksum(new)}))
    for path in new.rglob("*.json"):
        files.sync(path)
    try:
        new.rename(root)
    except OSError:  # another process has just written the same content
        shutil.rmtree(new)
    return root


def _checksum(root: Path) -> str:
    """The sha256 of names and contents of all files but the one that keeps it."""
    digest = sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "checksum.json"):
        digest.update(f"{path.relative_to(root).as_posix()} {files.sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _write(root: Path, split: str, count: int) -> None:
    for kind in ("images", "maps"):
        (root / kind / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in track(range(count), f"drawing scenes of {split}", transient=True, disable=count < 100):
        one, name = scene(split, number), f"{number:05d}.png"
        Image.fromarray(one.pixels).save(root / "images" / split / name, compress_level=1)
        Image.fromarray(one.labels).save(root / "maps" / split / name)
        pictures.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        for shape, box, mask in zip(one.shapes.tolist(), one.boxes.tolist(), one.masks, strict=True):
            left, top, right, bottom = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": shape + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [SIZE, SIZE], "counts": run_lengths(mask)},
                }
            )
    coco = {
        "images": pictures,
        "annotations": annotations,
        "categories": [{"id": position + 1, "name": name} for position, name in enumerate(SHAPES)],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask (H, W): pixels column by column, first the number of zeros,
    then that of ones, and so on.
    """
    flat = mask.T.ravel()
    ends = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    lengths = np.diff(ends).tolist()
    return [0, *lengths] if flat[0] else lengths
