"""What a run's bits hang on beside its configuration: versions, code, git, hardware. Imports no torch."""

import os
import platform
import socket
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reconverge.ranks import HERE

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "safetensors",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
)
ROOT = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def decisive_versions() -> dict[str, str]:
    """Of the packages another version of which may compute other bits."""
    return {
        name: text
        for name, text in versions().items()
        if name in ("torch", "torchvision", "timm", "numpy", "pillow")
    }


def code_hash() -> str:
    """sha256 over train.py, every module of the package, and native/: the code that decides the bits."""
    digest = sha256()
    for path in [
        ROOT / "train.py",
        *sorted((ROOT / "src" / "reconverge").rglob("*.py")),
        *sorted((ROOT / "native").glob("*.[ch]")),
    ]:
        if path.exists():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def git() -> dict[str, str] | None:
    """Commit, and hash of what differs from it; None outside a checkout."""

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
    """Of this start: who runs it and where."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "job": job(),
        "ranks": HERE.size,
    }


def job() -> str | None:
    """What a scheduler calls this job, before and after it was requeued."""
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" where nobody named it
    return os.environ.get("SLURM_JOB_ID") or (None if torchrun == "none" else f"torchrun {torchrun}")


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
