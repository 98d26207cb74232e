"""All randomness starts here: a draw is a function of its key, and nothing random is ever saved.

A key is a tuple such as (seed, "mix", step, microbatch). Three forms are offered: `uniform` numbers,
a torch `generator`, and, for libraries that only know the global generators, a `scope` around one call.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import mtrand

if TYPE_CHECKING:  # it takes seconds, and keys alone do without it
    import torch


def key(*parts: int | str) -> int:
    """64-bit key of its parts. Equal parts give equal keys on every machine and in every version."""
    text = "/".join(part if isinstance(part, str) else str(int(part)) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(shape: tuple[int, ...], *parts: int | str) -> np.ndarray:
    """float64 numbers in [0, 1), of `shape`.

    Philox's raw stream is fixed for all versions of numpy; its distributions are not.
    """
    raw = np.random.Philox(key=key(*parts)).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def generator(*parts: int | str) -> "torch.Generator":
    """A CPU generator of torch. It keeps the low 32 bits of a seed, which is why the key is a hash."""
    import torch

    return torch.Generator().manual_seed(key(*parts))


# Takes the place of numpy's global generator in a scope: saving and restoring that one's state would take
# longer than all of the rest.
_stand_in = np.random.MT19937(0)


@contextmanager
def scope(*parts: int | str) -> Iterator[None]:
    """Seed the global generators of python, numpy and torch (CPU) for the draws of one library call; put them
    back after it.

    Each has a key of its own: seeded alike, python and numpy are the same generator, and what a library draws
    from one would repeat what it draws from the other. Without CUDA's: nothing here draws random numbers on a
    GPU.
    """
    import torch

    before = random.getstate(), mtrand.get_bit_generator(), torch.default_generator.get_state()
    assert before[1] is not _stand_in, "scopes do not nest"
    random.seed(key(*parts, "python"))
    mtrand.set_bit_generator(_stand_in)
    np.random.seed(key(*parts, "numpy") % 2**32)
    torch.default_generator.manual_seed(key(*parts, "torch"))
    try:
        yield
    finally:
        random.setstate(before[0])
        mtrand.set_bit_generator(before[1])
        torch.default_generator.set_state(before[2])
