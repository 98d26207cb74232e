"""The native library against Pillow, pixel by pixel, with and without AVX2; and runs without it."""

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import copy

import numpy as np
import pytest
from conftest import ROOT, weights
from PIL import Image
from test_decode import KINDS, encoded, picture
from timm.data.auto_augment import rand_augment_transform

from reconverge.base import chance
from reconverge.data import native, transforms
from reconverge.data.decode import RESAMPLING, crop_and_resize
from reconverge.data.image import Undecodable

OURS = [
    "4:4:4",
    "4:2:2",
    "4:2:0",
    "progressive",
    "progressive 4:4:4",
    "restart markers",
    "optimised",
    "gray",
    "gray progressive",
]
MORE = KINDS | {
    "progressive 4:4:4": lambda w, h, s: encoded(
        picture(w, h, s), quality=92, progressive=True, subsampling=0
    ),
    "gray progressive": lambda w, h, s: encoded(picture(w, h, s, "L"), quality=70, progressive=True),
}


def pillows(data, box, size, interpolation):
    return np.asarray(
        Image.open(io.BytesIO(data)).convert("RGB").crop(box).resize(size, RESAMPLING[interpolation])
    )


def cases(count, seed):
    """Random files, boxes (one pixel, whole, anywhere) and sizes, up and down."""
    random = np.random.Generator(np.random.PCG64(seed))
    for number in range(count):
        width, height = random.integers(1, 260, 2).tolist()
        data = MORE[OURS[number % len(OURS)]](width, height, number)
        left, top = int(random.integers(width)), int(random.integers(height))
        right, bottom = int(random.integers(left, width)) + 1, int(random.integers(top, height)) + 1
        box = [
            (left, top, right, bottom),
            (left, top, right, bottom),
            (left, top, left + 1, top + 1),
            (0, 0, width, height),
        ][number // len(OURS) % 4]
        size = [tuple(random.integers(1, 130, 2).tolist()), (box[2] - box[0], 40), (224, 224), (384, 384)][
            int(random.choice(4, p=(0.6, 0.1, 0.2, 0.1)))
        ]
        yield OURS[number % len(OURS)], data, box, size, list(RESAMPLING)[int(random.integers(2))]


def compare_decoding(library, count, seed=0):
    for kind, data, box, size, interpolation in cases(count, seed):
        pixels = library.crop_and_resize(data, box, size, interpolation)
        assert pixels is not None, f"{kind} was left to Pillow"
        assert np.array_equal(pixels[..., :3], pillows(data, box, size, interpolation)), (
            kind,
            box,
            size,
            interpolation,
        )


def test_decoding_is_pillows(library):
    compare_decoding(library, 180)


@pytest.mark.slow
def test_decoding_is_pillows_in_thousands_of_cases(library):
    compare_decoding(library, 2160, seed=1)


def compare_moving(library, count, monkeypatch):
    """The five operations as the shipped policies call them, bicubic and bilinear, at the magnitudes that
    they draw, with any colour.
    """
    monkeypatch.setattr(native, "chosen", lambda: library)
    random = np.random.Generator(np.random.PCG64(2))
    policies = [
        rand_augment_transform(
            policy, {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": filter}
        )
        for policy in ("rand-m9-mstd0.5-inc1", "rand-m3-mstd0.5-inc1")
        for filter in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    ]
    operations = [
        operation for policy in policies for operation in policy.ops if operation.name in transforms.AFFINE
    ]
    assert len(operations) == 20
    pictures = [
        picture(*size, number)
        for number, size in enumerate([(224, 224), (64, 64), (97, 161), (32, 32), (130, 50)])
    ]
    moved = 0
    for number in range(count):
        operation, image = copy(operations[number % 20]), pictures[number % 7 % 5]
        operation.prob, operation.kwargs = (
            1.0,
            operation.kwargs | {"fillcolor": tuple(random.integers(0, 256, 3).tolist())},
        )
        with chance.scope(number):
            expected = operation(image)
        operation.aug_fn = transforms._natively(operation.aug_fn)
        with chance.scope(number):
            got = operation(image)
        assert got.mode == "RGB"
        assert np.array_equal(np.asarray(got), np.asarray(expected)), (operation, operation.kwargs)
        moved += expected != image
    assert moved > count * 0.9


def test_affine_operations_are_pillows(library, monkeypatch):
    compare_moving(library, 100, monkeypatch)


@pytest.mark.slow
def test_affine_operations_are_pillows_in_thousands_of_cases(library, monkeypatch):
    compare_moving(library, 2100, monkeypatch)


@pytest.mark.parametrize("filter", RESAMPLING.values())
def test_any_affine_matrix(library, filter):
    """Not only timm's: turned by a right angle, mirrored, stretched, far outside."""
    random = np.random.Generator(np.random.PCG64(3))
    image = picture(50, 37, 0)
    for matrix in [
        (0, 1, 0, 1, 0, 0),
        (-1, 0, 50, 0, 1, 0),
        (1, 0, 1e9, 0, 1, 0),
        (0, 0, 0.25, 0, 0, 36.9),
        *(random.normal(0, 1, (60, 6)) * (1, 1, 30, 1, 1, 30)).tolist(),
    ]:
        expected = image.transform(image.size, Image.Transform.AFFINE, matrix, filter, fillcolor=(1, 2, 3))
        assert np.array_equal(
            np.asarray(library.affine(image, matrix, filter, (1, 2, 3))), np.asarray(expected)
        ), matrix


def test_pillow_13s_order_of_passes(library):
    """Vertically first where rows go, and more than twice as many as columns: two resizes of the Pillow that
    is installed, one way each.
    """
    library = native.Native(library.simd, pillow="13.0.0")
    orders = set()
    for _, data, box, (width, height), interpolation in cases(120, seed=4):
        columns, rows = box[2] - box[0], box[3] - box[1]
        vertical_first = rows - height > 0 and rows - height > 2 * (columns - width)
        between = (columns, height) if vertical_first else (width, rows)
        cropped = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
        expected = cropped.resize(between, RESAMPLING[interpolation]).resize(
            (width, height), RESAMPLING[interpolation]
        )
        assert np.array_equal(
            library.crop_and_resize(data, box, (width, height), interpolation)[..., :3], np.asarray(expected)
        )
        orders.add(vertical_first)
    assert orders == {False, True}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(OURS)))
