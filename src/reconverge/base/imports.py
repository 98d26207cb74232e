"""Avoids slow imports that a library makes only because an optional package is installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(name: str) -> Iterator[None]:
    """Inside, importing `name` fails unless it was imported before; afterwards it can be imported again."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # None makes the import system raise ImportError
    try:
        yield
    finally:
        del sys.modules[name]
