"""What libraries import only because it is there, and that takes long."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(name: str) -> Iterator[None]:
    """Imports within find no module `name`, unless it was imported before; afterwards it can be imported."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's own sign for this
    try:
        yield
    finally:
        del sys.modules[name]
