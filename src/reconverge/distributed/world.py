"""The machine under a run: ranks, device, threads, precision. A lone process is a world of one.

The ranks of a run are one gloo group (group.py), which passes words between hosts; on GPUs, a second one of
NCCL adds gradients.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reconverge.base import environment, launcher
from reconverge.base.errors import Exit, Stop
from reconverge.distributed import group

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Value = TypeVar("Value")


class World:
    def __init__(self, device: str, precision: str, deterministic: bool):
        """Errors: Stop(USAGE) for a device or precision that this machine lacks."""
        self.rank, self.size, self.local_rank, _, self.launcher = launcher.HERE
        available = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and available == "cpu":
            raise Stop(
                Exit.USAGE,
                "device=cuda, and torch sees no GPU",
                "cpu, or a GPU with a driver that torch can use",
                "device=cpu",
            )
        self.device = torch.device(available if device == "auto" else device)
        self._of_gradients: Any = None  # None: the one group of all
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            self.device = torch.device("cuda", self._own_gpu())
            torch.cuda.set_device(self.device)
            if self.size > 1:
                self._of_gradients = group.of_gpus()
        self.precision = precision
        if precision == "tf32" and (self.device.type == "cpu" or torch.cuda.get_device_capability() < (8, 0)):
            raise Stop(
                Exit.USAGE,
                f"precision=tf32 on {self.hardware()}",
                "fp32, bf16, fp16; tf32 on an NVIDIA GPU since A100",
                "precision=fp32",
            )
        # Convolutions of torch take TF32 by default: published is fp32, so say which.
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        self.deterministic = deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(deterministic)
        # A debugging aid that costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not deterministic

    def _own_gpu(self) -> int:
        """The GPU of this rank, whether its launcher shows each task one or all of the node's.

        Errors: Stop(USAGE).
        """
        visible = torch.cuda.device_count()
        if visible > 1 and self.local_rank >= visible:
            raise Stop(
                Exit.USAGE,
                f"rank {self.rank} is number {self.local_rank} on its host, and {visible} GPUs are visible",
                "a rank a GPU",
                f"torchrun --nproc-per-node={visible}, or srun with as many tasks a node as GPUs",
            )
        return self.local_rank if visible > 1 else 0

    def set_threads(self, threads: int) -> None:
        """Another number of threads gives other bits."""
        self.threads = threads
        torch.set_num_threads(threads)

    # ---- words between hosts, through their memory ----

    def any(self, flag: bool) -> bool:
        """Whether it is raised on any rank."""
        return bool(self.gather(torch.tensor([float(flag)])).any())

    def gather(self, values: Tensor) -> Tensor:
        """Of each rank its `values`, as one tensor (ranks, *shape) on the host."""
        mine = values.detach().cpu().contiguous()
        if self.size == 1:
            return mine[None]
        gathered = torch.empty(self.size, *mine.shape, dtype=mine.dtype)
        dist.all_gather(list(gathered), mine)
        return gathered

    def gather_objects(self, value: Value) -> list[Value]:
        """Of each rank its `value`, in the order of ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def all_of(self, text: str) -> str:
        """What the ranks say, each text once."""
        return " and ".join(sorted(set(self.gather_objects(text))))

    def agree(self, what: str, value: Any) -> Any:
        """`value`, if all ranks have the same. Errors: Stop(NOT_COMPARABLE) with the ranks that differ."""
        values = self.gather_objects(value)
        others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise Stop(
                Exit.NOT_COMPARABLE,
                f"{what}: rank 0 has {values[0]}, and rank {', '.join(others)} {values[int(others[0])]}",
                "the same on every rank",
                f"start all of them with the same {what}",
            )
        return value

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """What they hold on rank 0, to every rank."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()  # of channels_last a copy
            dist.broadcast(values, src=0, group=self._of_gradients)
            tensor.detach().copy_(values)

    # ---- gradients, through the devices ----

    def add_up(self, values: Tensor) -> Callable[[], object]:
        """Begin to add `values` of all ranks, in place; call what it returns before they are read."""
        if self.size == 1:
            return lambda: None
        return dist.all_reduce(values, group=self._of_gradients, async_op=True).wait

    def exchange(self, mine: Tensor, partner: int, into: Tensor) -> None:
        """Send `mine` to the rank `partner`, and receive its own."""
        both = [
            dist.P2POp(dist.isend, mine, partner, self._of_gradients),
            dist.P2POp(dist.irecv, into, partner, self._of_gradients),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    # ---- the device ----

    def place(self, model: nn.Module, channels_last: bool) -> nn.Module:
        """The model on the device, its weights in the memory format that the images will have."""
        model = model.to(self.device)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16; does nothing for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def tracer(self, steps: int, path: Path) -> torch.profiler.profile | None:
        """A context that traces `steps` steps after the second into a file for ui.perfetto.dev, fewer if it
        ends before.

        Its step() is to be called after each. None for 0, and on other ranks than 0.
        """
        if steps == 0 or self.rank > 0:
            return None
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        return torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
        )

    def hardware(self) -> str:
        """What decides the bits beside versions and threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{environment.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def keep_freed_memory() -> None:
    """Let malloc keep large blocks that are freed, for the next step's tensors.

    Mapped anew each time, their pages are zeroed and faulted in one by one: 8 to 10 % of a training step on a
    CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def default_workers(device: torch.device) -> int:
    """On a GPU every core but the main process's, 16 at most; on a CPU one, for there the model takes the
    time.
    """
    return min(16 if device.type == "cuda" else 1, launcher.cores() - 1)


def default_threads(device: torch.device, workers: int) -> int:
    """Threads and workers together never take more than the cores."""
    return 1 if device.type == "cuda" else max(1, launcher.cores() - workers)
