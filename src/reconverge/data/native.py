"""Pillow's own pixels at twice the speed: the C library of the folder native/, where it was built and gives
Pillow's pixels here.

It is a matter of speed alone. Before its first use in a process it is compared with the Pillow that is
installed; one pixel that differs, and it is not used. `choose` says for the whole process, and the data
workers that it forks, whether it is.
"""

import ctypes
import importlib.util
import io
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL._imaging
from PIL import Image, features

from reconverge.base.errors import Exit, Stop

SOURCES = Path(__file__).parents[3] / "native"
NEEDS = (
    "a C compiler and libjpeg-turbo's headers (on Debian: apt-get install gcc libjpeg62-turbo-dev), then pip"
    " install again"
)
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
OK, NOT_OURS, NO_MEMORY = 0, 1, 2  # of pixels.h

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the image


class _Box(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("left", "top", "right", "bottom")]


class _How(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("filter", "vertical_first", "simd")]


class Unusable(Exception):
    """Why the library cannot be used here, in words."""


class Native:
    """The library. Its calls hold no lock of Python's and may be made from any number of threads.

    `simd`: use AVX2 where the machine has it. `pillow`: the version of Pillow whose rules hold. Errors:
    Unusable.
    """

    def __init__(self, simd: bool = True, pillow: str = PIL.__version__):
        found = importlib.util.find_spec("reconverge.data._native")
        if found is None or found.origin is None:
            raise Unusable(f"native/ is not built: {NEEDS}")
        self._library = library = ctypes.CDLL(found.origin)
        library.source.restype = ctypes.c_char_p
        if SOURCES.is_dir() and library.source().decode() != source():
            raise Unusable("native/ has changed since it was built: pip install again")
        if library.use_libjpeg(
            PIL._imaging.__file__.encode()
        ):  # whose own libjpeg-turbo is taken: the very same decoder
            raise Unusable(
                f"Pillow {PIL.__version__} is not linked with a libjpeg-turbo that others can call"
            )
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
        """As decode.crop_and_resize, as uint8 (height, width, 4), the fourth of no meaning.

        None where it is for Pillow to decode.
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
        """The order of a resize's two passes, which decides how it rounds: Pillow's Image.resize, and since
        13 its Resample.c.
        """
        columns, rows = box[2] - box[0], box[3] - box[1]
        if self._pillow >= (13, 0):
            return rows > height and rows - height > 2 * (columns - width)
        return self._pillow >= (12, 2) and rows > height and rows > 100 * columns

    def affine(
        self, image: Image.Image, matrix: Any, resample: int, fill: tuple[int, int, int]
    ) -> Image.Image:
        """image.transform(image.size, AFFINE, matrix, resample, fillcolor=fill) of an RGB image, bilinear or
        bicubic.
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
        """Compare with Pillow: every kind of JPEG that is decoded here, both filters, up and down; affine
        operations. Errors: Unusable.
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


# Saved on the spot, for the check: gray, 4:4:4, 4:2:2, 4:2:0, progressive, restart markers.
CHECKED: list[dict[str, Any]] = [
    {},
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True},
    {"restart_marker_blocks": 3},
]


def _picture(width: int, height: int, number: int) -> Image.Image:
    """Waves and noise, without any library's random numbers."""
    y, x, band = np.ogrid[:height, :width, :3]
    noise = (x * 7919 + y * 104729 + band * 1299709) ** 2 % 251
    return Image.fromarray((127 + 80 * np.sin((x + band * y) / (3.0 + number)) + noise % 47).astype(np.uint8))


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (height, width, 4) as Pillow's RGB, which has four bytes a pixel too: rows are copied as they
    are.
    """
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels, "raw", "RGBX", 0, 1)  # type: ignore[arg-type]


def source() -> str:
    """sha256 of what setup.py compiles, which has put the same into the library."""
    return sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))).hexdigest()


@cache
def _checked() -> Native | str:
    """The library, or why it is not used."""
    try:
        native = Native()
        native.check()
        return native
    except Unusable as reason:
        return str(reason)
    except (
        OSError,
        AttributeError,
    ) as error:  # of ctypes, from a library that is cut, of another machine, or older than this file
        return f"native/ cannot be loaded ({error}): pip install again"


_off = False


def choose(choice: str) -> str:
    """data.native, auto, on or off, for this process: which libraries will decode, in words.

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
            f"data.native=on; {checked}",
            "data.native=auto or off: the same pixels, about half as fast",
            NEEDS,
        )
    return f"Pillow {PIL.__version__} and simplejpeg {version('simplejpeg')}, not native: {checked}"


def chosen() -> Native | None:
    """The library, where it is to be used; unless `choose` was called, that is wherever it can be."""
    checked = None if _off else _checked()
    return checked if isinstance(checked, Native) else None
