"""A data set of WebDataset shards as `reconverge prepare` writes it: dataset.json, indexes, tar files."""

import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import ByPosition, patiently, sha256_of
from reconverge.data import index, maps, tar
from reconverge.data.samples import damaged

FORMAT = "reconverge-shards-1"
FLAT = "of one colour only"  # kinds of dataset.json's "unusual", beside those of image.py
UNREADABLE = "unreadable, at which training stops unless data.on_bad_image=substitute"
OPEN = 64  # shards that one process keeps open


class Shards:
    """One split as a source (see sources.py). `fingerprint` covers bytes, label and place of each image."""

    def __init__(self, root: Path, about: dict[str, Any], split: str):
        part = about["splits"][split]
        self.root = root
        self.shards: list[dict[str, Any]] = part["shards"]
        self.images_of = np.array([shard["images"] for shard in self.shards], np.int64)
        self.classes: list[str] = [entry["synset"] for entry in about["classes"]]
        self.fingerprint: str = fingerprint(about, split)
        self.notes = notes(about, split)
        self.staged: Path | None = None  # a folder with local copies of some shards (stage.py)
        self.index = index.Index(root / part["index"])
        self.labels = self.index.labels
        self._files: dict[int, ByPosition] = {}  # open files by shard, the most recently used last

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        return len(self.index)

    def where(self, sample: int) -> str:
        row = self.index.row(sample)
        return (
            f"{self.root / self.shards[row['shard']]['name']}, {os.fsdecode(row['key'])} at byte"
            f" {row['offset']} (sample {sample})"
        )

    def read(self, sample: int) -> bytes:
        """Errors: Stop(DAMAGED) if the bytes have changed since they were indexed, Stop(MISSING, PERMISSION,
        DISK).
        """
        place = self.index.row(sample)[["shard", "offset", "size", "checksum"]].item()
        return self._verified(place, partial(self.where, sample))

    def _verified(self, place: tuple[int, int, int, int], where: Callable[[], str]) -> bytes:
        """The bytes at `place`: shard, offset, size, checksum. `where` names them in messages. Errors: as
        `read`.
        """
        shard, offset, size, checksum = place

        def read() -> bytes:
            try:
                return self._file(shard).read(size, offset)
            except OSError:
                self._files.pop(shard, None)  # a stale handle of a network file system stays unusable
                raise

        data = patiently(read, where)
        if len(data) != size or xxhash.xxh3_64_intdigest(data) != checksum:
            raise damaged(f"{where()}: the bytes have changed since they were indexed")
        return data

    def first_ids(self) -> np.ndarray:
        """The first sample id of each shard that is not empty."""
        return (np.cumsum(self.images_of) - self.images_of)[self.images_of > 0]

    def replaced(self, sample: int) -> tuple[Exit, str] | None:
        """A fault, if the tar header before a sample belongs to another file: the shard was replaced."""
        row, key = self.index.row(sample), self.index.key(sample)
        block = ByPosition(self.root / self.shards[row["shard"]]["name"]).read(
            tar.BLOCK, int(row["offset"]) - tar.BLOCK
        )
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            # The header contains only the first 100 bytes of a longer name.
            if header.size == row["size"] and (header.name.startswith(key[:100]) or not key.isascii()):
                return None
        except tarfile.HeaderError:
            pass
        return (
            Exit.DAMAGED,
            f"{self.where(sample)}: this place has other contents; the shard was replaced or damaged",
        )

    def _file(self, shard: int) -> ByPosition:
        file = self._files.pop(shard, None) or self._open(shard)
        self._files[shard] = file
        if len(self._files) > OPEN:
            del self._files[next(iter(self._files))]
        return file

    def _open(self, shard: int) -> ByPosition:
        if self.staged is not None:
            try:
                return ByPosition(self.staged / staged_name(shard))
            except FileNotFoundError:
                pass  # not copied yet, or deleted already: read the same bytes from the source
        return ByPosition(self.root / self.shards[shard]["name"])


