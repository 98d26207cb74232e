"""The optional C library of the folder native/, which gives the same pixels as Pillow at twice the speed.

Before its first use in a process, it is compared with the installed Pillow. If one pixel differs, it is not
used. `choose` decides for the process and for the data workers that it forks.
"""

import ctypes
import importlib.util
import io
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import PIL._imaging
from PIL import Image, features

from reconverge.base.errors import Exit, Stop

SOURCES = Path(__file__).parents[3] / "native"
NEEDS = (
    "install a C compiler and the headers of libjpeg-turbo (on Debian: apt-get install gcc"
    " libjpeg62-turbo-dev), then run pip install again"
)
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
OK, NOT_OURS, NO_MEMORY = 0, 1, 2  # of pixels.h

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the image


class _Box(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("left", "top", "right", "bottom")]


class _How(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("filter", "vertical_first", "simd")]


class Unusable(Exception):
    """The library cannot be used here; the text says why."""


class Native:
    """The library. Its functions release Python's GIL and may be called from any number of threads.

    `simd`: use AVX2 if the machine has it. `pillow`: the version of Pillow whose pixels are wanted. Errors:
    Unusable.
    """

    def __init__(self, simd: bool = True, pillow: str = PIL.__version__):
        found = importlib.util.find_spec("reconverge.data._native")
        if found is None or found.origin is None:
            raise Unusable(f"native/ is not built ({NEEDS})")
        self._library = library = ctypes.CDLL(found.origin)
        library.source.restype = ctypes.c_char_p
        if SOURCES.is_dir() and library.source().decode() != source():
            raise Unusable("native/ has changed since it was built: run pip install again")
        # It calls the libjpeg-turbo in Pillow's own library, so both use the same decoder.
        if library.use_libjpeg(PIL._imaging.__file__.encode()):
            raise Unusable(f"the libjpeg-turbo of Pillow {PIL.__version__} cannot be called from outside")
        how, pixels = _How, ctypes.c_void_p
        library.crop_and_resize.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            _Box,
            ctypes.c_int,
            ctypes.c_int,
            how,
            pixels,
        ]
        library.affine.argtypes = [
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_double),
            ctypes.c_uint32,
            how,
            pixels,
        ]
        library.affine.restype = None
        self.simd = bool(simd and library.simd())
        self._pillow = tuple(int(number) for number in pillow.split(".")[:2])

    def crop_and_resize(
        self, data: bytes, box: Box, size: tuple[int, int], interpolation: str
    ) -> np.ndarray | None:
        """As decode.crop_and_resize, but uint8 (height, width, 4); the fourth channel has no meaning.

        None if Pillow has to decode this image.
        """
        width, height = size
        how = _How(RESAMPLING[interpolation], self._vertical_first(box, width, height), self.simd)
        pixels = np.empty((height, width, 4), np.uint8)
        status = self._library.crop_and_resize(
            data, len(data), _Box(*box), width, height, how, pixels.ctypes.data
        )
        if status == NO_MEMORY:
            raise MemoryError
        return pixels if status == OK else None

    def _vertical_first(self, box: Box, width: int, height: int) -> bool:
        """Whether the vertical pass of a resize comes first, which decides the rounding. The rule is from
        Pillow's Image.resize, and since version 13 from its Resample.c.
        """
        columns, rows = box[2] - box[0], box[3] - box[1]
        if self._pillow >= (13, 0):
            return rows > height and rows - height > 2 * (columns - width)
        return self._pillow >= (12, 2) and rows > height and rows > 100 * columns

    def affine(
        self, image: Image.Image, matrix: Any, resample: int, fill: tuple[int, int, int]
    ) -> Image.Image:
        """Equals image.transform(image.size, AFFINE, matrix, resample, fillcolor=fill) for an RGB image,
        bilinear or bicubic.
        """
        pixels = np.empty((image.height, image.width, 4), np.uint8)
        colour = int.from_bytes(bytes((*fill, 255)), "little")
        numbers = (ctypes.c_double * 6)(*matrix)
        how = _How(resample, 0, self.simd)
        self._library.affine(
            image.tobytes("raw", "RGBX"), image.width, image.height, numbers, colour, how, pixels.ctypes.data
        )
        return to_image(pixels)

    def check(self) -> None:
        """Compare with Pillow: every kind of JPEG that is decoded here, with both filters, larger and
        smaller; and affine transforms. Errors: Unusable.
        """
        for number, options in enumerate(CHECKED):
            picture = _picture(101 + 8 * number, 87 + 72 * number, number)
            buffer = io.BytesIO()
            (picture.convert("L") if number == 0 else picture).save(buffer, "JPEG", quality=88, **options)
            data, (width, height) = buffer.getvalue(), picture.size
            decoded = Image.open(io.BytesIO(data)).convert("RGB")
            for box in (
                (0, 0, width, height),
                (19, 23, width - 18, height - 9),
                (width // 2, 0, width // 2 + 2, height),
            ):
                for size in ((32, 32), (width + 9, 20), (box[2] - box[0], 31)):
                    for name, resampling in RESAMPLING.items():
                        pixels = self.crop_and_resize(data, box, size, name)
                        if (
                            pixels is None
                            or to_image(pixels).tobytes()
                            != decoded.crop(box).resize(size, resampling).tobytes()
                        ):
                            raise Unusable(
                                f"its {name} resize of a JPEG differs from that of Pillow {PIL.__version__}"
                            )
            for matrix in (
                (1, 0.21, 0, 0, 1, 0),
                (1, 0, 0, -0.17, 1, 0),
                (1, 0, 13.7, 0, 1, 0),
                (0.93, 0.35, -9.1, -0.35, 0.93, 17.3),
            ):
                for name, resampling in RESAMPLING.items():
                    expected = picture.transform(
                        picture.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=(124, 116, 104)
                    )
                    if (
                        self.affine(picture, matrix, resampling, (124, 116, 104)).tobytes()
                        != expected.tobytes()
                    ):
                        raise Unusable(
                            f"its {name} affine transform differs from that of Pillow {PIL.__version__}"
                        )


# Options of the JPEGs that check() makes: gray, 4:4:4, 4:2:2, 4:2:0, progressive, restart markers.
CHECKED: list[dict[str, Any]] = [
    {},
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True},
    {"restart_marker_blocks": 3},
]


