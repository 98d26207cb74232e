"""Small imitations of ImageNet's archives, in the layouts of the downloads.

Every builder writes below a folder and returns the path to give as SOURCE. Building twice gives the same
bytes.
"""

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from PIL import Image
from scipy.io import savemat

# In the order of their challenge ids, 1 to 3, which is not the sorted order.
SYNSETS = ["n02119789", "n02100735", "n02110185"]
WORDS = ["kit fox, Vulpes macrotis", "English setter", "Siberian husky"]
# Kinds of odd pictures and what makes the bytes of one; Pillow decodes the first three, and raises for the
# others.
ODD: dict[str, Callable[[np.random.Generator], bytes]] = {
    "cmyk": lambda rng: _jpeg(rng, "CMYK"),
    "png": lambda rng: _encoded(_smooth(rng), "PNG"),
    "exif": lambda rng: _with_broken_exif(_jpeg(rng, dpi=(72, 72))),
    "truncated": lambda rng: _cut(_jpeg(rng)),
    "empty": lambda rng: b"",
    "garbage": lambda rng: b"garbage" + rng.bytes(3000),  # first bytes that no format of Pillow begins with
}
HOSTILE = ["absolute", "dotdot", "symlink", "hardlink", "device", "fifo", "bomb", "huge"]
MTIME = 1_340_000_000


class Picture(NamedTuple):
    name: str  # without .JPEG
    synset: str
    data: bytes
    odd: str = ""  # a kind of ODD


def pictures(
    synsets: list[str], per_class: int, seed: int, val: bool = False, odd: bool = True
) -> list[Picture]:
    """Training pictures are in class folders, validation pictures in one folder.

    Each kind of ODD occurs once; the classes get them in turn.
    """
    rng = np.random.default_rng(seed)
    synset_of = [synset for synset in synsets for _ in range(per_class)]
    if val:
        rng.shuffle(synset_of)
        names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, len(synset_of) + 1)]
    else:
        numbers = rng.choice(np.arange(1, 20_000), len(synset_of), replace=False)
        names = [f"{synset}_{number}" for synset, number in zip(synset_of, numbers, strict=True)]
    kinds = [""] * len(names)
    for rank, synset in enumerate(synsets if odd else []):
        dealt = list(ODD)[rank :: len(synsets)]
        assert per_class >= len(dealt), f"{per_class} pictures a class are too few for {dealt}"
        chosen = rng.choice(
            [index for index, other in enumerate(synset_of) if other == synset], len(dealt), replace=False
        )
        for index, kind in zip(chosen, dealt, strict=True):
            kinds[index] = kind
    return [
        Picture(name, synset, ODD.get(kind, _jpeg)(rng), kind)
        for name, synset, kind in zip(names, synset_of, kinds, strict=True)
    ]


