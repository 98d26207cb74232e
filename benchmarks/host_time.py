"""Measures the CPU time that the main process needs for a step beside the model, in two checkouts.

    git worktree add /tmp/before COMMIT
    python benchmarks/host_time.py /tmp/before [--rounds 5] [--steps 20]

On a GPU this is the time that the host needs to queue a step. Here the model keeps the number of its tensors,
but each has one element, and its forward pass is trivial; so the time of an operation is that of starting it.
Normalising, mixing and writing over what is erased are work of the device and are left out; drawing what
erases is counted. The checkouts take turns.
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
MODELS = {
    "ConvNeXt-T": ["model=convnext_t", "recipe=in1k"],
    "ResNet-50": ["model=timm", "model.timm=resnet50", "recipe=in1k", "model.drop_path=0"],
}


def small(net: Any) -> Any:
    """`net` with the same tensors, of one element each, and logits that are a mean of all parameters."""
    import torch

    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.numel():
                module._buffers[name] = buffer.flatten()[:1].reshape([1] * buffer.ndim).clone()
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.data = torch.zeros([1] * parameter.ndim)
    classes = net.num_classes

    def forward(images: torch.Tensor) -> torch.Tensor:
        return (
            torch.cat([parameter.flatten() for parameter in parameters]).mean().expand(len(images), classes)
        )

    net.forward = forward
    return net


def measure(steps: int, overrides: list[str]) -> None:
    """In a process of its own: print the CPU milliseconds of each step, after the first log interval."""
    import torch

    import train
    from reconverge.data.mix import Mixup, Normalise
    from reconverge.models import create
    from reconverge.run.log import Log

    model, spent, rows, left_out = create.model, [0.0], [], [0.0]
    create.model = lambda *given: small(model(*given))
    create.refuse_sizes = lambda *given: None

    def without(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def wrapper(*given: Any) -> Any:
            began = time.process_time()
            try:
                return function(*given)
            finally:
                left_out[0] += time.process_time() - began

        setattr(owner, name, wrapper)

    without(Normalise, "__call__")
    without(Mixup, "__call__")
    for name in ("__setitem__", "index_put_"):  # write what is erased
        without(torch.Tensor, name)
    step_done = Log.step_done

    def after_step(log: Log, *values: Any) -> None:
        step_done(log, *values)
        now = time.process_time() - left_out[0]
        rows.append(now - spent[0])
        spent[0] = now

    Log.step_done = after_step  # type: ignore[method-assign]
    sys.argv = ["train.py", *overrides, "debug=synthetic", "batch=128", "microbatch=128", "threads=1",
        "workers=1", "fused=true", "save_every=0", "evaluate_every=never", "optim.clip=1.0",
        f"steps={steps + 11}", "run=one"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        train.main()
    print(1e3 * statistics.mean(rows[11:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="a multiple of ten, the log interval")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.path.insert(0, str(arguments.other))
        return measure(arguments.steps, arguments.measure)
    print("| model | before, ms a step | now | ratio |\n|---|---|---|---|")
    for name, overrides in MODELS.items():
        found: dict[Path, list[float]] = {arguments.other: [], HERE: []}
        for _ in range(arguments.rounds):
            for checkout, times in found.items():
                command = [sys.executable, __file__, str(checkout), "--steps", str(arguments.steps)]
                environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
                said = subprocess.run(
                    [*command, "--measure", *overrides], env=environment, stdout=subprocess.PIPE, text=True
                )
                times.append(float(said.stdout.split()[-1]))
        before, now = (statistics.median(times) for times in found.values())
        ratio = statistics.median(one / two for one, two in zip(*found.values(), strict=True))
        print(f"| {name} | {before:.1f} | {now:.1f} | {ratio:.2f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