class MapShards(Shards):
    """One split of images with a label map each: a source with `target` (see sources.py)."""

    def __init__(self, root: Path, about: dict[str, Any], split: str):
        super().__init__(root, about, split)
        of_maps = about["label_maps"]
        self.values = maps.Values(self.classes, of_maps["values"], of_maps["ignored_values"])
        self.pixels: list[int] = about["splits"][split]["pixels"]  # of each class

    def target(self, sample: int) -> np.ndarray:
        """The label map, uint8 (H, W): labels, and maps.IGNORED. Errors: as `read_map`."""
        return self.values.table()[maps.decoded(self.read_map(sample))]

    def read_map(self, sample: int) -> bytes:
        """The file of the label map. Errors: as `read`."""
        place = self.index.row(sample)[["shard", "map_offset", "map_size", "map_checksum"]].item()
        return self._verified(place, partial(self.where_map, sample))

    def where_map(self, sample: int) -> str:
        row = self.index.row(sample)
        return (
            f"{self.root / self.shards[row['shard']]['name']}, label map of {os.fsdecode(row['key'])} at byte"
            f" {row['map_offset']} (sample {sample})"
        )


def source(root: Path, about: dict[str, Any], split: str) -> Shards:
    """A split as a source, with label maps if dataset.json (`about`) says that the images have some."""
    return (MapShards if "label_maps" in about else Shards)(root, about, split)


def staged_name(shard: int) -> str:
    """File name of a shard's local copy, by number, because the shards may be in several folders."""
    return f"{shard:06d}.tar"


def load(root: Path) -> dict[str, Any]:
    """The contents of dataset.json. Errors: Stop(MISSING, DAMAGED)."""
    path = root / "dataset.json"
    if not path.exists():
        raise Stop(
            Exit.MISSING,
            f"{path} does not exist",
            "a folder in which reconverge prepare has finished",
            f"correct data.root=, or run reconverge prepare SOURCE --to {root}",
        )
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise damaged(f"{path}: {error}") from None
    if about.get("format") != FORMAT:
        raise Stop(
            Exit.DAMAGED,
            f"{path} has the format {about.get('format')}",
            f"the format {FORMAT}",
            "prepare the data set again",
        )
    return about


def problems(root: Path, about: dict[str, Any]) -> list[tuple[Exit, str]]:
    """Faults that can be found without reading every image: damaged indexes; shards that are missing,
    unreadable, replaced, or of the wrong size.
    """
    files = [(shard["name"], shard["bytes"]) for part in about["splits"].values() for shard in part["shards"]]
    with ThreadPoolExecutor(16) as threads:  # on a network file system each request takes milliseconds
        found = [
            (Exit.MISSING, f"{root} has no image in the split {split}")
            for split, part in about["splits"].items()
            if not part["images"]
        ]
        asked = [threads.submit(index_problem, root, part) for part in about["splits"].values()]
        asked += [threads.submit(_problem, root / name, size) for name, size in files]
        found += [problem for job in asked if (problem := job.result())]
        if not found:
            sources = [source(root, about, split) for split in about["splits"]]
            firsts = [(one, int(first)) for one in sources for first in one.first_ids()]
            found = [
                problem for problem in threads.map(lambda pair: pair[0].replaced(pair[1]), firsts) if problem
            ]
    return found


def index_problem(root: Path, part: dict[str, Any]) -> tuple[Exit, str] | None:
    """The fault of a split's index, if any. The whole index is read, because nothing else protects its
    labels; this takes 0.6 s for 14 M rows.
    """
    path = root / part["index"]
    if problem := _problem(path, part["index_bytes"]):
        return problem
    return (
        None
        if sha256_of(path) == part["index_sha256"]
        else (Exit.DAMAGED, f"{path} is damaged: its sha256 is not the one in dataset.json")
    )


