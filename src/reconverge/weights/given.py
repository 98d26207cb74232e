"""The name of weights in init=: what it names, and the suffixes :raw, :ema and :best behind it."""

from pathlib import Path
from typing import NamedTuple

from reconverge.base.errors import Exit, Stop


class Given(NamedTuple):
    name: str
    kind: str  # raw, ema, or nothing
    best: bool  # the checkpoint with the best top-1 of this kind


def parts(init: str) -> Given:
    """Errors: Stop(USAGE) if it is also the name of a file or folder."""
    rest, best = init.removesuffix(":best"), init.endswith(":best")
    name, _, kind = rest.rpartition(":")
    if not name or kind not in ("raw", "ema"):
        name, kind = rest, ""
    for longer in {init, rest} - {name}:
        if Path(longer).exists():
            raise Stop(
                Exit.USAGE,
                f"init={init} can mean the path {longer}, or the {kind or 'raw'} weights of {name}",
                "a name with one meaning",
                f"rename the file or folder {longer}",
            )
    return Given(name, kind, best)


def no_run(init: str, given: Given) -> Stop:
    """For :best behind something else than a run."""
    path = Path(given.name)
    kind = given.kind and f":{given.kind}"
    return Stop(
        Exit.USAGE,
        f"init={init}, but only a run has a best checkpoint",
        "runs/NAME:best or runs/NAME:ema:best",
        f"init={path.parent.parent}{kind}:best" if path.parent.name == "checkpoints" else f"init={path}",
    )
