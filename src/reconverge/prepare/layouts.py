"""Recognises the layouts of downloaded data sets, and reads them as streams of samples.

Nothing is unpacked to disk. A gzip file is read only from beginning to end.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from reconverge.base import imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.data import tar
from reconverge.data.image import suffixes
from reconverge.prepare import archives, validation_labels

FORMS = (
    "ILSVRC2012_img_train.tar (with ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz), Kaggle's zip or"
    " its folder, train_images_*.tar.gz of Hugging Face, fall11_whole.tar, winter21_whole.tar.gz, WebDataset"
    " shards, train/CLASS/ and val/, images/ with label maps in maps/, or ADEChallengeData2016"
)


class Taken(NamedTuple):
    """One image of the source.

    In a stream, `read` must be called before the next image is requested. Otherwise it can be called at any
    time in any thread.
    """

    key: str
    label: int
    suffix: str
    name: str  # name of the file in the source
    read: Callable[[], bytes]
    read_map: Callable[[], bytes] | None = None  # reads its label map; then `label` is 0


@dataclass
class Layout:
    kind: str  # description of the layout
    dataset: str  # imagenet1k, imagenet22k, folder, maps or ade20k
    files: list[Path]  # the files of the source; their names and sizes identify it
    # Names of the classes in the order of labels; for a gzip stream this reads the whole source.
    classes: Callable[[], list[str]]
    splits: dict[str, Callable[[list[str]], Iterator[Taken]]]  # split -> (classes) -> its images
    bytes: dict[str, int] = field(default_factory=dict)  # approximate size of each split
    ignored: list[str] = field(
        default_factory=list
    )  # names of files that are not images, found while reading
    again: list[str] = field(default_factory=list)  # links left out, found while reading
    stream: bool = True  # read from beginning to end; otherwise file by file in any order
    label_maps: dict[str, list[int]] | None = None  # the values of label maps, if images have them
    fingerprints: dict[str, str] = field(default_factory=dict)  # of each split with label maps


def find(source: Path, dataset: str | None) -> Layout:
    """The layout of `source`.

    Errors: Stop(MISSING) with a list of the known layouts, Stop(USAGE) if labels are missing.
    """
    for form in (_official, _huggingface, _whole, _kaggle, _folders):
        if source.exists() and (layout := form(source)):
            layout.dataset = dataset or layout.dataset
            return layout
    if classes := _loose_classes(source):
        some = ", ".join([*classes[:3], *["..."] * (len(classes) > 3)])
        raise Stop(
            Exit.MISSING,
            f"{source}: class folders ({some}), but no folder train/",
            "train/CLASS/, and val/CLASS/ if there are validation images",
            f"mkdir {source / 'train'} and move the class folders into it; --hold-out 20 then keeps 20 % of"
            " their images for validation",
        )
    raise Stop(
        Exit.MISSING,
        f"{source}: " + ("nothing known" if source.exists() else "does not exist"),
        FORMS,
        "the path",
    )


def _loose_classes(source: Path) -> list[str]:
    """The folders directly below `source` that hold images."""
    folders = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    images = suffixes()
    return [
        path.name
        for path in folders
        if any(os.path.splitext(name)[1].lower() in images for name in os.listdir(path))
    ]


# ---- the layouts -------------------------------------------------------------------------------------------


def _official(source: Path) -> Layout | None:
    """ILSVRC2012_img_train.tar contains one tar file for each synset. ILSVRC2012_img_val.tar has no folders;
    its labels are in the devkit.
    """
    root = source if source.is_dir() else source.parent
    train, val, devkit = (
        root / f"ILSVRC2012_{name}" for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")
    )
    if not train.exists() or source not in (root, train):
        return None
    layout = Layout(
        "the official archives",
        "imagenet1k",
        [train],
        lambda: _inner_tars(train),
        {},
        {"train": train.stat().st_size},
    )
    layout.splits["train"] = lambda classes: _tar_of_tars(layout, train, classes)
    if val.exists():
        synset_of = validation_labels.find(root)
        layout.files += [val, *([devkit] if devkit.exists() else [])]
        layout.splits["val"] = lambda classes: _labelled(
            layout, archives.entries(val), classes, lambda name: synset_of[_stem(name)]
        )
        layout.bytes["val"] = val.stat().st_size
    return layout


def _huggingface(source: Path) -> Layout | None:
    """train_images_N.tar.gz and val_images.tar.gz with files named NAME_SYNSET.JPEG."""
    root = source / "data" if (source / "data").is_dir() else source
    train, val = sorted(root.glob("train_images_*.tar.gz")), sorted(root.glob("val_images.tar.gz"))
    if not train:
        return None
    layout = Layout("the files of Hugging Face", "imagenet1k", [*train, *val], imagenet.imagenet1k, {})

    def read(files: list[Path]) -> Callable[[list[str]], Iterator[Taken]]:
        def samples(classes: list[str]) -> Iterator[Taken]:
            for path in files:
                yield from _labelled(
                    layout,
                    archives.entries(path),
                    classes,
                    lambda name: _stem(name).rpartition("_")[2],
                    key=lambda name: _stem(name).rpartition("_")[0],
                )

        return samples

    for split, files in (("train", train), ("val", val)):
        if files:
            layout.splits[split] = read(files)
            layout.bytes[split] = sum(path.stat().st_size for path in files)
    return layout


def _whole(source: Path) -> Layout | None:
    """ImageNet-22K: a tar file, plain or gzipped, that contains one tar file for each synset."""
    if source.is_dir():
        found = [
            path for name in ("fall11_whole.tar", "winter21_whole.tar.gz") if (path := source / name).exists()
        ]
        if len(found) != 1:
            return None
        source = found[0]
    if not source.name.endswith((".tar", ".tar.gz")):
        return None
    layout = Layout(
        source.name,
        "imagenet22k",
        [source],
        lambda: _inner_tars(source),
        {},
        {"train": source.stat().st_size},
    )
    layout.splits["train"] = lambda classes: _tar_of_tars(layout, source, classes)
    return layout


def _kaggle(source: Path) -> Layout | None:
    """The folder ILSVRC/Data/CLS-LOC and LOC_val_solution.csv, unpacked or in a zip file."""
    below = "ILSVRC/Data/CLS-LOC"
    if source.suffix == ".zip":
        tree: archives.Tree = archives.ZipTree(source)
        files = [source]
        if not tree.folders(f"{below}/train"):
            return None
        solution = tree.read("LOC_val_solution.csv") if tree.has("LOC_val_solution.csv") else None
        synset_of = validation_labels.of_kaggle(solution) if solution else {}
    else:
        root = next(
            (path for path in (source, *source.parents[:3]) if (path / below / "train").is_dir()), None
        )
        if root is None:
            return None
        tree, files, synset_of = archives.FolderTree(root), [], validation_labels.find(root)
    return _tree("Kaggle's layout", "imagenet1k", tree, below + "/", files, synset_of)


def _folders(source: Path) -> Layout | None:
    """train/CLASS/*.jpg and val/CLASS/*.jpg; or val/*.jpg with a file of labels."""
    if not (source / "train").is_dir():
        return None
    tree = archives.FolderTree(source)
    flat = _has_images(tree, "val")
    return _tree("class folders", "folder", tree, "", [], validation_labels.find(source) if flat else {})


def _tree(
    kind: str, dataset: str, tree: archives.Tree, below: str, files: list[Path], synset_of: dict[str, str]
) -> Layout:
    layout = Layout(
        kind,
        dataset,
        files,
        lambda: tree.folders(f"{below}train"),
        {},
        ignored=tree.ignored,
        again=tree.again,
        stream=False,
    )

    def in_folders(split: str, classes: list[str]) -> Iterator[Taken]:
        folders = tree.folders(below + split)
        if strangers := sorted({*folders} - {*classes}):
            raise Stop(
                Exit.DAMAGED,
                f"{split}: folders that are not names of classes: {', '.join(strangers[:5])}"
                f"{f' and {len(strangers) - 5} more' if strangers[5:] else ''}",
                f"folders named by the {len(classes)} classes of the training images",
                "rename the folders, or remove them",
            )
        layout.ignored += [f"{below}{split}/{name}" for name in tree.beside(below + split)]
        for name in (name for name in classes if name in {*folders}):
            entries = tree.entries(f"{below}{split}/{name}")
            key = (lambda path: _plain(path, f"{below}{split}/")) if layout.dataset == "folder" else None
            yield from _labelled(layout, entries, classes, _always(name), key)

    def flat(classes: list[str]) -> Iterator[Taken]:
        return _labelled(layout, tree.entries(f"{below}val"), classes, lambda name: synset_of[_stem(name)])

    layout.splits["train"] = partial(in_folders, "train")
    layout.bytes["train"] = tree.total_bytes(f"{below}train")
    if _has_images(tree, f"{below}val"):
        layout.splits["val"] = flat
    elif tree.folders(f"{below}val"):
        layout.splits["val"] = partial(in_folders, "val")
    if "val" in layout.splits:
        layout.bytes["val"] = tree.total_bytes(f"{below}val")
    return layout


def _has_images(tree: archives.Tree, below: str) -> bool:
    """Whether there are images directly in this folder."""
    return any(_is_image(name) for name in tree.beside(below))


def _is_image(name: str) -> bool:
    """Whether a path has the suffix of an image, and neither is hidden nor lies in a hidden folder."""
    hidden = any(part.startswith(".") and part != "." for part in name.split("/"))
    return not hidden and os.path.splitext(name)[1].lower() in suffixes()


# ---- samples from entries ----------------------------------------------------------------------------------


def _labelled(
    layout: Layout,
    entries: Iterator[archives.Entry],
    classes: list[str],
    synset_of: Callable[[str], str],
    key: Callable[[str], str] | None = None,
) -> Iterator[Taken]:
    """The entries that are images, with labels. The names of other entries are added to layout.ignored.

    Errors: Stop(DAMAGED) for an image with an unknown class.
    """
    labels = {name: label for label, name in enumerate(classes)}
    for name, read in entries:
        if not _is_image(name):
            layout.ignored.append(name)
            continue
        try:
            label = labels[synset_of(name)]
        except KeyError as error:
            raise Stop(
                Exit.DAMAGED,
                f"{name}: its class is unknown ({error})",
                f"images of the {len(classes)} classes of the training images",
                "add the missing labels (devkit or LOC_val_solution.csv), or remove the file",
            ) from None
        yield Taken(key(name) if key else _stem(name), label, image_suffix(name), name, read)


def image_suffix(name: str) -> str:
    """The suffix of an image's member in a shard."""
    suffix = os.path.splitext(name)[1].lower()[1:]
    return "jpg" if suffix == "jpeg" else suffix


def _always(synset: str) -> Callable[[str], str]:
    return lambda name: synset


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _plain(path: str, below: str) -> str:
    """The key of a file in class folders: its path without the suffix .jpg or .jpeg. Other suffixes stay in
    the key, because a.png and a.jpg are two samples.
    """
    stem, suffix = os.path.splitext(path.removeprefix(below))
    return plain_name(stem) + (
        "" if suffix.lower() in (".jpg", ".jpeg") else suffix.lower().replace(".", "_")
    )


def plain_name(path: str) -> str:
    """A path whose name has underscores instead of dots, because a dot ends a WebDataset key."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.replace('.', '_')}"


def _tar_of_tars(layout: Layout, path: Path, classes: list[str]) -> Iterator[Taken]:
    with archives.opened(path) as file:
        for outer in tar.members(file, str(path), largest=None):
            if not outer.name.endswith(".tar"):
                layout.ignored.append(outer.name)
                continue
            where = f"{path}, {outer.name}"

            def entries(outer: tar.Member = outer, where: str = where) -> Iterator[archives.Entry]:
                for member in tar.members(file, where, outer.start + outer.size):
                    yield member.name, partial(tar.read, file, member, where)

            yield from _labelled(layout, entries(), classes, _always(_stem(outer.name)))


def _inner_tars(path: Path) -> list[str]:
    """The synsets of a tar file of tar files, sorted. This reads a gzip file completely."""
    with archives.opened(path) as file:
        found = [
            _stem(member.name)
            for member in tar.members(file, str(path), largest=None)
            if member.name.endswith(".tar")
        ]
    if not found:
        raise Stop(
            Exit.USAGE,
            f"{path} does not contain one tar file for each class",
            FORMS,
            "for WebDataset shards, give the folder that contains them",
        )
    if len(set(found)) < len(found):
        raise Stop(
            Exit.DAMAGED,
            f"{path} contains {len(found) - len(set(found))} class archives twice",
            "one archive for each class",
            "download it again",
        )
    return sorted(found)
