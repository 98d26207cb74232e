"""Test reproducibility (R1 to R4) on this machine, with this installation. Training processes train a small
model on the bundled digits, are killed and resumed, with one rank and with several, on the CPU or on all
visible GPUs. It takes a few minutes and prints one line for each check.

Exit codes: 0 all checks passed, 1 a check failed.
"""

import argparse
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reconverge.base.errors import Exit
from reconverge.base.launcher import cores
from reconverge.base.terminal import say
from reconverge.commands import processes
from reconverge.run import reader

END = 12  # steps of each run
PATIENCE = 300  # seconds for one run
# The job uses every kind of random number, a model with BatchNorm, and a gradient norm that is clipped. With
# eight microbatches, two and four ranks add gradients in another order than one rank. The head starts with
# zeros, so the first loss is log(classes) for any images, if each image counts once.
JOB = [
    "model=timm", "model.timm=test_resnet", "model.head_init_scale=0", "model.drop_path=0.1", "data=digits",
    "batch=64", "microbatch=8",
    "augment.auto=rand-m9-mstd0.5-inc1", "augment.flip=0.5", "augment.erase=0.5", "optim.clip=0.01",
    "optim.warmup_epochs=0",
    f"steps={END}", "save_every=2", "keep=99", "evaluate_every=never", "log_every=1", "threads=1",
    "world_timeout=2",
]  # fmt: skip


class Broken(Exception):
    """A check that failed, with the reason as text."""


class Lab:
    """Trains jobs in its own folder, each job once, and returns their run folders."""

    def __init__(self, folder: Path, gpus: int):
        self._folder, self._job = folder, [*JOB, f"data.cache={folder / 'cache'}"]
        self.device = "cuda" if gpus else "cpu"
        largest = min(8, gpus) if gpus else 1
        self.usual_ranks = 2 ** (largest.bit_length() - 1)
        many = gpus if gpus > 1 else min(4, max(2, cores()))
        self.worlds = [ranks for ranks in (2, 4, 8) if ranks <= many]
        self.many_device = "cuda" if gpus > 1 else "cpu"  # with a single GPU, many ranks run on the CPU

    def usual(self, name: str = "") -> Path:
        """A run as most users start it: on all GPUs of the machine, or in one process on the CPU."""
        return self._trained("ddp", self.usual_ranks, self.device, name)

    def ddp(self, ranks: int) -> Path:
        return self._trained("ddp", ranks, self.many_device)

    def tree(self, ranks: int) -> Path:
        """A run with reduce=tree; runs with more than one rank also use data workers."""
        return self._trained("tree", ranks, self.many_device)

    def _trained(self, reduce: str, ranks: int, device: str, name: str = "") -> Path:
        run = self._run(name or f"{reduce}-{ranks}-{device}")
        if not (run / "status.json").exists():
            self.start(run.name, reduce, ranks, device)
        return run

    def resumed(self, run: Path) -> Path:
        """Continue a run to its end, on the ranks that usual() uses."""
        self.start(run.name, "ddp", self.usual_ranks, self.device)
        return run

    def start(self, name: str, reduce: str, ranks: int, device: str) -> None:
        with self._started(name, reduce, ranks, device) as job:
            code = job.wait(PATIENCE)
        if code:
            raise Broken(f"{name}: train.py ended with exit {code}:\n{self.words(name)}")

    def interrupted(self, name: str, number: signal.Signals) -> tuple[Path, int]:
        """A run as of usual() whose rank 0 got the signal after some steps, and its exit code."""
        run = self._run(name)
        for _attempt in range(3):
            shutil.rmtree(run, ignore_errors=True)
            with self._started(name, "ddp", self.usual_ranks, self.device) as job:
                while len(reader.record(run)) < 3 and job.poll() is None:
                    time.sleep(0.01)
                if job.poll() is None:
                    os.kill(reader.environment(run)["starts"][-1]["pid"], number)
                code = job.wait(PATIENCE)
            if len(reader.record(run)) < END:
                return run, code
        raise Broken(
            f"{name}: three times, all {END} steps were done before the signal arrived; is this machine busy?"
        )

    def _started(self, name: str, reduce: str, ranks: int, device: str) -> Any:
        workers = 2 if ranks > 1 else 0
        arguments = [*self._job, f"run={name}", f"reduce={reduce}", f"device={device}", f"workers={workers}"]
        command = processes.command(processes.script(), ranks)
        return processes.started([*command, *arguments], self._folder / f"{name}.txt", self._folder)

    def words(self, name: str, lines: int = 12) -> str:
        """The last lines that a job printed."""
        return processes.last_words(self._folder / f"{name}.txt", lines)

    def _run(self, name: str) -> Path:
        return self._folder / "runs" / name

    def copy(self, run: Path, name: str) -> Path:
        return Path(shutil.copytree(run, self._run(name)))


