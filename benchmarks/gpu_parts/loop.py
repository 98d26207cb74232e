"""Parts 4, 9, 10 and 11: what the training loop waits for, whole trainings, and a trace."""

import collections
import gzip
import json
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts.lab import ROOT, Lab, train

FAST = ["precision=bf16", "channels_last=true", "deterministic=false"]
DATASET = 1_281_167  # training images of ImageNet-1K


def hidden_waits(lab: Lab) -> None:
    """Each place in the code where the host waits for the device, in 20 steps between two log lines."""
    for name, settings in (("clipped", ["optim.clip=1"]), ("fp16", ["precision=fp16"])):
        if not lab.cuda and name == "fp16":
            continue
        found = lab.ask(name, lambda name=name, settings=settings: _waits(lab, name, settings))
        if found is not None:
            places = "".join(f"; {count} x {place}" for place, count in found.items())
            lab.tell(f"20 steps, {name}", f"waits: {sum(found.values())}{places}", not found, places=found)


def _waits(lab: Lab, run: str, settings: list[str]) -> dict[str, int]:
    """Place -> how often. On a GPU torch warns of each wait; on a CPU tensors that become numbers count."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from reconverge.run.log import Log

    first, last = 2, 22 if lab.cuda else 6
    found: collections.Counter[str] = collections.Counter()

    def note(*_: Any, **__: Any) -> None:
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
        others = ("/benchmarks/", "/site-packages/")  # a .venv may lie in the checkout
        own = [frame for frame in own if not any(part in frame.filename for part in others)]
        place = Path(own[-1].filename).relative_to(ROOT) if own else Path()  # the innermost
        # On a CPU the messages between hosts, which never touch the device, look like numbers of the device.
        if own and (lab.cuda or "distributed" not in place.parts):
            found[f"{place}:{own[-1].lineno} {own[-1].name}"] += 1

    class Numbers(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                note()
            return function(*args, **(kwargs or {}))

    numbers, step_done = Numbers(), Log.step_done
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_: note() if "synchronizing" in str(message) else None

    def watched(log: Any, number: int, *values: Any) -> None:
        if number == last and lab.cuda:
            torch.cuda.set_sync_debug_mode("default")
        elif number == last:
            numbers.__exit__(None, None, None)
        step_done(log, number, *values)
        if number == first and lab.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        elif number == first:
            numbers.__enter__()

    Log.step_done = watched  # type: ignore[method-assign]
    train(lab.arguments("convnext_t", f"waits-{run}", last, "log_every=1000", "workers=1", *settings))
    return dict(found)


def saving(lab: Lab) -> None:
    """Seconds until a checkpoint is on the disk, and how long the loop waits for it."""
    for model in ("convnext_b", "convnext_l") if lab.cuda else ("small",):
        if lab.left() < 2:
            lab.tell(model, "not tried: no time was left")
            continue
        found = lab.ask(model, lambda model=model: _saves(lab, model))
        if found is None:
            continue
        epoch = DATASET / found["images_per_second"]
        share = found["waits"] / epoch
        lab.tell(
            f"a checkpoint of {model}",
            f"{found['on_disk']:.2f} s until it is on the disk; the loop waits {found['waits']:.2f} s,"
            f" {share:.2%} of an epoch of ImageNet-1K at {found['images_per_second']:.0f} images/s",
            share < 0.01 if lab.cuda else None,
            **found,
        )


def _saves(lab: Lab, model: str) -> dict[str, float]:
    import torch

    from reconverge.milestones import Milestones
    from reconverge.run import reader

    batch, steps = (64, (4, 8)) if lab.cuda else (8, (2, 4))
    arguments = lab.arguments(model, "saved", steps[-1] + 2, f"batch={batch}", f"microbatch={batch}")
    arguments += ["log_every=1000", f"save_every={steps[0]}", *(["precision=bf16"] if lab.cuda else [])]
    waits, on_disk, ends = {}, {}, {}
    after = Milestones.after

    def poll(number: int, began: float) -> None:
        path = reader.checkpoint_of(lab.run("saved") / "checkpoints", number)
        while not path.exists():
            time.sleep(0.002)
        on_disk[number] = time.perf_counter() - began

    watchers = []

    def timed(milestones: Any, number: int) -> bool:
        if lab.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        if number in steps:
            watchers.append(threading.Thread(target=poll, args=(number, began), daemon=True))
            watchers[-1].start()
        stopping = after(milestones, number)
        waits[number] = time.perf_counter() - began
        ends[number] = began
        return stopping

    Milestones.after = timed  # type: ignore[method-assign]
    train(arguments)
    for watcher in watchers:
        watcher.join(5)
    usual = min(ends[number] - ends[number - 1] for number in range(2, steps[0] + 1))
    second = steps[-1]  # the first one has what is done once
    return {
        "waits": waits[second],
        "on_disk": on_disk.get(second, float("nan")),
        "first_waits": waits[steps[0]],
        "images_per_second": batch / usual,
    }


def training(lab: Lab) -> None:
    """The demo as `make demo` runs it; then, for the rest of the time, ConvNeXt-T on photographs."""
    few = [] if lab.cuda else ["steps=4", "batch=16", "microbatch=8", "workers=0", "evaluate_every=0"]
    demo = [f"device={lab.device}", "run=demo", f"data.cache={lab.cache}", "threads=1", *few]
    if not lab.well("the demo", lab.start("demo", lambda: train(demo))):
        return
    lines = _metrics(lab.run("demo"))
    best = max((line["ema_top1"] for line in lines if "ema_top1" in line), default=float("nan"))
    enough = best >= 97 if lab.cuda else None
    lab.tell("the demo", f"top-1 {best:.2f} % with EMA at its best, after {lines[-1]['step']} steps", enough)
    if lab.images is None or lab.left() < 15:
        return
    arguments = [
        "model=convnext_t", "recipe=in1k", "data=folder", f"data.root={lab.images}", "run=photographs",
        f"data.cache={lab.cache}", f"device={lab.device}", *FAST, "batch=512", "microbatch=128",
        "optim.warmup_epochs=1", "optim.lr=1e-3", "epochs=30", "save_every=0", "evaluate_every=0",
    ]  # fmt: skip
    child = lab.start("photographs", lambda: train(arguments))
    child.wait(lab.left() - 2)
    losses = [line["loss"] for line in _metrics(lab.run("photographs")) if "loss" in line]
    curve = ", ".join(f"{loss:.3f}" for loss in _spread(losses))
    lab.tell("convnext_t on photographs", f"loss {curve}", losses[-1] < losses[0] if losses[1:] else None)


def trace(lab: Lab) -> None:
    """Five steps by torch.profiler: trace.json.gz, the time without a kernel, and the largest kernels."""
    steps = 5 if lab.cuda else 2
    arguments = lab.arguments("convnext_t", "traced", steps + 3, f"debug.profile={steps}", "log_every=1000")
    found = lab.ask("traced", lambda: train([*arguments, *(FAST if lab.cuda else [])]))
    path = lab.run("traced") / "trace.json"
    if found is None and not path.exists():
        return
    events = json.loads(path.read_text())["traceEvents"]
    kind = "kernel" if lab.cuda else "cpu_op"
    kernels = [event for event in events if event.get("cat") == kind]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    idle = 1 - busy / whole
    lab.tell("gaps", f"{idle:.1%} of {whole / 1e6 / steps:.4f} s a step without a {kind}", None, idle=idle)
    total: collections.Counter[str] = collections.Counter()
    for event in kernels:
        total[event["name"]] += event["dur"]
    for name, spent in total.most_common(8):
        count = sum(event["name"] == name for event in kernels) / steps
        lab.tell("kernel", f"{spent / busy:.1%} in {count:.0f} a step: {name[:110]}", share=spent / busy)
    with open(path, "rb") as file, gzip.open(lab.out / "trace.json.gz", "wb", compresslevel=6) as packed:
        shutil.copyfileobj(file, packed)


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _spread(values: Sequence[float], most: int = 8) -> list[float]:
    """At most about `most` of them, evenly spaced, with the last."""
    return [*values[: -1 : max(1, len(values) // most)], *values[-1:]]