def _smooth(rng: np.random.Generator) -> Image.Image:
    width, height = rng.integers(60, 201, 2).tolist()
    return Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def _jpeg(rng: np.random.Generator, mode: str = "RGB", **options: Any) -> bytes:
    quality, subsampling = int(rng.integers(60, 97)), int(rng.integers(3))
    return _encoded(_smooth(rng).convert(mode), "JPEG", quality=quality, subsampling=subsampling, **options)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _cut(jpeg: bytes) -> bytes:
    return jpeg[: (jpeg.index(b"\xff\xda") + len(jpeg)) // 2]  # half of the scan


def _with_broken_exif(jpeg: bytes) -> bytes:
    """An EXIF segment without a TIFF header.

    The JPEG has dpi, because otherwise Pillow looks for dpi in EXIF when it opens the file, and hides the
    first error.
    """
    segment = b"Exif\0\0" + b"XX*\0" + bytes(range(40))
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def official(folder: Path, train: list[Picture], val: list[Picture]) -> Path:
    """The devkit contains only SYNSETS."""
    _write(folder / "ILSVRC2012_img_train.tar", _tar(reversed(_class_tars(train))))
    ordered = sorted(val, key=lambda picture: picture.name)
    _write(
        folder / "ILSVRC2012_img_val.tar", _tar((f"{picture.name}.JPEG", picture.data) for picture in ordered)
    )
    truth = "".join(f"{SYNSETS.index(picture.synset) + 1}\n" for picture in ordered)
    top = "ILSVRC2012_devkit_t12/"
    members = {
        top: b"",
        f"{top}data/": b"",
        f"{top}data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    members[f"{top}data/meta.mat"] = _meta(train)
    _write(folder / "ILSVRC2012_devkit_t12.tar.gz", _gzip(_tar(members.items())))
    return folder


def _meta(train: list[Picture]) -> bytes:
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    counts = [sum(picture.synset == synset for picture in train) for synset in SYNSETS]
    leaves = enumerate(zip(SYNSETS, WORDS, counts, strict=True), 1)
    rows = [
        (i, synset, words, f"gloss of {words}", 0, np.zeros((1, 0)), 0, count)
        for i, (synset, words, count) in leaves
    ]
    # The challenge's inner nodes come behind its 1000 classes.
    rows.append((1001, "n02083346", "canine, canid", "gloss of canine", 3, np.array([[1, 2, 3]]), 1, 0))
    synsets = np.empty((len(rows), 1), [(field, object) for field in fields])
    synsets[:, 0] = rows
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    return (
        b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:]
    )  # the text has the time of writing in it


def kaggle(folder: Path, train: list[Picture], val: list[Picture]) -> Path:
    for name, data in _kaggle(train, val).items():
        _write(folder / name, data)
    return folder


def kaggle_zip(folder: Path, train: list[Picture], val: list[Picture]) -> Path:
    tree = _kaggle(train, val)
    folders = {f"{parent}/": b"" for name in tree for parent in Path(name).parents if parent != Path()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted((tree | folders).items()):
            info = zipfile.ZipInfo(name, (2012, 6, 18, 0, 0, 0))
            info.external_attr = (0o40755 << 16 | 0x10) if name.endswith("/") else 0o100644 << 16
            archive.writestr(info, data)
    return _write(folder / "imagenet-object-localization-challenge.zip", buffer.getvalue())


def _kaggle(train: list[Picture], val: list[Picture]) -> dict[str, bytes]:
    data = "ILSVRC/Data/CLS-LOC"
    tree = {f"{data}/train/{picture.synset}/{picture.name}.JPEG": picture.data for picture in train}
    tree |= {f"{data}/val/{picture.name}.JPEG": picture.data for picture in val}
    tree[f"{data}/test/ILSVRC2012_test_00000001.JPEG"] = _jpeg(np.random.default_rng(0))
    tree["ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"] = b"<annotation>\n</annotation>\n"
    tree["LOC_val_solution.csv"] = _solution(val)
    tree["LOC_synset_mapping.txt"] = "".join(
        f"{s} {words}\n" for s, words in sorted(zip(SYNSETS, WORDS, strict=True))
    ).encode()
    return tree


def _solution(val: list[Picture]) -> bytes:
    """Rows in random order, with one to three boxes for each picture and a space after each box."""
    rows = [
        f"{picture.name},{f'{picture.synset} 11 8 52 50 ' * (1 + index % 3)}\n"
        for index, picture in enumerate(val)
    ]
    return "".join(["ImageId,PredictionString\n", *_shuffled(rows)]).encode()


def class_folders(folder: Path, train: list[Picture], val: list[Picture]) -> Path:
    for split, members in (("train", train), ("val", val)):
        for picture in members:
            _write(folder / split / picture.synset / f"{picture.name}.JPEG", picture.data)
    return folder


def flat_val(folder: Path, train: list[Picture], val: list[Picture]) -> Path:
    class_folders(folder, train, [])
    for picture in val:
        _write(folder / "val" / f"{picture.name}.JPEG", picture.data)
    _write(folder / "LOC_val_solution.csv", _solution(val))
    return folder


def huggingface(folder: Path, train: list[Picture], val: list[Picture]) -> Path:
    shuffled = _shuffled(train)
    splits = {"train_images_0": shuffled[::2], "train_images_1": shuffled[1::2], "val_images": _shuffled(val)}
    for split, members in splits.items():
        data = _tar((f"{picture.name}_{picture.synset}.JPEG", picture.data) for picture in members)
        _write(folder / "data" / f"{split}.tar.gz", _gzip(data))
    test = _tar([("ILSVRC2012_test_00000001.JPEG", _jpeg(np.random.default_rng(0)))])
    _write(folder / "data" / "test_images.tar.gz", _gzip(test))
    return folder


def fall11(folder: Path, train: list[Picture]) -> Path:
    return _write(folder / "fall11_whole.tar", _tar(_class_tars(train)))


def winter21(folder: Path, train: list[Picture]) -> Path:
    members = [
        ("winter21_whole/", b""),
        *((f"winter21_whole/{name}", data) for name, data in _class_tars(train)),
    ]
    return _write(folder / "winter21_whole.tar.gz", _gzip(_tar(members)))


def webdataset_shards(folder: Path, train: list[Picture], val: list[Picture]) -> Path:
    """The label is the rank of the synset in sorted order."""
    shuffled, ranked = _shuffled(train), sorted({picture.synset for picture in [*train, *val]})
    shards = {"train-0000": shuffled[::2], "train-0001": shuffled[1::2], "validation-00": _shuffled(val)}
    for shard, members in shards.items():
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, mtime=MTIME) as writer:
            for picture in members:
                label = ranked.index(picture.synset)
                about = json.dumps(
                    {"filename": f"{picture.name}.JPEG", "label": label, "class_name": picture.synset}
                )
                writer.write(
                    {
                        "__key__": picture.name,
                        "jpg": picture.data,
                        "cls": str(label).encode(),
                        "json": about.encode(),
                    }
                )
        _write(folder / f"imagenet1k-{shard}.tar", buffer.getvalue())
    return folder


def hostile(folder: Path, kind: str) -> Path:
    """A class tar whose first member is a good JPEG and whose second member is malicious."""
    good = _member("n01440764_1.JPEG"), _jpeg(np.random.default_rng(0))
    names = {"absolute": "/etc/x.JPEG", "dotdot": "../../x.JPEG"}
    types = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    bad = _member(names.get(kind, "n01440764_2.JPEG"))
    bad.type = types.get(kind, tarfile.REGTYPE)
    data = b""
    if kind in ("symlink", "hardlink"):
        bad.linkname = "/etc/passwd"
    elif kind == "device":
        bad.devmajor, bad.devminor = 1, 5  # /dev/zero
    elif kind in names:
        data = good[1]
    elif kind == "bomb":
        data = _bomb()
    if kind == "huge":  # the first member, then a header and nothing behind it
        bad.size = 10 * 10**12
        size = 512 + -(-len(good[1]) // 512) * 512
        inner = _tar([good])[:size] + bad.tobuf(tarfile.GNU_FORMAT)
    else:
        inner = _tar([good, (bad, data)])
    return _write(folder / "fall11_whole.tar", _tar([("n01440764.tar", inner)]))


def _bomb(side: int = 30_000) -> bytes:
    """A valid PNG with one bit per pixel, all black."""
    compressor = zlib.compressobj()
    rows = b"".join(compressor.compress(bytes(1 + -(-side // 8))) for _ in range(side)) + compressor.flush()
    chunks = {b"IHDR": struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), b"IDAT": rows, b"IEND": b""}
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _shuffled(items: list) -> list:
    return random.Random(0).sample(items, len(items))


def _class_tars(train: list[Picture]) -> list[tuple[str, bytes]]:
    """One tar for each synset, in reversed order of synsets."""
    members: dict[str, list[tuple[str, bytes]]] = {}
    for picture in train:
        members.setdefault(picture.synset, []).append((f"{picture.name}.JPEG", picture.data))
    return [(f"{synset}.tar", _tar(members[synset])) for synset in sorted(members, reverse=True)]


def _member(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name.rstrip("/"))
    info.mtime = MTIME
    if name.endswith("/"):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info


def _tar(members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> bytes:
    """A name with a slash at the end is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in members:
            info = _member(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
