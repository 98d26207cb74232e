"""Parts 7 and 8: does the data loader keep up, and is memory as `reconverge plan` says?"""

import json
import re
from pathlib import Path
from typing import Any

from gpu_parts.lab import Lab, command, forget, train

FAST = ["precision=bf16", "channels_last=true", "deterministic=false"]
WAYS = [[], ["precision=bf16"], ["precision=bf16", "checkpointing=true"], ["checkpointing=true"]]  # of memory


def feed(lab: Lab) -> None:
    """`reconverge bench data` on JPEGs, with and without the native decoder; data-wait of a training."""
    import pictures

    from reconverge.base.launcher import cores

    root = lab.images or lab.scratch / "pictures"
    if lab.images is None:  # some seconds; hard links make many of few
        pictures.write(root, *((64, 8, 4, 64) if lab.cuda else (4, 4, 2, 16)))
        files = list(root.rglob("train/**/*_0.jpg"))
        size = sum(path.stat().st_size for path in files) / len(files) / 1000
        lab.tell("JPEGs made", f"{len(files)} of {size:.0f} kB on average, each many times")
    few = [] if lab.cuda else ["augment.size=32", "evaluate.size=32", "microbatch=4", "batch=8"]
    data = [*lab.model("convnext_t"), "recipe=in1k", "data=folder", f"data.root={root}"]
    data += [f"device={lab.device}", f"data.cache={lab.cache}", *few]
    known = _native()
    cases = [(workers, native) for native in ("auto", "off") for workers in (8, 16, 4)]
    for workers, native in cases if lab.cuda else [(1, "auto")]:
        kind = known if native == "auto" else "Pillow"
        name = f"{workers} workers, {kind}"
        if lab.left() < (20 if lab.cuda else 3):
            lab.tell(name, "not tried: no time was left")
            continue
        seconds = "2" if lab.cuda else "0.3"
        job = ["bench", "data", "--seconds", seconds, *data, f"workers={workers}", f"data.native={native}"]
        child = lab.start(name, lambda job=job: command(job))
        if not lab.well(name, child):
            continue
        speed = re.search(r"workers?: (\d+) images/s", child.text())
        assert speed, child.words()
        each = int(speed[1]) / min(workers, cores())
        enough = each > 250 if lab.cuda and kind != "Pillow" else None
        lab.tell(name, f"{speed[1]} images/s, {each:.0f} a core", enough, images_per_second=int(speed[1]))
    workers, steps = (15, 30) if lab.cuda else (1, 4)
    more = [*FAST, "batch=256", "microbatch=128"] if lab.cuda else []
    arguments = [*data, *more, "run=fed", f"workers={workers}", f"steps={steps}", f"log_every={steps // 2}",
        "evaluate_every=never", "save_every=0", "threads=1"]  # fmt: skip
    if lab.ask("training fed by JPEGs", lambda: [train(arguments)]) is not None:
        last = json.loads((lab.run("fed") / "metrics.jsonl").read_text().splitlines()[-1])
        wait, speed_of_run = last["data_wait"], last["images_per_second"]
        said = f"data-wait {wait:.1%} at {speed_of_run:.0f} images/s with {workers} workers"
        lab.tell("training fed by JPEGs", said, wait < 0.02 if lab.cuda else None, data_wait=wait)
    if lab.images is None:
        forget(root)


def _native() -> str:
    from reconverge.data import native

    return "native" if native.choose("auto").startswith("native") else "Pillow"


def memory(lab: Lab) -> None:
    """Peak of a training step without EMA, as `reconverge bench model` measures it, beside the plan's."""
    names = ("convnext_t", "convnext_s", "convnext_b", "convnext_l") if lab.cuda else ("small",)
    for model in names:
        for settings in WAYS if lab.cuda else WAYS[1:2]:
            name = " ".join([model, *settings])
            if lab.left() < (4 if lab.cuda else 2):
                lab.tell(name, "not tried: no time was left")
                continue
            found = lab.ask(name, lambda model=model, settings=settings: _memory(lab, model, settings))
            if found is None:
                continue
            ratio = found["peak_gb"] / found["plan_gb"]
            said = f"{found['peak_gb']:.2f} GB at microbatch {found['batch']}, plan {found['plan_gb']:.2f}"
            near = abs(ratio - 1) < 0.15 if lab.cuda else None  # on a CPU the peak is the whole process
            lab.tell(name, f"{said}: {ratio:.2f}", near, **found)


def _memory(lab: Lab, model: str, settings: list[str]) -> dict[str, Any]:
    from reconverge.config import compose
    from reconverge.distributed.world import DTYPES
    from reconverge.models import cost, create

    size = (
        []
        if lab.cuda
        else [
            "augment.size=32",
            "evaluate.size=32",
            "microbatch=4",
            "batch=8",
            "threads=1",
            "model.drop_path=0",
        ]
    )
    job = [*lab.model(model), "recipe=in1k", f"device={lab.device}", *settings, *size]
    cfg = compose.of_training(job)
    net = create.on_meta(cfg.model, 1000)
    if cfg.checkpointing:
        net.set_grad_checkpointing()
    planned = cost.memory(net, cfg.microbatch, cfg.augment.size, 1000, DTYPES[cfg.precision], False, 1)
    seconds = "0.5" if lab.cuda else "0.05"
    command(["bench", "model", *job, "--batches", str(cfg.microbatch), "--seconds", seconds, "--phase",
        "training", "--json", "memory.json"])  # fmt: skip
    measured = json.loads(Path("memory.json").read_text())["measured"]
    if not measured:
        raise RuntimeError(f"a batch of {cfg.microbatch} does not fit into memory")
    return {"peak_gb": measured[0]["peak_gb"], "plan_gb": planned.total / 1e9, "batch": cfg.microbatch}
