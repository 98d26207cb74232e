"""Odd files: what is strange about an image, found by decoding it once, and the smaller copy that --resize
makes.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from reconverge.base.errors import reason

UNREADABLE = ("empty", "unreadable", "truncated")  # what --drop-unreadable drops


class Bomb(Exception):
    """An image whose pixels would fill the memory."""


@contextmanager
def strict_exif() -> Iterator[None]:
    """Within it, EXIF that Pillow warns about raises.

    For the main thread, around all others: filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="PIL.TiffImagePlugin")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def oddities(data: bytes, suffix: str) -> list[str]:
    """What is odd about an image file called *.`suffix`; nothing for a good one. Errors: Bomb."""
    if not data:
        return ["empty"]
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise Bomb(str(error)) from None
    except Exception as error:
        return [f"unreadable: {reason(error)}"]
    found = []
    form = str(image.format)
    if form != {"jpg": "JPEG", "tif": "TIFF", "ppm": "PPM"}.get(suffix, suffix.upper()) and (
        form,
        suffix,
    ) != ("MPO", "jpg"):
        found.append(f"{form}, named .{suffix}")
    if image.mode == "CMYK":
        found.append("CMYK")
    try:
        image.getexif()
    except Exception as error:
        found.append(f"EXIF that cannot be parsed: {reason(error)}")
    try:
        image.draft(image.mode, (1, 1))  # every bit of a JPEG is read, and most of the arithmetic saved
        image.load()
    except Exception as error:
        cut = "truncated" in str(error) or "Truncated" in str(error)
        found.append(f"{'truncated' if cut else 'unreadable'}: {reason(error)}")
    return found


def shrunk(data: bytes, side: int, quality: int) -> bytes:
    """A JPEG whose shorter side is `side` pixels at most, bicubic; the file itself where Pillow cannot read
    it.
    """
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:
        return data
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.BICUBIC,
        )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
