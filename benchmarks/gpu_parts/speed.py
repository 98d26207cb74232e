"""Parts 2b, 5 and 6: kernels, whole steps and inference against the clock."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu_parts.lab import SMALL, Lab, command, train

TIMM = {"convnext_t": "convnext_tiny", "convnext_b": "convnext_base", "resnet50": "resnet50"}
EXACT = ["precision=bf16", "deterministic=true"]
FAST = ["precision=bf16", "channels_last=true", "deterministic=false"]
# name, model, settings, in the order of importance
STEPS = (
    ("bf16 channels_last", "convnext_t", FAST),
    ("bf16 channels_last deterministic", "convnext_t", [*FAST, "deterministic=true"]),
    ("bf16 deterministic", "convnext_t", EXACT),
    ("fp32 deterministic", "convnext_t", ["precision=fp32"]),
    ("bf16 channels_last", "resnet50", FAST),
    ("bf16 channels_last", "convnext_b", FAST),
    ("bf16 channels_last compile", "convnext_t", [*FAST, "compile=true"]),
    ("tf32 channels_last", "convnext_t", ["precision=tf32", "channels_last=true", "deterministic=false"]),
)


def depthwise(lab: Lab) -> None:
    """Forward and backward of one ConvNeXt block: memory layout x deterministic kernels x precision."""
    import torch
    from timm.models.convnext import ConvNeXtBlock

    from reconverge.config import compose

    if not lab.cuda:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, sizes = (128, ((96, 56), (384, 14))) if lab.cuda else (2, ((40, 8),))
    torch.backends.cudnn.allow_tf32 = False
    deterministic_best: dict[str, str] = {}
    for (width, side), dtype in itertools.product(sizes, (torch.bfloat16, torch.float32)):
        found: dict[tuple[str, bool], float] = {}
        for layout, deterministic in itertools.product(("contiguous", "channels_last"), (True, False)):
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.benchmark = not deterministic
            kind = getattr(torch, "contiguous_format" if layout == "contiguous" else layout)
            block = ConvNeXtBlock(width, ls_init_value=1e-6).to(lab.device).to(memory_format=kind)
            images = torch.randn(batch, width, side, side).to(lab.device).to(memory_format=kind)
            name = f"{width} x {side} x {side} {str(dtype)[6:]} {layout}" + " deterministic" * deterministic

            def step(block: Any = block, images: Any = images, dtype: Any = dtype) -> Any:
                with torch.autocast(lab.device, dtype, enabled=dtype != torch.float32):
                    loss = block(images).float().square().mean()
                return torch.autograd.grad(loss, list(block.parameters()))

            try:
                one, other = step(), step()
            except RuntimeError as error:
                lab.tell(name, f"{type(error).__name__}: {str(error).splitlines()[0]}", False)
                continue
            same = all(map(torch.equal, one, other))
            found[layout, deterministic] = milliseconds = 1000 * _seconds(
                lab, step, 0.3 if lab.cuda else 0.05
            )
            bits = "the same bits twice" if same else "OTHER BITS the second time"
            lab.tell(name, f"{milliseconds:.3f} ms, {bits}", same or not deterministic, ms=milliseconds)
        if len(found) == 4:
            exact = min(("contiguous", "channels_last"), key=lambda layout: found[layout, True])
            cost = found[exact, True] / min(found.values())
            deterministic_best[f"{width} {str(dtype)[6:]}"] = f"{exact}, {cost:.2f} of the fastest"
    said = "; ".join(f"{case}: {text}" for case, text in deterministic_best.items())
    preset = compose.of_training(["machine=gpu_exact"])
    layout = "channels_last" if preset.channels_last else "contiguous"
    fits = all(text.startswith(layout) for case, text in deterministic_best.items() if "bfloat16" in case)
    met = fits and bool(deterministic_best) if lab.cuda else None
    lab.tell("fastest deterministic layout", f"{said} (machine=gpu_exact has {layout})", met)


def step(lab: Lab) -> None:
    """train.py's step with images that are already on the device, beside a bare loop over timm's model."""
    speeds: dict[tuple[str, str], float] = {}
    for name, model, settings in STEPS if lab.cuda else STEPS[2:3]:
        whole = f"{model} {name}"
        if lab.left() < (8 if lab.cuda else 1):
            lab.tell(whole, "not tried: no time was left")
            continue
        found = lab.ask(whole, lambda model=model, settings=settings: _step(lab, model, settings))
        if found is None:
            continue
        speeds[model, name] = found["ours"]
        ratio, plain = found["bare with EMA"] / found["ours"], found["bare"] / found["ours"]
        lab.tell(
            whole,
            f"{found['ours']:.0f} images/s; {ratio:.3f} of the time of the bare loop with timm's EMA,"
            f" {plain:.3f} of that without EMA",
            ratio <= 1.03 if lab.cuda else None,
            **found,
        )
    for model, free in (("convnext_t", "bf16 channels_last"),):
        for name in (f"{free} deterministic", "bf16 deterministic"):
            if (model, free) in speeds and (model, name) in speeds:
                cost = speeds[model, free] / speeds[model, name]
                lab.tell(f"{model} {name}", f"{cost:.2f} of the time of {free} without deterministic")


def _step(lab: Lab, model: str, settings: list[str]) -> dict[str, float]:
    """images/s of our step and of the bare loop. A step is one microbatch: AdamW and EMA weigh most then."""
    import torch

    from reconverge import build
    from reconverge.data.loader import Feed
    from reconverge.run.log import Log

    warm, steps, batch = (8, 20, 128) if lab.cuda else (1, 2, 4)
    arguments = [*lab.arguments(model, "step", warm + steps + 1), *settings]
    arguments += [f"batch={batch}", f"microbatch={batch}", "log_every=1000", "workers=0"]
    times: dict[int, float] = {}
    step_done = Log.step_done

    class OnDevice(Feed):
        """The first batch again and again: no data loader and no copy."""

        def __iter__(self) -> Iterator[Any]:
            batches = super().__iter__()
            first = next(batches)
            batches.close()  # type: ignore[attr-defined]
            yield from itertools.repeat(first)

    def timed(log: Any, number: int, *values: Any) -> None:
        if number in (warm, warm + steps):
            _wait(lab)
            times[number] = time.perf_counter()
        step_done(log, number, *values)

    build.Feed = OnDevice  # type: ignore[misc]
    Log.step_done = timed  # type: ignore[method-assign]
    train(arguments)
    found = {"ours": batch * steps / (times[warm + steps] - times[warm])}
    if lab.cuda:
        torch.cuda.empty_cache()
    size = 224 if lab.cuda else 32
    for name, ema in (("bare with EMA", True), ("bare", False)):
        job = _bare(lab, TIMM[model] if lab.cuda else SMALL, batch, size, settings, ema)
        for _ in range(warm):
            job()
        _wait(lab)
        began = time.perf_counter()
        for _ in range(steps):
            job()
        _wait(lab)
        found[name] = batch * steps / (time.perf_counter() - began)
        del job
    return found


def _bare(lab: Lab, model: str, batch: int, size: int, settings: list[str], ema: bool) -> Callable[[], None]:
    """The shortest training step: timm's model, cross-entropy with soft targets, fused AdamW, timm's EMA."""
    import timm
    import torch
    from timm.utils import ModelEmaV3

    layout = torch.channels_last if "channels_last=true" in settings else torch.contiguous_format
    dtype = torch.bfloat16 if "precision=bf16" in settings else torch.float32
    net = timm.create_model(model, drop_path_rate=0.1, num_classes=1000)
    net = net.to(lab.device).to(memory_format=layout).train()
    forward = torch.compile(net) if "compile=true" in settings else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, weight_decay=0.05, fused=True)
    averaged = ModelEmaV3(net, decay=0.9999, foreach=True) if ema else None
    images = torch.randn(batch, 3, size, size).to(lab.device).to(memory_format=layout)
    targets = torch.full((batch, 1000), 1e-3, device=lab.device)

    def job() -> None:
        with torch.autocast(lab.device, dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(forward(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if averaged is not None:
            averaged.update(net, step=100_000)

    return job


def inference(lab: Lab) -> None:
    """`reconverge bench model` for T, S and B, beside the published figures of an A100."""
    models = ("convnext_t", "convnext_s", "convnext_b") if lab.cuda else ("small",)
    ways = (["precision=tf32", "channels_last=true"], ["precision=bf16", "channels_last=true"],
        ["precision=fp32"]) if lab.cuda else (["precision=fp32"],)  # fmt: skip
    for settings, model in itertools.product(ways, models):
        if lab.left() < (4 if lab.cuda else 1):
            lab.tell(f"{model} {' '.join(settings)}", "not tried: no time was left")
            continue
        size = [] if lab.cuda else ["evaluate.size=32", "augment.size=32", "threads=1", "model.drop_path=0"]
        batch, seconds = ("256", "1.5") if lab.cuda else ("4", "0.2")
        arguments = ["bench", "model", *lab.model(model), "recipe=in1k", f"device={lab.device}", *settings,
            "deterministic=false", *size, "--batches", batch, "--seconds", seconds, "--phase", "inference",
            "--json", "bench.json"]  # fmt: skip
        name = (
            f"{model} {' '.join(one.partition('=')[2] for one in settings).replace('true', 'channels_last')}"
        )

        def job(arguments: list[str] = arguments) -> Any:
            command(arguments)
            with open("bench.json") as file:
                return json.load(file)

        if (found := lab.ask(name, job)) is None or not found["measured"]:
            continue
        speed = found["measured"][0]["images_per_second"]
        figures = found["published"].get("224", {})
        published = figures.get("A100 tf32 channels_last, images/s")
        tf32 = published is not None and "precision=tf32" in settings
        beside = f"; published on an A100: {published:g}" if tf32 else ""
        said = f"{speed:.0f} images/s at batch {batch}{beside}"
        lab.tell(name, said, speed > published if tf32 else None, images_per_second=speed)


def _wait(lab: Lab) -> None:
    import torch

    if lab.cuda:
        torch.cuda.synchronize()


def _seconds(lab: Lab, job: Callable[[], object], seconds: float) -> float:
    """Median time of a call, which is waited for."""
    spent: list[float] = []
    while sum(spent) < seconds or len(spent) < 5:
        _wait(lab)
        began = time.perf_counter()
        job()
        _wait(lab)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[2:])