def _picture(width: int, height: int, number: int) -> Image.Image:
    """A test picture of waves and noise, computed without random generators."""
    y, x, band = np.ogrid[:height, :width, :3]
    noise = (x * 7919 + y * 104729 + band * 1299709) ** 2 % 251
    return Image.fromarray((127 + 80 * np.sin((x + band * y) / (3.0 + number)) + noise % 47).astype(np.uint8))


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (height, width, 4) as a Pillow RGB image, which also has four bytes per pixel, so rows are copied
    without conversion.
    """
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels, "raw", "RGBX", 0, 1)  # type: ignore[arg-type]


def source() -> str:
    """sha256 of the C sources; setup.py has compiled the same hash into the library."""
    return sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))).hexdigest()


@cache
def _checked() -> Native | str:
    """The library, or the reason why it is not used."""
    try:
        native = Native()
        native.check()
        return native
    except Unusable as reason:
        return str(reason)
    # ctypes raises these for a library that is cut off, of another machine, or older than this file.
    except (OSError, AttributeError) as error:
        return f"native/ cannot be loaded ({error}): run pip install again"


_off = False


def choose(choice: str) -> str:
    """Set data.native (auto, on or off) for this process. Returns a text that names the decoding libraries.

    Errors: Stop(USAGE).
    """
    global _off
    _off = choice == "off"
    checked = "data.native=off" if _off else _checked()
    if isinstance(checked, Native):
        means = "AVX2" if checked.simd else "without AVX2"
        return (
            f"native ({means}), checked against Pillow {PIL.__version__}, with its libjpeg-turbo"
            f" {features.version('libjpeg_turbo')}"
        )
    if choice == "on":
        raise Stop(
            Exit.USAGE,
            f"data.native=on, but {checked}",
            "data.native=on with a working C library; auto and off give the same pixels, at half the speed",
            f"data.native=auto; or {NEEDS}",
        )
    return f"Pillow {PIL.__version__}, not native: {checked}"


def chosen() -> Native | None:
    """The library, or None if it is not used. Without a call of `choose` it is used if it works."""
    checked = None if _off else _checked()
    return checked if isinstance(checked, Native) else None
