"""decode.py compared with Pillow: every kind of file, random boxes and sizes."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reconverge.data import native
from reconverge.data.decode import RESAMPLING, crop_and_resize, dimensions
from reconverge.data.image import Undecodable


def picture(width, height, seed, mode="RGB"):
    random = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(random.integers(0, 256, (6, 7, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = random.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


pytestmark = pytest.mark.usefixtures("decoder")

KINDS = {
    "4:4:4": lambda w, h, s: encoded(picture(w, h, s), quality=91, subsampling=0),
    "4:2:2": lambda w, h, s: encoded(picture(w, h, s), quality=85, subsampling=1),
    "4:2:0": lambda w, h, s: encoded(picture(w, h, s), quality=75, subsampling=2),
    "progressive": lambda w, h, s: encoded(picture(w, h, s), quality=88, progressive=True),
    "restart markers": lambda w, h, s: encoded(picture(w, h, s), quality=80, restart_marker_blocks=3),
    "optimised": lambda w, h, s: encoded(picture(w, h, s), quality=50, optimize=True),
    "gray": lambda w, h, s: encoded(picture(w, h, s, "L"), quality=90),
    "RGB kept": lambda w, h, s: encoded(picture(w, h, s), quality=90, keep_rgb=True),
    "CMYK": lambda w, h, s: encoded(picture(w, h, s, "CMYK"), quality=90),
    "PNG": lambda w, h, s: encoded(picture(w, h, s), "PNG"),
    "PNG with a palette": lambda w, h, s: encoded(picture(w, h, s).quantize(17), "PNG"),
    "PNG with alpha": lambda w, h, s: encoded(picture(w, h, s, "RGBA"), "PNG"),
    "WebP": lambda w, h, s: encoded(picture(w, h, s), "WEBP"),
    "TIFF in gray": lambda w, h, s: encoded(picture(w, h, s, "L"), "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)  # a busy machine is not a fault
@given(data=st.data())
def test_exact_is_pillows_decode_crop_and_resize(kind, data):
    width, height = data.draw(st.integers(1, 200), "width"), data.draw(st.integers(1, 200), "height")
    left, top = data.draw(st.integers(0, width - 1), "left"), data.draw(st.integers(0, height - 1), "top")
    right, bottom = (
        data.draw(st.integers(left + 1, width), "right"),
        data.draw(st.integers(top + 1, height), "bottom"),
    )
    size = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    interpolation = data.draw(st.sampled_from(list(RESAMPLING)))
    file = KINDS[kind](width, height, data.draw(st.integers(0, 9)))
    assert dimensions(file) == (width, height)
    expected = (
        Image.open(io.BytesIO(file))
        .convert("RGB")
        .crop((left, top, right, bottom))
        .resize(size, RESAMPLING[interpolation])
    )
    pixels = np.asarray(crop_and_resize(file, (left, top, right, bottom), size, interpolation, fast=False))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_fast_is_close_to_exact(kind):
    """Its docstring says 0.04 on average and 8 at most for photographs; noise and edges as in these images
    differ more.
    """
    differences, library = [], native.chosen()
    for seed in range(4):
        file = KINDS[kind](330 + 40 * seed, 260, seed)
        for box in ((0, 0, 330, 260), (17, 31, 300, 200), (100, 100, 180, 170)):
            exact = np.asarray(crop_and_resize(file, box, (96, 96), "bicubic", fast=False))
            fast = np.asarray(crop_and_resize(file, box, (96, 96), "bicubic", fast=True))
            assert fast.shape == exact.shape == (96, 96, 3)
            differences.append(np.abs(fast.astype(int) - exact))
    assert np.mean(differences) < 0.1
    assert np.max(differences) <= 8
    natively = (
        library is not None and library.crop_and_resize(file, box, (96, 96), "bicubic") is not None
    )  # faster still, and exact
    assert kind == "gray" or (np.max(differences) == 0) == natively


@pytest.mark.parametrize("fast", [False, True])
def test_what_cannot_be_decoded_whole_is_undecodable(fast):
    good = KINDS["4:2:0"](120, 90, 0)
    for data in (
        b"",
        b"no image",
        good[:200],
        good[: len(good) // 2],
        good[:-40],
        encoded(picture(50, 40, 0), "PNG")[:-900],
    ):
        with pytest.raises(Undecodable):
            crop_and_resize(data, (0, 0, 10, 10), (8, 8), "bicubic", fast)


@pytest.mark.parametrize("fast", [False, True])
def test_a_bomb_is_undecodable_before_anything_is_allocated(fast):
    """A JPEG header with 60,000 x 60,000 pixels."""
    data = bytearray(KINDS["4:2:0"](64, 64, 0))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(Undecodable, match="bomb"):
        dimensions(bytes(data))
    with pytest.raises(Undecodable, match="bomb"):
        crop_and_resize(bytes(data), (0, 0, 10, 10), (8, 8), "bicubic", fast)
