"""Parts 1, 2 and 3: does it run, are the bits equal, and what do forward passes change?"""

import json
import re
import time
from pathlib import Path

from gpu_parts.lab import Lab, command, train

STEPS, KILLED_AFTER = 12, 6
# name, model, settings; the most important first, and compiled ones, which take long, last.
CASES = (
    ("convnext_t bf16", "convnext_t", ["precision=bf16"]),
    ("convnext_t fp32", "convnext_t", ["precision=fp32"]),
    ("convnext_t bf16 channels_last", "convnext_t", ["precision=bf16", "channels_last=true"]),
    ("resnet50 bf16 channels_last", "resnet50", ["precision=bf16", "channels_last=true"]),
    ("resnet50 bf16", "resnet50", ["precision=bf16"]),
    ("convnext_t tf32 channels_last", "convnext_t", ["precision=tf32", "channels_last=true"]),
    ("convnext_t fp16", "convnext_t", ["precision=fp16"]),
    ("swin_t bf16", "swin_t", ["precision=bf16"]),
    ("deit_s bf16", "deit_s", ["precision=bf16"]),
    ("convnext_t bf16 checkpointing", "convnext_t", ["precision=bf16", "checkpointing=true"]),
    ("convnext_atto bf16 compile", "convnext_atto", ["precision=bf16", "compile=true"]),
    ("convnext_t fp32 channels_last", "convnext_t", ["precision=fp32", "channels_last=true"]),
)
ON_A_CPU = {"convnext_t fp32"}


def selftest(lab: Lab) -> None:
    """`reconverge selftest`: the checks that train on the GPU, or R1 on a CPU; each line as it comes."""
    lab.ask("NCCL with one rank" if lab.cuda else "gloo with one rank", lambda: _one_rank(lab))
    import torch

    several = lab.cuda and torch.cuda.device_count() > 1
    only = [] if several else ["R1", "R2", "damage", "preemption"] if lab.cuda else ["R1"]
    if lab.left() < 25:
        lab.tell("selftest", "not tried: no time was left")
        return
    child = lab.start("selftest", lambda: command(["selftest", *(["--only", *only] if only else [])]))
    told = 0
    while told is not None:
        over = child.poll() is not None
        lines = [line for line in child.text().splitlines() if line.startswith(("passed ", "FAILED "))]
        for line in lines[told:]:
            word, name, *what = line.split()
            lab.tell(f"selftest {name}", " ".join(what), word == "passed")
        told = None if over else len(lines)
        time.sleep(0.1)
    lab.well("selftest", child)


def _one_rank(lab: Lab) -> None:
    import torch
    import torch.distributed as dist

    with_store = f"file://{lab.scratch / 'store'}"
    dist.init_process_group("nccl" if lab.cuda else "gloo", init_method=with_store, rank=0, world_size=1)
    values = torch.arange(1000.0, device=lab.device)
    dist.all_reduce(values)
    same = values.tolist() == list(map(float, range(1000)))
    lab.tell("all_reduce of one rank", "equal" if same else "DIFFERENT", same)
    dist.destroy_process_group()


def same_bits(lab: Lab) -> None:
    """R1 and R2: each case is trained twice, and once more, killed in the middle and resumed."""
    for name, model, settings in CASES:
        if not lab.cuda and name not in ON_A_CPU:
            continue
        if lab.left() < (15 if lab.cuda else 2):
            lab.tell(name, "not tried: no time was left")
            continue
        _case(lab, name, model, settings)


def _case(lab: Lab, name: str, model: str, settings: list[str]) -> None:
    began = time.monotonic()
    runs = {word: f"{name}-{word}".replace(" ", "-") for word in ("one", "again", "killed")}
    jobs = {}
    for word, run in runs.items():  # side by side: memory and cores suffice
        jobs[word] = lab.start(run, lambda run=run: _trained(lab, model, run, settings))
    record = lab.run(runs["killed"]) / "record.jsonl"
    while jobs["killed"].poll() is None and _lines(record) < KILLED_AFTER and lab.left() > 1:
        time.sleep(0.01)
    jobs["killed"].kill()
    at = _lines(record)
    jobs["killed"] = lab.start(runs["killed"], lambda: _trained(lab, model, runs["killed"], settings))
    if not all([lab.well(f"{name}: {word}", job) for word, job in jobs.items()]):
        return
    for promise, word in (("R1", "again"), ("R2", "killed")):
        fault, digest = _difference(lab.run(runs["one"]), lab.run(runs[word]))
        how = f"equal, sha256 {digest}" if fault is None else fault
        how += f" (killed after step {at})" if promise == "R2" else ""
        lab.tell(f"{promise} {name}", how, fault is None, seconds=time.monotonic() - began)


def _trained(lab: Lab, model: str, run: str, settings: list[str]) -> None:
    import os

    # Each process compiles for itself, as on another day.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(lab.scratch / f"inductor-{os.getpid()}")
    smaller = ["batch=128", "microbatch=64"] if lab.cuda else []
    train(lab.arguments(model, run, STEPS, "save_every=3", *smaller, *settings))


def _lines(record: Path) -> int:
    return record.read_bytes().count(b"\n") if record.exists() else 0


def _difference(one: Path, other: Path) -> tuple[str | None, str]:
    """The first difference, as `reconverge verify` names it, and the beginning of the weights' sha256."""
    from reconverge.run import first_difference, reader

    last = [reader.checkpoint_of(run / "checkpoints", STEPS) for run in (one, other)]
    files = json.loads((last[0] / "MANIFEST.json").read_text())["files"]
    found = first_difference.records(one, other, 1, STEPS), first_difference.checkpoints(*last)
    texts = [re.sub(r"\s+", " ", text) for text in found if text]
    return "; ".join(texts) or None, files["model.safetensors"]["sha256"][:12]


def forward_images(lab: Lab) -> None:
    """One microbatch in one, two and four forward passes, and two microbatches in one pass."""
    from safetensors.torch import load_file

    from reconverge.run import reader

    microbatch, steps = (128 if lab.cuda else 4), 3
    found = {}
    passes = (microbatch, microbatch // 2, microbatch // 4, 2 * microbatch)
    for images in passes if lab.cuda else passes[:2]:
        run = f"passes-{images}"
        sizes = [f"batch={2 * microbatch}", f"microbatch={microbatch}", f"forward_images={images}"]
        arguments = lab.arguments("convnext_t", run, steps, "precision=fp32", *sizes)
        child = lab.start(run, lambda arguments=arguments: train(arguments))
        if not lab.well(f"forward_images={images}", child):
            continue
        path = reader.checkpoint_of(lab.run(run) / "checkpoints", steps) / "model.safetensors"
        found[images] = reader.record(lab.run(run)), load_file(path)
    if microbatch not in found:
        return
    expected, weights = found.pop(microbatch)
    for images, (record, others) in found.items():
        seen = [line["images"] for line in record] == [line["images"] for line in expected]
        first = [abs(record[0][key] / expected[0][key] - 1) for key in ("loss", "grad_norm")]
        furthest = max(float((others[name] - tensor).abs().max()) for name, tensor in weights.items())
        same_images = "the same images" if seen else "OTHER IMAGES"
        how = f"{same_images}; step 1: loss differs by {first[0]:.1e}, gradient norm by {first[1]:.1e}"
        lab.tell(
            f"forward_images={images} of microbatch={microbatch}",
            f"{how}; weights after step {steps} by {furthest:.1e}",
            seen and first[0] < 1e-5 and first[1] < 1e-3,
        )
