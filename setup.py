"""Builds native/ where there are a C compiler and libjpeg-turbo's headers, and installs without it where not. See native/README.md."""

from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

SOURCES = ["decode.c", "resample.c", "scalar.c", "avx2.c", "pixels.c"]
files = [Path("native") / name for name in ["pixels.h", *SOURCES]]
digest = sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
setup(
    ext_modules=[
        Extension(
            "reconverge.data._native",  # a plain C library, which ctypes loads
            [str(file) for file in files[1:]],
            depends=[str(file) for file in files],
            define_macros=[("SOURCE", f'"{digest}"')],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            libraries=["dl", "m"],
            optional=True,
        )
    ]
)
