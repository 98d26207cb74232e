"""Symbolic links that lead to a folder a second time, or round in a circle."""

import os
from pathlib import Path

from reconverge.base.errors import Exit, Stop


class Visits:
    """The folders below `root` that were visited, each by its device and inode, so that each is visited once.

    `again`: other ways to one of them, which are left out. Errors: Stop(USAGE) if two of the class folders
    `names` are the same folder, because their images would have two labels.
    """

    def __init__(self, root: Path, names: list[str]):
        self._root = os.path.realpath(root)
        self._way_to = {_identity(root): "."}
        self.again: list[str] = []
        for name in names:
            identity = _identity(root / name)
            if identity in self._way_to:
                raise Stop(
                    Exit.USAGE,
                    f"{root / name} and {root / self._way_to[identity]} are the same folder, through a link",
                    "class folders that are different folders",
                    "remove the link",
                )
            self._way_to[identity] = name

    def enters(self, path: str) -> bool:
        """Whether to visit the folder `path` of a class folder. A link to a folder below the root is left
        out, because that folder is visited under its own name; so is a link to a folder that holds the root.
        """
        identity, real = _identity(Path(path)), os.path.realpath(path)
        round_about = os.path.commonpath([real, self._root]) in (real, self._root)
        if identity in self._way_to or (os.path.islink(path) and round_about):
            self.again.append(path)
            return False
        self._way_to[identity] = path
        return True


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