def _problem(path: Path, size: int) -> tuple[Exit, str] | None:
    try:
        if (now := path.stat().st_size) != size:
            return Exit.DAMAGED, f"{path} has {now} bytes instead of {size}"
    except FileNotFoundError:
        return Exit.MISSING, f"{path} is missing"
    except PermissionError:
        return Exit.PERMISSION, f"the folder of {path} is not accessible"
    return None if os.access(path, os.R_OK) else (Exit.PERMISSION, f"{path} is not readable")


def open_shards(root: Path, dataset: str | None, validation: bool = True) -> tuple[Shards, Shards | None]:
    """The training split and, if `validation`, the validation split, after a check of all files. They are
    MapShards if the data set has label maps.

    Errors: Stop(MISSING, PERMISSION, DAMAGED) with a list of all problems; Stop(USAGE) if the data set is not
    `dataset`, or lacks a split.
    """
    about = _in_place(root)
    if dataset is not None and about["dataset"] != dataset:
        raise Stop(
            Exit.USAGE,
            f"{root} was prepared as {about['dataset']}",
            f"a data set that was prepared as {dataset} (data.dataset)",
            "data=shards, which accepts any data set; or correct data.root=",
        )
    for split in ("train", "val") if validation else ("train",):
        if split not in about["splits"]:
            raise Stop(
                Exit.USAGE,
                f"{root} has the splits {', '.join(about['splits'])}, but no {split}",
                "a data set with train and val; or with train only, if data.val=null evaluate_every=never",
                "data.val=null evaluate_every=never to train without validation images; or reconverge prepare"
                " with --hold-out PERCENT, which uses some of the training images for validation",
            )
    return source(root, about, "train"), source(root, about, "val") if validation else None


def open_evaluation(root: Path) -> Shards:
    """The validation split, or the only split of a data set with one split, to evaluate a classifier.

    Errors: as open_shards, and Stop(USAGE) for a data set of label maps.
    """
    about = _in_place(root)
    if "label_maps" in about:
        raise Stop(
            Exit.USAGE,
            f"{root} was prepared from images with label maps",
            "images with a label each, to evaluate a classifier",
            "correct data.root=, or prepare a data set with labels",
        )
    return Shards(root, about, "val" if "val" in about["splits"] else next(iter(about["splits"])))


def _in_place(root: Path) -> dict[str, Any]:
    """The contents of dataset.json, if no file is missing or damaged. Errors: Stop."""
    about = load(root)
    if found := problems(root, about):
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        raise Stop(
            min(code for code, _ in found),
            "; ".join(text for _, text in found[:20]) + more,
            "all files as reconverge prepare wrote them",
            "copy these files again, or prepare the data set again;"
            f" reconverge check {root} lists every fault",
        )
    return about


def fingerprint(about: dict[str, Any], split: str) -> str:
    """The hash of a split, over the classes and its index (with the checksums of images and label maps, and
    labels), and over what the values of label maps mean.
    """
    said = f"{about['splits'][split]['index_sha256']} {json.dumps(about['classes'])}"
    if "label_maps" in about:
        said += f" {json.dumps(about['label_maps'])}"
    return sha256(said.encode()).hexdigest()


def notes(about: dict[str, Any], split: str) -> list[str]:
    """Remarks about this split that the user should see before training."""
    part, lossy = about["splits"][split], about["lossy"]
    said = []
    for kind, count in part.get("unusual", {}).items():
        if kind != FLAT:
            said.append(f"{split}: {count} images {kind}")
        elif count == part["images"]:
            said.append(f"{split}: every image is {kind}; nothing can be learned from them")
    if "label_maps" in about:
        names = [entry["synset"] for entry in about["classes"]]
        said += maps.notes_of_pixels(split, names, part["pixels"], part["unlabelled"])
    if part["expected"] not in (None, part["images"]):
        said.append(f"{split}: {part['images']} images, but the published set has {part['expected']}")
    if lossy:
        said.append(
            f"{split}: a smaller, lossy copy of the images (shorter side of at most {lossy['resize']} px,"
            f" JPEG quality {lossy['quality']})"
        )
    return said
