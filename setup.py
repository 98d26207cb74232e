"""Builds native/ if there are a C compiler and libjpeg-turbo's headers, and otherwise installs without it.

See native/README.md.
"""

from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

files = sorted(Path("native").glob("*.[ch]"))
digest = sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
setup(
    ext_modules=[
        Extension(
            "reconverge.data._native",  # a C library without Python's API, which ctypes loads
            [str(path) for path in files if path.suffix == ".c"],
            depends=[str(path) for path in files],
            define_macros=[("SOURCE", f'"{digest}"')],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            libraries=["dl", "m"],
            optional=True,
        )
    ]
)