# ---- the checks --------------------------------------------------------------------------------------------


def rerun(lab: Lab) -> None:
    same(lab.usual(), lab.usual("again"))


def resume(lab: Lab) -> None:
    run, _ = lab.interrupted("killed", signal.SIGKILL)
    same(lab.usual(), lab.resumed(run))


def preempted(lab: Lab) -> None:
    run, code = lab.interrupted("preempted", signal.SIGTERM)
    status = reader.status(run)
    # Under torchrun the exit code is 0, because torchrun would restart workers with any other.
    expected = Exit.PREEMPTED if lab.usual_ranks == 1 else Exit.DONE
    if (status["reason"], status["exit_code"], code) != ("preempted", Exit.PREEMPTED, expected):
        raise Broken(
            f"after SIGTERM: exit code {code}, and status.json has reason {status['reason']} and exit code"
            f" {status['exit_code']}:\n{lab.words(run.name)}"
        )
    if not checkpoint(run, status["step"]).exists():
        raise Broken(f"after SIGTERM, there is no checkpoint of step {status['step']}")
    same(lab.usual(), lab.resumed(run))


def damaged(lab: Lab) -> None:
    run = lab.copy(lab.usual(), "damaged")
    (run / "status.json").unlink()  # as if the run had been killed after its last step
    path = checkpoint(run, END) / "model.safetensors"
    bytes_ = bytearray(path.read_bytes())
    bytes_[-1] ^= 1
    path.write_bytes(bytes_)
    lab.resumed(run)
    if f"skipped a damaged checkpoint: {checkpoint(run, END).name}" not in lab.words(run.name, 100):
        raise Broken(f"the damaged checkpoint was not reported:\n{lab.words(run.name)}")
    same(lab.usual(), run)


def data_elastic(lab: Lab) -> None:
    """Each step has the same images. The first gradient starts from equal weights, so if its norm is equal,
    the mixing is the same too.
    """
    one, *others = [lab.tree(ranks) for ranks in (1, *lab.worlds)]
    for other in others:
        agree(one, other, "images", END)
        agree(one, other, "grad_norm", 1, within=1e-4)


def each_counts_once(lab: Lab) -> None:
    """The order takes each image once in an epoch. The hash of the first step's images shows that training
    used this order.
    """
    import numpy as np
    from xxhash import xxh3_64_hexdigest

    from reconverge import tasks
    from reconverge.training import datasets

    run = lab.usual()
    cfg = reader.opened(run).cfg
    data = datasets.opened(cfg)
    order, steps = data.order, data.clock.steps_per_epoch
    for ranks in (1, *lab.worlds):
        taken = [part.ids for rank in range(ranks) for part in order.steps(0, steps, rank, ranks)]
        different = len(np.unique(np.concatenate(taken)))
        if not different == sum(map(len, taken)) == steps * cfg.batch:
            raise Broken(
                f"with {ranks} ranks, an epoch of {steps} steps of {cfg.batch} images has only {different}"
                " different images"
            )
    images = tasks.of(cfg).augmented(cfg, data.training)
    loaded = [images[microbatch] for microbatch in order.steps(0, 1)]
    digests = [batch.digest for batch, _ in loaded]  # type: ignore[misc]
    expected, found = xxh3_64_hexdigest(np.array(digests).tobytes()), reader.record(run)[0]["images"]
    if found != expected:
        raise Broken(f"step 1 recorded the images' hash {found}; its sample ids give {expected}")
    for trained in (run, lab.tree(lab.worlds[0])):
        loss, log = reader.record(trained)[0]["loss"], math.log(len(data.training.classes))
        if abs(loss - log) > 1e-5:
            raise Broken(
                f"{trained.name}: the first loss is {loss}; if each of the {cfg.batch} images counts once, it"
                f" is log(classes) = {log}"
            )


def weight_elastic(lab: Lab) -> None:
    for ranks in lab.worlds:
        same(lab.tree(1), lab.tree(ranks))


