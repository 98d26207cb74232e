"""The machine of a run: ranks, device, threads, precision. A single process is a world of size one.

All ranks form a gloo group (group.py) for messages between hosts. On GPUs, a second group with NCCL sums
gradients.
"""

import ctypes
import socket
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
from reconverge.distributed import group, libraries

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Value = TypeVar("Value")


class World:
    def __init__(self, device: str, precision: str, deterministic: bool):
        """Errors: Stop(USAGE) for a device or precision that this machine lacks."""
        self.deterministic = deterministic
        libraries.set_modes(deterministic)  # before CUDA starts, and before NCCL's group is made
        self.rank, self.size, self.local_rank, _, self.launcher = launcher.HERE
        available = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and available == "cpu":
            raise Stop(
                Exit.USAGE,
                "device=cuda, but torch finds no GPU",
                "device=cuda only with an NVIDIA GPU and a driver that torch can use",
                "device=cpu; for a GPU, check nvidia-smi and torch.cuda.is_available()",
            )
        self.device = torch.device(available if device == "auto" else device)
        self._of_gradients: Any = None  # the group that sums gradients; None means the gloo group
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            self.device = torch.device("cuda", self._own_gpu())
            torch.cuda.set_device(self.device)
            if self.size > 1:
                self._refuse_shared_gpu()
                self._of_gradients = group.of_gpus()
        self.precision = precision
        if precision == "tf32" and (self.device.type == "cpu" or torch.cuda.get_device_capability() < (8, 0)):
            raise Stop(
                Exit.USAGE,
                f"precision=tf32 on {self.hardware()}",
                "fp32, bf16 or fp16; tf32 only on NVIDIA GPUs since A100 (compute capability 8.0)",
                "precision=fp32",
            )
        # torch's defaults have changed: 1.8, of the published runs, took TF32 for convolutions and matrix
        # products on an A100, and newer ones only for convolutions. So set both explicitly.
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")

    def _own_gpu(self) -> int:
        """The GPU of this rank. The launcher may show each task only one GPU, or all GPUs of the node.

        Errors: Stop(USAGE).
        """
        visible = torch.cuda.device_count()
        if visible > 1 and self.local_rank >= visible:
            raise Stop(
                Exit.USAGE,
                f"rank {self.rank} is number {self.local_rank} (from 0) on its host, but only {visible} GPUs"
                " are visible",
                "one GPU for each rank",
                f"torchrun --nproc-per-node={visible}, or srun with as many tasks per node as GPUs",
            )
        return self.local_rank if visible > 1 else 0

    def _refuse_shared_gpu(self) -> None:
        """Errors: Stop(USAGE) if two ranks have the same GPU, for which NCCL would stop with an error."""
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        gpus = self.gather_objects((socket.gethostname(), uuid))
        shared = {gpu: [rank for rank, other in enumerate(gpus) if other == gpu] for gpu in gpus}
        for (host, uuid), ranks in shared.items():
            if len(ranks) > 1:
                raise Stop(
                    Exit.USAGE,
                    f"ranks {', '.join(map(str, ranks))} have the same GPU: GPU-{uuid} on host {host}",
                    "one GPU for each rank",
                    "as many ranks on a host as it has GPUs (torchrun --nproc-per-node, or srun"
                    " --ntasks-per-node with --gpus-per-task=1); CUDA_VISIBLE_DEVICES must not hide GPUs",
                )

    def set_threads(self, threads: int) -> None:
        """Set the number of threads of torch. A different number gives different bits."""
        self.threads = threads
        torch.set_num_threads(threads)

    # ---- messages between hosts ----

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self.gather(torch.tensor([float(flag)])).any())

    def gather(self, values: Tensor) -> Tensor:
        """The `values` of all ranks as one tensor (ranks, *shape) on the host."""
        mine = values.detach().cpu().contiguous()
        if self.size == 1:
            return mine[None]
        gathered = torch.empty(self.size, *mine.shape, dtype=mine.dtype)
        dist.all_gather(list(gathered), mine)
        return gathered

    def total(self, values: Tensor) -> Tensor:
        """The sum of the `values` of all ranks, which are on the host; they are overwritten.

        It takes as much memory and time for any number of ranks, unlike `gather`.
        """
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value: Value) -> list[Value]:
        """The `value` of each rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def all_of(self, text: str) -> str:
        """The texts of all ranks, each different text once."""
        return " and ".join(sorted(set(self.gather_objects(text))))

    def agree(self, what: str, value: Any) -> Any:
        """`value`, if it is equal on all ranks. Errors: Stop(NOT_COMPARABLE) with the ranks that differ."""
        values = self.gather_objects(value)
        others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise Stop(
                Exit.NOT_COMPARABLE,
                f"different {what}: rank 0 has {values[0]}, rank {', '.join(others)} has"
                f" {values[int(others[0])]}",
                f"the same {what} on every rank",
                f"start all ranks with the same {what}",
            )
        return value

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors of rank 0 to every rank."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()  # this is a copy for channels_last tensors
            dist.broadcast(values, src=0, group=self._of_gradients)
            tensor.detach().copy_(values)

    def layout(self) -> int | str:
        """The number of ranks, or on GPUs "2 x 4" for two hosts with four ranks each.

        NCCL adds in rings whose order follows the hosts. gloo adds in the order of the ranks, wherever they
        are.
        """
        if self.device.type == "cpu":
            return self.size
        places = self.gather_objects((launcher.HERE.local_rank, launcher.HERE.local_size))
        hosts = [ranks for number, ranks in places if number == 0]
        return f"{len(hosts)} x {hosts[0]}" if len(set(hosts)) == 1 else " + ".join(map(str, hosts))

    # ---- gradients between devices ----

    def add_up(self, values: Tensor) -> Callable[[], object]:
        """Start to sum the `values` of all ranks in place. Call the returned function before reading them."""
        if self.size == 1:
            return lambda: None
        return dist.all_reduce(values, group=self._of_gradients, async_op=True).wait

    def exchange(self, mine: Tensor, partner: int, into: Tensor) -> None:
        """Send `mine` to the rank `partner`, and receive the partner's tensor in `into`."""
        both = [
            dist.P2POp(dist.isend, mine, partner, self._of_gradients),
            dist.P2POp(dist.irecv, into, partner, self._of_gradients),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    # ---- the device ----

    def place(self, model: nn.Module, channels_last: bool) -> nn.Module:
        """Move the model to the device, with weights in the same memory format as the images."""
        model = model.to(self.device)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def compiled(self, function: Value) -> Value:
        """`function` by torch.compile, with one graph for each shape of its inputs.

        By default torch would make the second shape, such as that of a smaller last forward pass, a graph for
        all shapes, and use it for the first shape too. A resumed process would not have that graph yet.
        inductor's deterministic mode chooses kernels by rules; by default it times some of them.
        """
        import torch._dynamo.config as dynamo  # these take seconds
        import torch._inductor.config as inductor

        dynamo.recompile_limit = 64  # `reconverge bench model` has ten shapes, and torch gives up after eight
        if hasattr(inductor, "deterministic"):  # not in every version of torch
            inductor.deterministic = self.deterministic
        compiled: Any = torch.compile(function, dynamic=False)  # type: ignore[call-overload]
        return compiled

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, and does nothing for other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def tracer(self, steps: int, path: Path) -> torch.profiler.profile | None:
        """A context that traces `steps` steps, after the first two, into a file for ui.perfetto.dev; fewer if
        training ends before.

        Call its step() after each step. None if `steps` is 0, and on all ranks except rank 0.
        """
        if steps == 0 or self.rank > 0:
            return None
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        return torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
        )

    def hardware(self) -> str:
        """The device's name. Like versions and threads, it decides the bits."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{environment.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def keep_freed_memory() -> None:
    """Make malloc keep large freed blocks for the tensors of the next step.

    Otherwise the system maps their pages again and fills them with zeros in each step, which takes 8 to 10 %
    of a training step on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings for large blocks
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: return no memory to the system


def default_workers(device: torch.device) -> int:
    """Data workers: with a GPU all cores but one, 16 at most; on a CPU one, because the model needs the
    cores.
    """
    return min(16 if device.type == "cuda" else 1, launcher.cores() - 1)


def default_threads(device: torch.device, workers: int) -> int:
    """Threads of torch. Threads and data workers together use no more than the cores."""
    return 1 if device.type == "cuda" else max(1, launcher.cores() - workers)
