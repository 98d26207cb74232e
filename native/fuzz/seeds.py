"""Writes small JPEGs of every kind as seeds for the fuzzer.

python native/fuzz/seeds.py FOLDER [whole|truncated|flipped]
"""

import io
import random
import struct
import sys
from pathlib import Path

from PIL import Image

KINDS = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True},
    {"restart_marker_blocks": 2},
    {"keep_rgb": True},
]


def main(folder: Path, damage: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(40):
        width, height = draw.randint(1, 60), draw.randint(1, 60)
        image = Image.effect_noise((width, height), 60).resize((width, height))
        image = Image.merge("RGB", (image, image.rotate(90), image.rotate(180)))
        image = (
            image.convert("L") if number % 7 == 0 else image.convert("CMYK") if number % 11 == 0 else image
        )
        options = {} if image.mode != "RGB" else KINDS[number % len(KINDS)]
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=draw.randint(20, 95), **options)
        data = bytearray(buffer.getvalue())
        if damage == "truncated":
            data = data[: draw.randint(len(data) // 3, len(data) - 1)]
        elif damage == "flipped":
            for _ in range(draw.randint(1, 6)):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        left, top = draw.randrange(width), draw.randrange(height)
        box = left, top, draw.randint(1, width - left), draw.randint(1, height - top)
        head = struct.pack(
            "<8H", *box, draw.randint(1, 69), draw.randint(1, 69), draw.randrange(8), draw.randrange(2)
        )
        (folder / f"{damage}-{number:02d}").write_bytes(head + data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "whole")
