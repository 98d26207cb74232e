"""What is an image: one list of formats and one decision about what is readable, for training, prepare,
check, evaluation and predictions. Imports no torch.
"""

import io
import warnings
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from reconverge.base.errors import reason

Image.init()
# Pillow warns of broken EXIF and of large images, in every data worker and epoch; `prepare` reports them.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow recognises a file by its content, whatever its name is. Only these formats are decoded: for others
# Pillow may run programs (EPS: Ghostscript) or open a file inside the file in any format (IPTC).
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
)
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
GRAY16 = ("I;16", "I;16L", "I;16B")


class Undecodable(Exception):
    """The data are not a complete image that Pillow can decode."""


@cache
def suffixes() -> set[str]:
    """Suffixes of image files: those of FORMATS; MPO is a JPEG with more pictures after the first."""
    return {
        suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS or name == "MPO"
    }


def opened(data: bytes | BinaryIO) -> ImageFile.ImageFile:
    """The image of which only the header has been read. Errors: Undecodable."""
    try:
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
    except Exception as error:  # OSError, ValueError, SyntaxError, struct.error and more on broken files
        raise undecodable(error) from None


def rgb(image: Image.Image) -> Image.Image:
    """The whole image with 8 bits for each of red, green and blue. Errors: Undecodable.

    As Pillow's convert("RGB"), except for gray images of more than 8 bits. Pillow makes nearly all of their
    pixels white. Here, 8 bits are the upper bits of 16, as Pillow itself does with colours of 16 bits. Other
    wide pixels (32 bits, signed, floating point) have no agreed white, and are undecodable.
    """
    try:
        if trouble := unusable(image):
            raise Undecodable(trouble)
        return (_upper_bits(image) if is_wide(image) else image).convert("RGB")
    except Exception as error:
        raise undecodable(error) from None


def is_wide(image: Image.Image) -> bool:
    """Whether this is a gray image with 9 to 16 bits per pixel."""
    return image.mode in GRAY16 or (image.mode == "I" and image.format in ("PNG", "PPM"))


def unusable(image: Image.Image) -> str | None:
    """Why a readable image has no pixels for a model, or None."""
    if image.mode == "F" or (image.mode == "I" and not is_wide(image)):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        return f"{kind} pixels, for which no value means white; convert the image to 8 or 16 bits per channel"
    return None


def _upper_bits(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits = int(np.ravel(tags.get(BITS, 16))[0]) if tags else 16
    pixels = np.asarray(image).astype(np.int64) >> (bits - 8)
    if tags.get(PHOTOMETRIC) == 0:  # 0 means white; Pillow inverts this for 8 bits only
        pixels = 255 - pixels
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def is_turned(image: ImageFile.ImageFile) -> bool:
    """Whether EXIF says that the stored pixels are to be turned or mirrored for viewing."""
    if "exif" not in image.info and image.format not in ("TIFF", "MPO"):
        return False
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # EXIF that cannot be parsed turns nothing
        return False


def is_transparent(image: ImageFile.ImageFile) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def is_animated(image: ImageFile.ImageFile) -> bool:
    """Whether the file has several pictures. Those of an MPO are a photograph and its previews."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # decoding says more
        return False


# What is used otherwise than a viewer shows it.
TURNED = (
    "with an EXIF orientation, which is not applied, as in the published runs (to use them upright, turn the"
    " files themselves, for example with jhead -autorot)"
)
WIDE = "in gray with more than 8 bits, of which the upper 8 are used"
TRANSPARENT = "with transparent pixels, which get the colour that is stored under them"
ANIMATED = "with several pictures in one file, of which the first is used"
KINDS = (TURNED, WIDE, TRANSPARENT, ANIMATED)


def kinds(image: ImageFile.ImageFile) -> list[str]:
    """Which of KINDS this image is."""
    found = (is_turned(image), is_wide(image), is_transparent(image), is_animated(image))
    return [kind for kind, is_one in zip(KINDS, found, strict=True) if is_one]


def undecodable(error: Exception) -> Exception:
    return error if isinstance(error, MemoryError | Undecodable) else Undecodable(reason(error))
