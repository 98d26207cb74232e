"""Finds unusual and unreadable images by decoding them once, and makes the smaller copies for --resize."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from reconverge.base.errors import reason

UNREADABLE = ("empty", "unreadable", "truncated")  # --drop-unreadable leaves out these


class Bomb(Exception):
    """An image with too many pixels for the memory."""


@contextmanager
def strict_exif() -> Iterator[None]:
    """Inside, Pillow's warnings about EXIF become exceptions.

    Use it in the main thread, around all other threads, because warning filters are global to the process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="PIL.TiffImagePlugin")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def oddities(data: bytes, suffix: str) -> list[str]:
    """What is unusual about an image file with this suffix; an empty list for a good file. Errors: Bomb."""
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
        image.draft(image.mode, (1, 1))  # still reads every bit of a JPEG, but saves most computation
        image.load()
    except Exception as error:
        cut = "truncated" in str(error) or "Truncated" in str(error)
        found.append(f"{'truncated' if cut else 'unreadable'}: {reason(error)}")
    return found


def shrunk(data: bytes, side: int, quality: int) -> bytes:
    """A JPEG whose shorter side has at most `side` pixels (bicubic). A file that Pillow cannot read is
    returned unchanged.
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
