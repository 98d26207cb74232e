"""Class folders as a source of images: listed once into an index in the cache, and read file by file."""

import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from reconverge.base.errors import Exit, Stop
from reconverge.data import index, listing
from reconverge.data.image import suffixes
from reconverge.data.visits import Visits

HEADERS = 50_000  # images whose headers are looked at when a folder is listed: all of ImageNet's validation

VERSION = "index-4"  # also the name of the folder in the cache


class Folder(listing.Listed):
    """A source (see sources.py) of the files in class folders.

    `fingerprint` is a hash of paths, sizes and labels, but not of contents.
    """

    def __init__(self, root: Path, about: dict[str, Any], rows: Path):
        super().__init__(root, about, rows)
        self.ignored: list[str] = about["ignored"]  # paths of files that are not images
        self.notes = notes(root, about)


def open_folder(root: Path, cache: Path, classes: list[str] | None = None) -> Folder:
    """The images below `root`. They are listed again if a folder has changed since it was cached.

    `classes`: the classes of the training split, which define the labels of this split. Errors:
    Stop(MISSING) for a missing or empty folder, Stop(USAGE) for a folder that is not in `classes`.
    """
    if not root.is_dir():
        raise Stop(
            Exit.MISSING,
            f"no folder {root}",
            "a data.root= with train/CLASS/*.jpg and val/CLASS/*.jpg",
            "correct data.root=, data.train= or data.val=; without validation images: data.val=null"
            " evaluate_every=never",
        )
    identity = sha256(json.dumps([str(root.resolve()), classes]).encode()).hexdigest()[:16]
    page = cache / VERSION / f"{identity}.json"
    about = listing.cached(page)
    if about is None or about["modified"] != listing.modified(root, about["modified"]):
        about = _list(root, page, classes)
    return Folder(root, about, listing.rows(page, about))


def differences(cache: Path, then: str, now: str) -> list[str]:
    """The files that differ between two listings, given by their fingerprints, as texts. Empty if one of them
    is not in `cache`, because it was listed on another machine, for example.
    """
    try:
        before, after = (_sizes_and_labels(cache / VERSION, fingerprint) for fingerprint in (then, now))
    except (OSError, ValueError):
        return []
    said = []
    for key in sorted(before.keys() | after.keys()):
        old, new, path = before.get(key), after.get(key), os.fsdecode(key)
        if old is None or new is None:
            said.append(f"{path} is {'new' if old is None else 'gone'}")
        elif old != new:
            told = f"had {old[0]} bytes and now has {new[0]}" if old[0] != new[0] else "has another label"
            said.append(f"{path} {told}")
    return said


def _sizes_and_labels(folder: Path, fingerprint: str) -> dict[bytes, tuple[int, int]]:
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise ValueError("no fingerprint of class folders")
    table = np.load(folder / f"{fingerprint}.npy", mmap_mode="r", allow_pickle=False)
    columns = (table[name].tolist() for name in ("key", "size", "label"))
    return {key: (size, label) for key, size, label in zip(*columns, strict=True)}


