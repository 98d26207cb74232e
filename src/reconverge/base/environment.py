"""What decides the bits of a run besides its configuration: versions, code, hardware. Imports no torch."""

import os
import platform
import socket
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import reconverge
from reconverge.base import launcher

# Another version of these may give different bits.
DECISIVE = ("torch", "torchvision", "timm", "numpy", "pillow")
PACKAGES = (*DECISIVE, "safetensors", "torchmetrics", "segmentation-models-pytorch", "hydra-core",
    "omegaconf")  # fmt: skip
ROOT = Path(__file__).parents[3]
# The folders and modules of the package that a training step runs.
DECIDES = ("base", "config", "distributed", "data", "models", "training", "run", "weights", "tasks",
    "build", "milestones")  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def in_words() -> str:
    """For --version: reconverge 0.1.0 (python 3.11.7, torch 2.12.1, ...)."""
    packages = ", ".join(f"{name} {text}" for name, text in versions().items())
    return f"reconverge {reconverge.__version__} ({packages})"


def decisive_versions() -> dict[str, str]:
    """Versions of the packages in DECISIVE."""
    return {name: text for name, text in versions().items() if name in DECISIVE}


def code_hash() -> str:
    """sha256 of the code that decides the bits: train.py, the parts of the package in DECIDES, and native/.

    The other folders of the package only read a run, or start one, so they may change while it trains.
    """
    package = ROOT / "src" / "reconverge"
    modules = [path for part in DECIDES for path in (package / part).rglob("*.py")]
    modules += [package / f"{part}.py" for part in DECIDES]
    digest = sha256()
    for path in [ROOT / "train.py", *sorted(modules), *sorted((ROOT / "native").glob("*.[ch]"))]:
        if path.exists():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def git() -> dict[str, str] | None:
    """The commit, and the sha256 of uncommitted changes ("" if there are none); None outside a checkout."""

    def ask(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
        ).stdout

    try:
        if Path(ask("rev-parse", "--show-toplevel").strip()) != ROOT:
            return None
        diff = ask("diff", "HEAD", "--", "train.py", "eval.py", "src", "conf")
        return {
            "commit": ask("rev-parse", "HEAD").strip(),
            "diff": sha256(diff.encode()).hexdigest() if diff else "",
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def host() -> dict[str, Any]:
    """The host, process and scheduler job of this start."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "driver": driver(),
        "job": launcher.job(),
        "ranks": launcher.HERE.size,
    }


def driver() -> str | None:
    """NVIDIA's driver, as its kernel module describes itself; None if there is none."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