def test_what_is_not_plain_is_left_to_pillow(library, kind):
    assert library.crop_and_resize(KINDS[kind](60, 50, 0), (3, 4, 50, 40), (32, 32), "bicubic") is None


def test_other_samplings_arithmetic_coding_and_hidden_sizes_are_left_to_pillow(library):
    good = bytearray(KINDS["4:2:0"](64, 48, 0))
    frame = good.index(b"\xff\xc0")
    for offset, value in (
        (1, 0xC9),
        (4, 12),
        (6, 0),
        (8, 0),
        (11, 0x41),
        (11, 0x12),
        (11, 0x33),
    ):  # SOF9, 12 bits, no rows, no columns, 4:1:1, 4:4:0
        changed = good.copy()
        changed[frame + offset] = value
        assert library.crop_and_resize(bytes(changed), (0, 0, 9, 9), (8, 8), "bicubic") is None
    for box in ((0, 0, 65, 48), (0, 0, 64, 49), (5, 5, 5, 9), (9, 9, 5, 12), (0, 0, 1 << 31, 1 << 31)):
        assert library.crop_and_resize(bytes(good), box, (8, 8), "bicubic") is None


def outcome(*case):
    try:
        return np.asarray(crop_and_resize(*case, fast=False))
    except Exception as error:
        return str(error)


