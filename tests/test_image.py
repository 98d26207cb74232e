"""image.py: one list of formats and one decision, for training, prepare, evaluation and predictions."""

import io
import json
import struct
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import EpsImagePlugin, Image

from reconverge.data import image
from reconverge.data.decode import crop_and_resize, dimensions
from reconverge.prepare.odd import oddities


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


GRAY = (np.arange(40 * 30) % 256).astype(np.uint8).reshape(40, 30)


def pixels(data):
    size = dimensions(data)
    return np.asarray(crop_and_resize(data, (0, 0, *size), size, "bicubic", fast=False))


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
(/tmp/canary) (w) file closefile showpage
"""


def programs_started(monkeypatch, job):
    """The commands that `job` starts, with a planted gs in the first folder of PATH."""
    started = []
    hook_on = [True]

    def hook(event, arguments):
        if hook_on[0] and event in ("subprocess.Popen", "os.exec", "os.system", "os.posix_spawn"):
            started.append((event, arguments))

    sys.addaudithook(hook)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "true")  # as where Ghostscript is installed
    try:
        job()
    finally:
        hook_on[0] = False
    return started


@pytest.mark.usefixtures("decoder")
def test_no_format_that_starts_programs_is_decoded_whatever_its_name(monkeypatch):
    def job():
        for fast in (False, True):
            with pytest.raises(image.Undecodable):
                crop_and_resize(EPS, (0, 0, 9, 9), (8, 8), "bicubic", fast)
        with pytest.raises(image.Undecodable):
            dimensions(EPS)
        assert oddities(EPS, "jpg")[0].startswith("unreadable")

    assert programs_started(monkeypatch, job) == []
    assert not {"EPS", "IPTC", "WMF", "ICNS", "FPX", "MIC", "GRIB"} & set(image.FORMATS)
    assert not {".eps", ".ps", ".wmf", ".iim"} & image.suffixes()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm"} <= image.suffixes()


def test_every_opening_of_an_image_names_its_formats():
    """Nothing else in the product calls Image.open, except on what it has written itself."""
    from conftest import ROOT

    calls = {
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "src").rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"]
        if "Image.open(" in path.read_text()
    }
    assert calls == {"src/reconverge/data/image.py", "src/reconverge/data/native.py"}


WIDE = {
    "PNG, 8 bits x 257": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG"), GRAY),
    "PNG, 8 bits x 256": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 256), "PNG"), GRAY),
    "TIFF": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF"), GRAY),
    "JPEG 2000": (
        encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "JPEG2000", irreversible=False),
        GRAY,
    ),
    "PGM": (b"P5 30 40 65535\n" + (GRAY.astype(">u2") * 257).tobytes(), GRAY),
    "TIFF, 0 is white": (
        encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF").replace(
            struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0)
        ),
        255 - GRAY,
    ),
}


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", WIDE)
def test_gray_of_16_bits_keeps_its_upper_bits(kind):
    data, expected = WIDE[kind]
    assert np.array_equal(pixels(data), np.repeat(expected[..., None], 3, axis=2))
    assert image.WIDE in oddities(data, "png" if "PNG" in kind else "tif")


def test_12_bits_in_a_tiff_are_scaled_as_12():
    """Two pixels in three bytes: 0xFFF and 0x800."""
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, 1), (279, 3)]
    ifd = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries
    )
    data = (b"II*\0" + struct.pack("<I", 8) + ifd + bytes(4)).ljust(200, b"\0") + bytes([0xFF, 0xF8, 0x00])
    assert pixels(data)[0, :, 0].tolist() == [255, 128]


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(GRAY.astype(np.float32) / 255),
        Image.fromarray(GRAY.astype(np.float32)),
        Image.fromarray(GRAY.astype(np.int32) * 1000),
    ],
    ids=["0 to 1", "0 to 255", "32 bits"],
)
def test_pixels_without_an_agreed_white_are_refused_by_name(picture):
    data = encoded(picture, "TIFF")
    with pytest.raises(image.Undecodable, match="for which no value means white"):
        pixels(data)
    assert any(word.startswith("unreadable") and "means white" in word for word in oddities(data, "tif"))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "441"])
def test_every_sampling_has_pillows_pixels(sampling):
    noise = np.random.Generator(np.random.PCG64(3)).integers(0, 256, (45, 37, 3), dtype=np.uint8)
    data = simplejpeg.encode_jpeg(noise, 90, "RGB", "411" if sampling == "441" else sampling)
    if sampling == "441":  # as of cjpeg -sample 1x4: the blocks of 4:1:1, one below the other
        frame = data.index(b"\xff\xc0")
        assert data[frame + 11] == 0x41
        sides = data[frame + 7 : frame + 9] + data[frame + 5 : frame + 7]
        data = data[: frame + 5] + sides + data[frame + 9 : frame + 11] + b"\x14" + data[frame + 12 :]
    assert dimensions(data) == ((45, 37) if sampling == "441" else (37, 45))
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(pixels(data), np.asarray(expected))
    for fast in (False, True):
        small = np.asarray(crop_and_resize(data, (3, 5, 30, 40), (16, 16), "bilinear", fast))
        assert small.shape == (16, 16, 3)
    assert oddities(data, "jpg") == []


def with_exif(block):
    good = encoded(Image.fromarray(GRAY), "JPEG")
    segment = b"Exif\0\0" + block
    at = 20 if good[2:4] == b"\xff\xe0" else 2
    cut = good[:2] + (good[at:] if at == 20 else good[2:])  # without JFIF: Pillow looks for dpi in EXIF
    return cut[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + cut[2:]


BROKEN_EXIF = {
    "no TIFF header": b"XX*\0" + bytes(range(40)),
    "empty": b"",
    "cut off": b"II*\0\x08\0\0\0\x05\0" + struct.pack("<HHII", 282, 5, 1, 4000),
    "a wrong size": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 282, 5, 400_000_000, 26) + bytes(8),
    "an offset beyond the end": b"MM\0*\xff\xff\xff\x00",
}


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("broken", BROKEN_EXIF)
def test_broken_exif_does_not_make_an_image_unreadable(broken, reconverge, tmp_path):
    data = with_exif(BROKEN_EXIF[broken])
    assert pixels(data).shape == (40, 30, 3)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "source" / split / name).mkdir(parents=True)
            (tmp_path / "source" / split / name / "x.jpg").write_bytes(data)
            (tmp_path / "source" / split / name / f"{split}.png").write_bytes(
                encoded(Image.fromarray(GRAY), "PNG")
            )
    code, said = reconverge("prepare", tmp_path / "source", "--to", tmp_path / "made", "--drop-unreadable")
    assert code == 0, said
    about = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert (about["dropped"], about["splits"]["train"]["images"]) == (0, 4)
    assert "of which unreadable: 0" in said or "unusual" not in said