def _list(root: Path, page: Path, classes: list[str] | None) -> dict[str, Any]:
    """List the files. Writes their index rows to a file named by the fingerprint, and the rest to `page`."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    hidden = [entry.name for entry in entries if entry.name.startswith(".")]
    beside = [entry.name for entry in entries if entry.name not in hidden and not entry.is_dir()]
    found = [entry.name for entry in entries if entry.name not in {*hidden, *beside}]
    known = classes or found
    if strangers := sorted(set(found) - set(known)):
        raise Stop(
            Exit.USAGE,
            f"{root}: folders that are not names of classes: {', '.join(strangers[:5])}"
            f"{f' and {len(strangers) - 5} more' if strangers[5:] else ''}",
            f"folders named by the {len(known)} classes of the training images or of the model:"
            f" {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}",
            "rename the folders, or correct data.root= or data.val=",
        )
    known_suffixes = suffixes()
    labels = {name: label for label, name in enumerate(known)}
    parts: list[np.ndarray] = []
    ignored, modified, hashed = [], {".": root.stat().st_mtime_ns}, sha256()
    visits = Visits(root, found)
    deep = 0  # classes whose images are all in folders below the class folder
    for name in track(found, f"listing {root}", transient=True, disable=len(found) < 100):
        of_class = []
        for path, size in listing.files_below(root, name, modified, visits, hidden):
            if size is None or os.path.splitext(path)[1].lower() not in known_suffixes:
                ignored.append(path)
                continue
            encoded = os.fsencode(path)
            of_class.append((0, 0, size, labels[name], 0, encoded))
            hashed.update(encoded + b"\0%d\0%d\n" % (size, labels[name]))
        if not of_class:
            raise Stop(
                Exit.MISSING,
                f"no image in {root / name}",
                f"at least one image file for each class: {', '.join(sorted(known_suffixes)[:8])}, ...",
                "put images into the folder, or remove it",
            )
        deep += all(entry[-1].count(b"/") > 1 for entry in of_class)
        parts.append(np.array(of_class, index.row(max(len(entry[-1]) for entry in of_class))))
    if not parts:
        raise Stop(
            Exit.MISSING,
            f"no class folder in {root}",
            "one folder for each class, with the images of the class",
            "correct data.root=, data.train= or data.val=",
        )
    hashed.update(json.dumps(known).encode())
    paths = [os.fsdecode(path) for part in parts for path in part["key"].tolist()]
    about = _headers(root, paths) | {
        "root": str(root.resolve()),
        "classes": known,
        "fingerprint": hashed.hexdigest(),
        "ignored": ignored,
        "hidden": hidden,
        "beside": beside,
        "modified": modified,
        "again": [os.path.relpath(path, root) for path in visits.again],
        "deep": deep == len(found),
    }
    listing.write(page, about, parts)
    return about


def _headers(root: Path, paths: list[str]) -> dict[str, Any]:
    """Which files have unreadable headers, and how many are of each kind. Of more than HEADERS images, so
    many are looked at, at equal distances.
    """
    seen = paths[:: -(-len(paths) // HEADERS)]
    with ThreadPoolExecutor(16) as threads:
        found = dict(zip(seen, threads.map(lambda path: listing.looked_at(root / path), seen), strict=True))
    kinds = Counter(kind for kinds in found.values() if isinstance(kinds, list) for kind in kinds)
    return {
        "looked_at": len(seen),
        "broken": {path: said for path, said in found.items() if isinstance(said, str)},
        "kinds": dict(kinds),
    }


def notes(root: Path, about: dict[str, Any]) -> list[str]:
    """What is not used as it is, each kind once."""
    ignored, again, classes = about["ignored"], about["again"], about["classes"]
    part = f" of {about['looked_at']} that were looked at"
    said = []
    if ignored:
        suffixes = sorted({os.path.splitext(path)[1].lower() or "no suffix" for path in ignored})
        said.append(
            f"files left out because they are not images: {len(ignored)} ({', '.join(suffixes[:5])};"
            f" the first is {ignored[0]})"
        )
    for kind, paths in (("hidden files and folders", "hidden"), ("files beside the class folders", "beside")):
        if about[paths]:
            said.append(f"{kind} of {root} left out: {len(about[paths])} (the first is {about[paths][0]})")
    if again:
        said.append(
            f"links left out because they lead to a folder that is read already: {len(again)} (the first is"
            f" {again[0]})"
        )
    if about["deep"]:
        said.append(
            f"no class folder of {root} has an image itself, only folders with images: are {classes[0]}, ..."
            " the classes, or is the folder one level too high?"
        )
    said += [f"{count} images{part} {kind}" for kind, count in about["kinds"].items()]
    return said
