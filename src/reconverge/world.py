"""The machine under a run: rank, device, threads, precision. A lone process is a world of one."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from reconverge import environment
from reconverge.errors import Exit, Stop

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class World:
    def __init__(self, device: str, precision: str, deterministic: bool):
        """Errors: Stop(USAGE) for a device or precision that this machine lacks, or several ranks."""
        self.rank, self.size = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise Stop(
                Exit.USAGE,
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
                "one process: this version trains on one device",
                "python train.py ..., without torchrun",
            )
        available = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and available == "cpu":
            raise Stop(Exit.USAGE, "device=cuda, and torch sees no GPU", "cpu, or a GPU with a driver that torch can use", "device=cpu")
        self.device = torch.device(available if device == "auto" else device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.precision = precision
        if precision == "tf32" and (self.device.type == "cpu" or torch.cuda.get_device_capability() < (8, 0)):
            raise Stop(
                Exit.USAGE, f"precision=tf32 on {self.hardware()}", "fp32, bf16, fp16; tf32 on an NVIDIA GPU since A100", "precision=fp32"
            )
        # Convolutions of torch take TF32 by default: published is fp32, so say which.
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        self.deterministic = deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time
        torch.backends.cudnn.benchmark = not deterministic

    def set_threads(self, threads: int) -> None:
        """Another number of threads gives other bits."""
        self.threads = threads
        torch.set_num_threads(threads)

    def place(self, model: nn.Module, channels_last: bool) -> nn.Module:
        """The model on the device, its weights in the memory format that the images will have."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16; does nothing for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def tracer(self, steps: int, path: Path) -> torch.profiler.profile | None:
        """A context that traces `steps` steps after the second into a file for ui.perfetto.dev, fewer if it ends before.

        Its step() is to be called after each. None for 0.
        """
        if steps == 0:
            return None
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        return torch.profiler.profile(schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path)))

    def hardware(self) -> str:
        """What decides the bits beside versions and threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{environment.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def keep_freed_memory() -> None:
    """Let malloc keep large blocks that are freed, for the next step's tensors.

    Mapped anew each time, their pages are zeroed and faulted in one by one: 8 to 10 % of a training step on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def default_workers(device: torch.device) -> int:
    """On a GPU every core but the main process's, 16 at most; on a CPU one, for there the model takes the time."""
    return min(16 if device.type == "cuda" else 1, environment.cores() - 1)


def default_threads(device: torch.device, workers: int) -> int:
    """Threads and workers together never take more than the cores."""
    return 1 if device.type == "cuda" else max(1, environment.cores() - workers)
