"""From the bytes of an image file to pixels: one seam, bytes + crop box + size -> uint8 image, behind which
faster ways have their place.

The first of them is native.py, with the same pixels; where it is not to be had, or declines a file,
simplejpeg and Pillow serve. An image of Pillow's and not an array: that is what RandAugment takes, and going
there and back costs 3 % of a sample's time.
"""

import io
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from reconverge.base.errors import reason
from reconverge.data import native
from reconverge.data.native import RESAMPLING, Box

LARGEST = 2 * (
    Image.MAX_IMAGE_PIXELS or 1 << 27
)  # pixels, beyond which Pillow speaks of a decompression bomb


class Undecodable(Exception):
    """Not an image that Pillow can decode whole."""


def dimensions(data: bytes) -> tuple[int, int]:
    """Width and height, from the header alone. Errors: Undecodable."""
    if header := _plain_jpeg(data):
        return header
    return _opened(data).size


def crop_and_resize(
    data: bytes, box: Box, size: tuple[int, int], interpolation: str, fast: bool
) -> Image.Image:
    """The pixels of `box`, resampled to `size` (width, height), RGB; np.asarray gives them as uint8 (height,
    width, 3).

    Bit-equal to Pillow's convert("RGB").crop(box).resize(size, interpolation). `fast` takes torch's
    resampling of bytes where native/, which is faster still, does not serve: that differs by 0.04 of 255 on
    average, 8 at most on photographs, and takes about half of Pillow's time. EXIF is not parsed. Errors:
    Undecodable.
    """
    left, top, right, bottom = box
    library = native.chosen()
    pixels = library.crop_and_resize(data, box, size, interpolation) if library else None
    if pixels is not None:
        return native.to_image(pixels)
    if not fast:
        return _cropped(data, box).resize(size, RESAMPLING[interpolation])
    pixels = _decoded(data, "RGB")
    if pixels is None:
        pixels = np.array(_converted(data))
    planes = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[
        None
    ]  # (H, W, 3) -> (1, 3, H, W), in the same memory
    planes = torch.nn.functional.interpolate(planes, size[::-1], mode=interpolation, antialias=True)
    return Image.fromarray(planes[0].permute(1, 2, 0).numpy())


def _cropped(data: bytes, box: Box) -> Image.Image:
    left, top, right, bottom = box
    pixels = _decoded(data, "RGBX")
    if pixels is None:
        return _converted(data).crop(box)
    # Pillow keeps four bytes a pixel too: of the crop alone, each row is copied as it is.
    width = pixels.shape[1]
    rows: Any = pixels.reshape(-1)[4 * (top * width + left) :]
    return Image.frombytes("RGB", (right - left, bottom - top), rows, "raw", "RGBX", 4 * width, 1)


def _decoded(data: bytes, space: str) -> np.ndarray | None:
    """The whole image: uint8 (H, W, channels of `space`). None where it is for Pillow to decide."""
    try:
        return simplejpeg.decode_jpeg(data, space) if _plain_jpeg(data) else None
    except ValueError:  # a warning of libjpeg is enough; Pillow reads on where it can
        return None


def _converted(data: bytes) -> Image.Image:
    try:
        return _opened(data).convert("RGB")
    except Exception as error:  # OSError, ValueError, SyntaxError, struct.error and more on broken files
        raise _undecodable(error) from None


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that needs nothing of Pillow: gray or YCbCr (not CMYK), and no bomb."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if space in ("YCbCr", "Gray") and 0 < width * height <= LARGEST else None


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:
        raise _undecodable(error) from None


def _undecodable(error: Exception) -> Exception:
    return error if isinstance(error, MemoryError | Undecodable) else Undecodable(reason(error))
