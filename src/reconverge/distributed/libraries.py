"""The libraries that torch computes with: the modes that make them repeat a result, and their versions.

cuDNN, cuBLAS, NCCL and triton are packages of their own: another version may come under the same torch.
"""

import os
import re
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("cublas", "cudnn", "nccl", "cuda-runtime", "cuda-nvrtc")  # nvidia-NAME, or nvidia-NAME-cu12
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO")  # that choose an order of additions


def set_modes(deterministic: bool) -> None:
    """Let the same inputs give the same bits, or not. Call it before any process group exists and before CUDA
    starts; a second call with the same value changes nothing.

    NVSwitch can add gradients for NCCL (the algorithm NVLS), in an order that differs between calls
    (github.com/NVIDIA/nccl/issues/1497). torch reads the deterministic mode when the first NCCL group is made
    and then forbids NVLS. NCCL_ALGO forbids it as well, and leaves no choice that a timing could change.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic:
        os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(deterministic)
    # This is only a debugging aid, and it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic


def decisive(device: torch.device) -> dict[str, str]:
    """What may give other bits under the same torch: name -> version or value. The driver is not among it.

    On a CPU these are MKL and oneDNN; on a GPU also the CUDA libraries that are loaded, the installed
    packages, the GPU's compute capability, and the environment variables in VARIABLES.
    """
    built = torch.__config__.show()
    patterns = {"MKL": r"Math Kernel Library Version (\S+?)-", "oneDNN": r"(?:MKL-DNN|oneDNN) v([\d.]+)"}
    found = {name: match[1] for name, text in patterns.items() if (match := re.search(text, built))}
    if device.type == "cpu":
        return found
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if number := torch.backends.cudnn.version():
        found["cuDNN"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"  # 92600: 9.26.0
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    major = (torch.version.cuda or "").partition(".")[0]
    names = [f"nvidia-{name}{suffix}" for name in PACKAGES for suffix in ("", f"-cu{major}")]
    for name in (*names, "triton", "pytorch-triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["compute capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}