def batch_norm(lab: Lab) -> None:
    import torch
    from safetensors.torch import load_file

    one, *others = [
        load_file(checkpoint(lab.tree(ranks), END) / "model.safetensors") for ranks in (1, *lab.worlds)
    ]
    names = [name for name in one if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    counts = {int(one[name]) for name in names if name.endswith("num_batches_tracked")}
    if counts != {END}:
        raise Broken(f"BatchNorm's running statistics were updated {counts} times in {END} steps")
    for ranks, other in zip(lab.worlds, others, strict=True):
        different = [name for name in names if not torch.equal(one[name], other[name])]
        if different:
            raise Broken(
                f"{different[0]} differs between {ranks} ranks and one rank ({len(different)} of {len(names)}"
                " BatchNorm tensors differ)"
            )


def gradients(lab: Lab) -> None:
    for ranks in lab.worlds:
        agree(lab.ddp(1), lab.ddp(ranks), "grad_norm", 1, within=1e-4)
        # After step 1 the weights differ by rounding.
        agree(lab.ddp(1), lab.ddp(ranks), "grad_norm", 2, within=1e-2)


CHECKS: dict[str, tuple[str, Callable[[Lab], None]]] = {
    "R1": ("the same command twice gives the same bits", rerun),
    "R2": ("a run that was killed (kill -9) and resumed gives the same bits", resume),
    "R3": ("different numbers of ranks and workers give the same images and mixing", data_elastic),
    "R4": ("different numbers of ranks with reduce=tree give the same bits", weight_elastic),
    "samples": ("an epoch uses each image once, and each image counts in the loss", each_counts_once),
    "gradients": ("different numbers of ranks with reduce=ddp give the same gradient norm", gradients),
    "batchnorm": ("BatchNorm statistics are the same for any number of ranks", batch_norm),
    "preemption": ("after SIGTERM the step is saved, exit code 75; resumed: the same bits", preempted),
    "damage": ("a damaged checkpoint is reported and skipped: the same bits", damaged),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CHECKS,
        metavar="NAME",
        help=f"run only these checks: {', '.join(CHECKS)} (default: all)",
    )


def main(arguments: argparse.Namespace) -> int:
    import torch

    folder = Path(tempfile.mkdtemp(prefix="reconverge-selftest-"))
    lab = Lab(folder, torch.cuda.device_count())
    many = f"{', '.join(map(str, lab.worlds))} ranks on {lab.many_device}"
    say(
        f"training in {folder} with {lab.usual_ranks} rank{'s' * (lab.usual_ranks > 1)} on {lab.device};"
        f" one rank is compared with {many}"
    )
    broken = []
    try:
        for name in arguments.only or CHECKS:
            if fault := _fault(CHECKS[name][1], lab):
                broken.append(name)
                say("  " + fault.replace("\n", "\n  "))
            say(f"{'FAILED' if fault else 'passed':<8}{name:<12}{CHECKS[name][0]}")
    finally:
        if not broken:
            shutil.rmtree(folder)
    if broken:
        say(f"failed on this machine: {', '.join(broken)}; the runs are kept in {folder}")
    return Exit.BUG if broken else Exit.DONE


def _fault(check: Callable[[Lab], None], lab: Lab) -> str:
    """Why the check failed, as text; "" if it passed. An error in one check does not stop the others."""
    try:
        check(lab)
    except Broken as broken:
        return str(broken)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- two runs, side by side --------------------------------------------------------------------------------


def same(one: Path, other: Path) -> None:
    """Compare every step's record and the last checkpoint bit for bit. Errors: Broken."""
    from reconverge.run import first_difference

    found = [
        first_difference.records(one, other, 1, END),
        first_difference.checkpoints(checkpoint(one, END), checkpoint(other, END)),
    ]
    if any(found):
        raise Broken("\n".join([f"{one.name} and {other.name} differ:", *(line for line in found if line)]))


def agree(one: Path, other: Path, key: str, last: int, within: float = 0.0) -> None:
    """Compare one value of each step up to `last`, with the relative tolerance `within`. Errors: Broken."""
    for mine, theirs in zip(reader.record(one)[:last], reader.record(other)[:last], strict=True):
        a, b = mine[key], theirs[key]
        if a != b and not (within and math.isclose(a, b, rel_tol=within)):
            raise Broken(f"step {mine['step']}: {key} is {a} in {one.name} and {b} in {other.name}")


def checkpoint(run: Path, step: int) -> Path:
    return reader.checkpoint_of(run / "checkpoints", step)
