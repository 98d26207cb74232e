"""Recognises folders of images and label maps, and reads them as pairs."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import counted, say
from reconverge.data.maps import IGNORED, Maps, open_ade20k, open_folders
from reconverge.prepare.layouts import Layout, Taken, image_suffix, plain_name

FOLDERS = {"maps": ("maps", "val"), "ade20k": ("annotations", "validation")}  # of maps, of validation


def form(source: Path) -> str | None:
    """maps for a folder with images/ and maps/, ade20k for ADEChallengeData2016, None for others."""
    if (source / "images").is_dir() and (source / "maps").is_dir():
        return "maps"
    return (
        "ade20k"
        if all((source / f"{name}/training").is_dir() for name in ("images", "annotations"))
        else None
    )


def layout(form: str, source: Path, work: Path, ignore: str | None) -> Layout:
    """The layout of a `form`. Every map is decoded once, and the listing is kept in `work` until the data set
    is finished.

    `ignore`: the value of pixels without a class, as in --ignore. Errors: Stop, as open_folders.
    """
    maps, val = FOLDERS[form]
    validation = any((source / folder / val).exists() for folder in ("images", maps))
    if form == "ade20k":
        opened, named = open_ade20k(source, work, validation), "named by objectInfo150.txt"
    else:
        value = IGNORED if ignore is None else None if ignore == "none" else int(ignore)
        opened = open_folders(source, work, val=val if validation else None, ignore=value)
        by_file = (source / "classes.txt").exists()
        named = "named by classes.txt" if by_file else "which are the values of the training maps"
    values, splits = opened[0].values, {"train": opened[0]}
    if opened[1] is not None:
        splits["val"] = opened[1]
    say(
        f"images with label maps: {counted(len(values.classes), 'class', 'classes')}, {named};"
        f" ignored value: {', '.join(map(str, values.ignored)) or 'none'}"
    )
    return Layout(
        "ADE20K as distributed" if form == "ade20k" else "images/ and maps/",
        form,
        [],
        lambda: values.classes,
        {name: partial(_pairs, of) for name, of in splits.items()},
        {name: _bytes(of) for name, of in splits.items()},
        [name for of in splits.values() for name in of.beside],
        stream=False,
        label_maps={"values": values.values, "ignored_values": values.ignored},
        fingerprints={name: of.fingerprint for name, of in splits.items()},
    )


def _bytes(of: Maps) -> int:
    return int(of.index.table["size"].sum() + of.index.table["map_size"].sum())


def _pairs(of: Maps, classes: list[str]) -> Iterator[Taken]:
    for sample in range(len(of)):
        path = of.index.key(sample)  # SPLIT/NAME.jpg
        yield Taken(
            plain_name(os.path.splitext(path.partition("/")[2])[0]),
            0,
            image_suffix(path),
            path,
            partial(_unchanged, of.read, sample),
            partial(_unchanged, of.read_map, sample),
        )


def _unchanged(read: Callable[[int], bytes], sample: int) -> bytes:
    """What `read` returns. Errors: Stop(NOT_COMPARABLE) if the file has changed since it was listed."""
    try:
        return read(sample)
    except Stop as stop:
        if stop.code != Exit.NOT_COMPARABLE:
            raise
        raise Stop(
            stop.code,
            stop.args[1],
            "files that do not change while a data set is prepared",
            "restore the file and run the same command again; or remove the folder of --to, and start from"
            " the beginning",
        ) from None
