"""All random numbers start here: they are a function of a key, so no generator state is ever saved.

A key is a tuple such as (seed, "mix", step, microbatch). A key gives `uniform` numbers, a torch `generator`,
or a `scope`: for libraries that only use the global generators, it seeds these for one call.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import mtrand

if TYPE_CHECKING:  # importing torch takes seconds, and keys do not need it
    import torch


def key(*parts: int | str) -> int:
    """A 64-bit hash of the parts. Equal parts give equal keys on every machine and in every version."""
    text = "/".join(part if isinstance(part, str) else str(int(part)) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(shape: tuple[int, ...], *parts: int | str) -> np.ndarray:
    """float64 numbers in [0, 1), of `shape`.

    numpy keeps Philox's raw stream the same in all its versions, but not its distributions.
    """
    raw = np.random.Philox(key=key(*parts)).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def generator(*parts: int | str) -> "torch.Generator":
    """A CPU generator of torch. torch uses only the low 32 bits of a seed, so the key must be a hash."""
    import torch

    return torch.Generator().manual_seed(key(*parts))


# Replaces numpy's global generator inside a scope. Saving and restoring the state of the global generator
# would take longer than everything else in the scope.
_stand_in = np.random.MT19937(0)


@contextmanager
def scope(*parts: int | str) -> Iterator[None]:
    """Seed the global generators of python, numpy and torch (CPU) for one library call, and restore them
    after it.

    Each generator gets its own seed. python and numpy use the same algorithm: with one seed for both, a
    library would draw the same numbers twice. The CUDA generator is left alone, because nothing here draws
    random numbers on a GPU.
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