def compare_damaged(library, count, monkeypatch):
    """Cut, flipped, with bytes inserted: the same pixels or exception as without the library."""
    random = np.random.Generator(np.random.PCG64(5))
    native_too = raised = 0
    for kind, data, box, size, interpolation in cases(count, seed=6):
        damaged = bytearray(data)
        for _ in range(int(random.integers(1, 4))):
            at = int(random.integers(len(damaged)))
            way = int(random.integers(4))
            if way == 0:
                damaged = damaged[: max(at, 1)]
            elif way == 1:
                damaged[at:at] = random.bytes(int(random.integers(1, 5)))
            else:
                damaged[at] ^= 1 << int(random.integers(8))
        file = bytes(damaged)
        outcomes = []
        for chosen in (library, None):
            monkeypatch.setattr(native, "chosen", lambda chosen=chosen: chosen)
            outcomes.append(outcome(file, box, size, interpolation))
        assert np.array_equal(*outcomes), (kind, outcomes)
        native_too += library.crop_and_resize(file, box, size, interpolation) is not None
        raised += isinstance(outcomes[0], str)
    assert native_too > count / 20
    assert raised > count / 20


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_files_give_what_pillow_gives(library, monkeypatch):
    compare_damaged(library, 200, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::PIL")
def test_thousands_of_damaged_files_give_what_pillow_gives(library, monkeypatch):
    compare_damaged(library, 2500, monkeypatch)


def test_many_threads_get_the_same_pixels(library):
    work = list(cases(60, seed=7))
    alone = [library.crop_and_resize(*case[1:]) for case in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for one, other in zip(
                pool.map(lambda case: library.crop_and_resize(*case[1:]), work), alone, strict=True
            ):
                assert np.array_equal(one[..., :3], other[..., :3])


def test_the_check_finds_the_rules_of_other_versions(library):
    library.check()
    right = tuple(int(number) for number in Image.__version__.split(".")[:2])
    for version in ((12, 1), (12, 2), (13, 0)):  # each the first with rules of its own
        rules = native.Native(simd=library.simd, pillow=".".join(map(str, version)))
        if version == max(first for first in ((12, 1), (12, 2), (13, 0)) if first <= max(right, (12, 1))):
            rules.check()
        else:
            with pytest.raises(native.Unusable, match="differs from that of Pillow"):
                rules.check()


@pytest.fixture
def unbuilt(monkeypatch):
    """As on a machine where native/ could not be built."""
    find = native.importlib.util.find_spec

    def found(name, package=None):  # other libraries look for theirs by the same function
        return None if name == "reconverge.data._native" else find(name, package)

    monkeypatch.setattr(native.importlib.util, "find_spec", found)
    native._checked.cache_clear()
    yield
    monkeypatch.undo()
    native._checked.cache_clear()
    native.choose("auto")


def test_without_the_library_on_refuses_and_auto_says_what_would_enable_it(unbuilt, train, capsys):
    assert train("run=refused", "steps=1", "data.native=on") == 2
    said = capsys.readouterr()
    assert "libjpeg62-turbo-dev" in said.err + said.out
    assert train("run=other", "steps=1") == 0
    assert "apt-get install gcc libjpeg62-turbo-dev" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("library")
def test_a_run_goes_on_with_or_without_it_to_the_same_weights(photographs, train):
    settings = [f"data.root={photographs}", "augment.size=32", "steps=4"]
    assert train(*settings, "run=with", "data.native=on") == 0
    assert train(*settings[:-1], "steps=2", "run=changing", "data.native=off") == 0
    assert train(*settings, "run=changing", "data.native=on") == 0
    assert weights("with") == weights("changing")
    starts = json.loads((ROOT.joinpath(os.getcwd()) / "runs/changing/environment.json").read_text())["starts"]
    assert "data.native=off" in starts[0]["decoder"]
    assert starts[1]["decoder"].startswith("native")
    assert Image.__version__ in starts[1]["decoder"]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_it_installs_with_and_without_a_compiler(tmp_path, compiler):
    """A wheel carries the library if it could be compiled, and is made without it if not."""
    copy = tmp_path / "source"
    subprocess.run(["git", "-C", ROOT, "worktree", "list"], check=True, capture_output=True)
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")[:-1]
    for name in files:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        copy,
    ]
    subprocess.run(command, check=True, env=os.environ | {"CC": compiler, "LDSHARED": f"{compiler} -shared"})
    (wheel,) = tmp_path.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], check=True, capture_output=True, text=True
    ).stdout
    assert ("reconverge/data/_native" in listing) == (compiler == "cc")


def test_undecodable_names_what_pillow_says():
    with pytest.raises(Undecodable, match="truncated"):
        crop_and_resize(KINDS["4:2:0"](120, 90, 0)[:1200], (0, 0, 120, 90), (8, 8), "bicubic", fast=False)
