"""Images with label maps as a source: folders of images and PNG maps, ADE20K, the bundled scenes.

A label map is a PNG file of the size of its image, gray or with a palette. The value of a pixel, or its index
in the palette, says its class. When a folder is listed, every map is decoded once, so that a wrong map is
named before training. The listing is kept in the cache, as for class folders.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from rich.progress import track

from reconverge.base.errors import Exit, Stop
from reconverge.base.imagenet import DATASETS
from reconverge.data import image as images
from reconverge.data import index, listing
from reconverge.data.image import Undecodable
from reconverge.data.visits import Visits

VERSION = "maps-1"  # also the name of the folder in the cache
IGNORED = 255  # label of pixels without a class, in what a source returns


@dataclass(frozen=True)
class Values:
    """What the values of pixels in map files mean. The label of values[i] is i."""

    classes: list[str]
    values: list[int]
    ignored: list[int]  # values of pixels without a class

    def table(self) -> np.ndarray:
        """uint8 (256,): the label of each value. Unknown values have IGNORED too, see `unknown`."""
        table = np.full(256, IGNORED, np.uint8)
        table[self.values] = np.arange(len(self.values))
        return table

    def unknown(self, values: Iterable[int]) -> list[int]:
        return sorted(set(values) - {*self.values, *self.ignored})


class Maps(listing.Listed):
    """A source (see sources.py) of images with a label map each, instead of a label each.

    `fingerprint` is a hash of paths, sizes of images, contents of maps, and the meaning of their values.
    """

    def __init__(self, root: Path, maps: Path, about: dict[str, Any], rows: Path):
        super().__init__(root, about, rows)
        self._maps = maps
        self.values = Values(self.classes, about["values"], about["ignored_values"])
        self.pixels: list[int] = about["pixels"]  # of each class
        self.beside: list[str] = about["beside"]  # files that are left out, see _notes
        self.notes = _notes(root, about)

    def map_path(self, sample: int) -> Path:
        return self._maps / f"{os.path.splitext(self.index.key(sample))[0]}.png"

    def target(self, sample: int) -> np.ndarray:
        """The label map, uint8 (H, W): labels, and IGNORED. Errors: as `read_map`."""
        return self.values.table()[decoded(self.read_map(sample))]

    def read_map(self, sample: int) -> bytes:
        """The file of the label map. Errors: as `read`, and NOT_COMPARABLE if its bytes have changed since it
        was listed.
        """
        path, row = self.map_path(sample), self.index.row(sample)
        where = f"{path} (map of sample {sample})"
        data = listing.content(path, int(row["map_size"]), where)
        if xxhash.xxh3_64_intdigest(data) != row["map_checksum"]:
            raise listing.changed(path, f"the bytes of {where} have changed since the folder was listed")
        return data


def decoded(data: bytes) -> np.ndarray:
    """The values of a map file, uint8 (H, W): gray values, or indices of a palette. Errors: Undecodable, also
    for files with colours and with more than 8 bits per pixel.
    """
    header = images.opened(data)
    if header.format != "PNG":
        raise Undecodable(f"a {header.format} file, but a label map is a PNG file")
    if header.mode not in ("L", "P", "1"):
        kinds = {"RGB": "three channels", "RGBA": "four channels", "LA": "two channels"}
        kind = kinds.get(header.mode, "16 bits per pixel" if header.mode.startswith("I") else header.mode)
        raise Undecodable(f"a map with {kind}, but a label map is gray or has a palette, with at most 8 bits")
    try:
        return np.asarray(header).astype(np.uint8)
    except Exception as error:  # as image.rgb: broken files raise nearly everything
        raise images.undecodable(error) from None


def open_folders(
    root: Path, cache: Path, train: str = "train", val: str | None = "val", ignore: int | None = IGNORED
) -> tuple[Maps, Maps | None]:
    """The training and the validation split of root/images/SPLIT/*.jpg and root/maps/SPLIT/*.png; the names
    of image and map are the same but for the suffix. Folders below SPLIT are visited too.

    root/classes.txt has a line for each class, in the order of the values 0, 1, 2, ... without `ignore`,
    which is the value of pixels without a class. Without that file, the classes are the values of the
    training maps, in order, with their numbers as names.
    Errors: Stop(MISSING) for a missing folder, image or map; Stop(USAGE); Stop(DAMAGED) with all wrong maps.
    """
    names = root / "classes.txt"
    known = None
    if names.exists():
        classes = [line.strip() for line in names.read_text().splitlines() if line.strip()]
        if len(classes) > IGNORED or len(set(classes)) < len(classes):
            raise Stop(
                Exit.USAGE,
                f"{names} has {len(classes)} lines, of which {len(set(classes))} are different",
                f"at most {IGNORED} classes, one a line, each with another name",
                "correct the file",
            )
        numbers = [number for number in range(256) if number != ignore]
        known = Values(classes, numbers[: len(classes)], [] if ignore is None else [ignore])
    folders = root / "images", root / "maps"
    training = _open(*folders, train, cache, known, ignore)
    if len(training.classes) < 2:
        raise Stop(
            Exit.USAGE,
            f"label maps of one class, {', '.join(training.classes)}, beside the ignored value {ignore}",
            "two classes or more",
            f"ignore nothing if {ignore} is a class, too (data.ignore=null; --ignore none of prepare); or"
            f" correct {names}",
        )
    if val is None:
        return training, None
    return training, _open(*folders, val, cache, training.values, ignore)


def open_ade20k(root: Path, cache: Path, validation: bool = True) -> tuple[Maps, Maps | None]:
    """ADE20K as distributed for scene parsing (ADEChallengeData2016): training and validation split.

    Of the values, 0 is no class, and 1 to 150 are the lines of objectInfo150.txt. Errors: as open_folders.
    """
    path = root / "objectInfo150.txt"
    if not path.exists():
        raise Stop(
            Exit.MISSING,
            f"no {path}",
            "the folder ADEChallengeData2016 as distributed: images/, annotations/, objectInfo150.txt",
            "correct the path (data.root=, or SOURCE of reconverge prepare)",
        )
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:] if line.strip()]
    classes = [line[-1].split(",")[0].strip() for line in lines]
    if [line[0].strip() for line in lines] != [str(number) for number in range(1, 151)]:
        raise Stop(
            Exit.DAMAGED,
            f"{path} has {len(lines)} classes",
            "a header, then 150 lines, with the numbers 1 to 150 in the first column and names in the last",
            "take the file as distributed",
        )
    known, folders = Values(classes, list(range(1, 151)), [0]), (root / "images", root / "annotations")
    splits = ["training", "validation"] if validation else ["training"]
    found = [_open(*folders, split, cache, known, None) for split in splits]
    for source, split in zip(found, splits, strict=True):
        published = getattr(DATASETS["ade20k"], split)
        if len(source) != published:
            source.notes.append(f"{split}: {len(source)} images, but the published set has {published}")
    return found[0], found[1] if validation else None


def _open(root: Path, maps: Path, split: str, cache: Path, known: Values | None, ignore: int | None) -> Maps:
    """One split. Without `known`, what the values mean is found from the maps."""
    for folder in (root / split, maps / split):
        if not folder.is_dir():
            raise Stop(
                Exit.MISSING,
                f"no folder {folder}",
                f"images in {root / split} and their label maps in {maps / split}",
                "correct the path (data.root=, or SOURCE of reconverge prepare); to train without validation"
                " images: data.val=null evaluate_every=never",
            )
    asked = [str(root.resolve()), str(maps.resolve()), split, known and known.__dict__, ignore]
    page = cache / VERSION / f"{sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
    about = listing.cached(page)
    if about is None or any(
        kept != listing.modified(place, kept)
        for place, kept in ((root, about["modified"]), (maps, about["maps_modified"]))
    ):
        about = _list(root, maps, split, page, known, ignore)
    return Maps(root, maps, about, listing.rows(page, about))


def _list(
    root: Path, maps: Path, split: str, page: Path, known: Values | None, ignore: int | None
) -> dict[str, Any]:
    """List the files of a split, and decode every map."""
    of_images, beside = _files(root, split, images.suffixes())
    of_maps, beside_maps = _files(maps, split, {".png"})
    pairs = _paired(root, maps, split, of_images.found, of_maps.found)
    with ThreadPoolExecutor(16) as threads:
        looked = threads.map(partial(_looked, root, maps), pairs)
        several = track(looked, f"decoding the maps of {split}", len(pairs), transient=True)
        seen = list(several if len(pairs) >= 100 else looked)
    found = sorted({value for one in seen for value in np.flatnonzero(one.counts).tolist()})
    ignored = [] if ignore is None else [ignore]
    values = known or Values(
        [str(value) for value in found if value not in ignored],
        [value for value in found if value not in ignored],
        ignored,
    )
    _refuse([fault for one in seen if (fault := one.fault or _strange(one, values))], values)
    if len(values.classes) > IGNORED:
        raise _too_many(maps / split)
    rows, hashed = [], sha256(json.dumps(values.__dict__).encode())
    for (path, size, _, map_size), one in zip(pairs, seen, strict=True):
        rows.append((0, 0, size, 0, 0, 0, map_size, one.checksum, os.fsencode(path)))
        hashed.update(os.fsencode(path) + b"\0%d\0%d\n" % (size, one.checksum))
    counts = np.sum([one.counts for one in seen], axis=0)
    kinds = Counter(kind for one in seen if isinstance(one.image, list) for kind in one.image)
    about: dict[str, Any] = {
        "split": split,
        "classes": values.classes,
        "values": values.values,
        "ignored_values": values.ignored,
        "fingerprint": hashed.hexdigest(),
        "pixels": counts[values.values].tolist(),
        "unlabelled": int(counts[values.ignored].sum()),
        "broken": {
            pair[0]: one.image for pair, one in zip(pairs, seen, strict=True) if isinstance(one.image, str)
        },
        "kinds": dict(kinds),
        "beside": [f"{root.name}/{path}" for path in beside]
        + [f"{maps.name}/{path}" for path in beside_maps],
        "modified": of_images.modified,
        "maps_modified": of_maps.modified,
    }
    listing.write(page, about, [np.array(rows, index.row(max(len(row[-1]) for row in rows), maps=True))])
    return about


class _Found(NamedTuple):
    found: dict[str, tuple[str, int]]  # path below the root without suffix -> path, size in bytes
    modified: dict[str, int]


def _files(root: Path, split: str, suffixes: set[str]) -> tuple[_Found, list[str]]:
    """The files of a split with one of these suffixes, and the paths of all that is left out."""
    visits, modified, beside = Visits(root, [split]), {}, []  # type: ignore[var-annotated]
    found: dict[str, tuple[str, int]] = {}
    for path, size in listing.files_below(root, split, modified, visits, beside):
        stem, suffix = os.path.splitext(path)
        if size is None or suffix.lower() not in suffixes:
            beside.append(path)
        elif stem in found:
            raise Stop(
                Exit.USAGE,
                f"{root / path} and {root / found[stem][0]} have the same name but for the suffix",
                "one image for each name, because the name says which label map belongs to it",
                "rename or remove one of them",
            )
        else:
            found[stem] = path, size
    beside += [os.path.relpath(path, root) for path in visits.again]
    return _Found(found, modified), beside


def _paired(
    root: Path,
    maps: Path,
    split: str,
    of_images: dict[str, tuple[str, int]],
    of_maps: dict[str, tuple[str, int]],
) -> list[tuple[str, int, str, int]]:
    """Image path, its size, map path, its size; sorted. Errors: Stop(MISSING) if one has no partner."""
    faults = []
    for place, mine, theirs, what in (
        (root, of_images, of_maps, "images without a label map"),
        (maps, of_maps, of_images, "label maps without an image"),
    ):
        if alone := sorted(mine.keys() - theirs.keys()):
            some = ", ".join(str(place / mine[stem][0]) for stem in alone[:5])
            faults.append(f"{len(alone)} {what}: {some}{', ...' if alone[5:] else ''}")
    if not of_images:
        faults.append(f"no image in {root / split}")
    if faults:
        raise Stop(
            Exit.MISSING,
            "; ".join(faults),
            f"for each image {root / split}/NAME.jpg a label map {maps / split}/NAME.png",
            "add what is missing, or remove what is alone",
        )
    return [(*of_images[stem], *of_maps[stem]) for stem in sorted(of_images)]


class _Looked(NamedTuple):
    """What a pair of files is."""

    map: Path
    image: list[str] | str  # as listing.looked_at
    counts: np.ndarray  # int64 (256,): pixels of each value
    checksum: int  # xxh3_64 of the map file
    fault: str | None


def _looked(root: Path, maps: Path, pair: tuple[str, int, str, int]) -> _Looked:
    path, _, map_path, map_size = pair
    file = maps / map_path
    header = listing.looked_at(root / path)
    data = listing.content(file, map_size, str(file))
    checksum, none = xxhash.xxh3_64_intdigest(data), np.zeros(256, np.int64)
    try:
        values = decoded(data)
    except Undecodable as error:
        return _Looked(file, header, none, checksum, f"{file}: {error}")
    fault = None
    if not isinstance(header, str):
        with open(root / path, "rb") as opened:
            width, height = images.opened(opened).size
        if values.shape != (height, width):
            fault = (
                f"{file} has {values.shape[1]} x {values.shape[0]} pixels, but its image {root / path} has"
                f" {width} x {height}"
            )
    return _Looked(file, header, np.bincount(values.ravel(), minlength=256), checksum, fault)


def _strange(one: _Looked, values: Values) -> str | None:
    """What values of a map are not known, if any."""
    if not (unknown := values.unknown(np.flatnonzero(one.counts).tolist())):
        return None
    some = ", ".join(f"{value} ({one.counts[value]} pixels)" for value in unknown[:5])
    return f"{one.map} has the unknown value{'s' * bool(unknown[1:])} {some}{', ...' if unknown[5:] else ''}"


def _refuse(faults: list[str], values: Values) -> None:
    if faults:
        known = f"{min(values.values, default=0)} to {max(values.values, default=0)}"
        raise Stop(
            Exit.DAMAGED,
            f"{len(faults)} wrong label map{'s' * bool(faults[1:])}: {'; '.join(faults[:5])}"
            + ("; ..." if faults[5:] else ""),
            "PNG files of the size of their images, gray or with a palette, with the values of the"
            f" {len(values.classes)} classes ({known})"
            + "".join(f" or {value}, which is ignored" for value in values.ignored),
            "correct these maps, or the file with the names of the classes, or the value to ignore",
        )


def _too_many(folder: Path) -> Stop:
    return Stop(
        Exit.USAGE,
        f"the maps in {folder} have 256 different values, and none of them is ignored",
        f"at most {IGNORED} classes",
        "say which value to ignore; if these are photographs and no label maps, correct the folder",
    )


def _notes(root: Path, about: dict[str, Any]) -> list[str]:
    """What the user should see before training."""
    split, said = about["split"], []
    if about["beside"]:
        said.append(
            f"{split}: files left out because they are neither images nor label maps, are hidden, or are read"
            f" already: {len(about['beside'])} (the first is {about['beside'][0]})"
        )
    said += notes_of_pixels(split, about["classes"], about["pixels"], about["unlabelled"])
    said += [f"{split}: {count} images {kind}" for kind, count in about["kinds"].items()]
    return said


def notes_of_pixels(split: str, classes: list[str], pixels: list[int], unlabelled: int) -> list[str]:
    """What the user should know of the pixels of a split: `pixels` of each class, and those without one."""
    said = []
    empty = [name for name, count in zip(classes, pixels, strict=True) if not count]
    if empty:
        some = ", ".join(empty[:5]) + (", ..." if empty[5:] else "")
        said.append(f"{split}: no pixel of {len(empty)} of {len(classes)} classes: {some}")
    if unlabelled:
        share = unlabelled / (sum(pixels) + unlabelled)
        said.append(f"{split}: {share:.1%} of the pixels have no class and are ignored")
    return said
