"""Finds unusual and unreadable images by decoding them once, and makes the smaller copies for --resize."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from reconverge.base.errors import reason
from reconverge.data import image as images
from reconverge.data import shards
from reconverge.data.image import Undecodable

UNREADABLE = ("empty", "unreadable", "truncated")  # --drop-unreadable leaves out these

_warned = threading.local()  # .texts: Pillow's warnings in this thread


def is_unreadable(word: str) -> bool:
    """Whether a word of oddities() says that the image cannot be decoded."""
    return word.startswith(UNREADABLE)


class Bomb(Exception):
    """An image with too many pixels for the memory."""


@contextmanager
def warnings_kept() -> Iterator[None]:
    """Inside, Pillow's warnings are kept for oddities(), and not printed.

    Use it in the main thread, around all other threads, because warning filters are global to the process.
    """

    def keep(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        getattr(_warned, "texts", []).append(str(message))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.showwarning = keep
        yield


def oddities(data: bytes, suffix: str) -> list[str]:
    """What is unusual about an image file with this suffix; an empty list for a good file. Errors: Bomb.

    Whether it is readable is what training decides, by the same functions of image.py.
    """
    if not data:
        return ["empty"]
    _warned.texts = []
    try:
        image = images.opened(data)
    except Undecodable as error:
        if "DecompressionBombError" in str(error):
            raise Bomb(str(error)) from None
        return [f"unreadable: {error}"]
    found = []
    form = str(image.format)
    if form != Image.registered_extensions().get(f".{suffix}") and (form, suffix) != ("MPO", "jpg"):
        found.append(f"{form}, named .{suffix}")
    if image.mode == "CMYK":
        found.append("CMYK")
    try:
        image.getexif()  # raises at the first call only
    except Exception as error:
        _warned.texts.append(reason(error))
    if _warned.texts and "exif" in image.info:
        found.append(f"EXIF that cannot be parsed: {_warned.texts[0]}")
    found += images.kinds(image)
    try:
        colours = images.rgb(image).getcolors(1)  # None if there are more than one
    except Undecodable as error:
        cut = "truncated" in str(error) or "Truncated" in str(error)
        found.append(f"{'truncated' if cut else 'unreadable'}: {error}")
    else:
        found += [shards.FLAT] * (colours is not None)
    return found


def shrunk(data: bytes, side: int, quality: int) -> bytes:
    """A JPEG whose shorter side has at most `side` pixels (bicubic). A file that Pillow cannot read is
    returned unchanged.
    """
    try:
        image = images.rgb(images.opened(data))
    except Undecodable:
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
