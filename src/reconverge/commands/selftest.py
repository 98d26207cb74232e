"""Try the promises on this machine, with this installation: real processes train a small model on the bundled
digits, are killed and resumed, on one rank and on many. On the CPU, or on every GPU that is visible. A few
minutes; a table of what is kept.

Exit codes: 0 everything is kept, 1 something is not.
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
PATIENCE = 300  # seconds for one of them
# Everything that is drawn, a model with BatchNorm, a norm that is clipped. Eight microbatches, so that two
# and four ranks add in other orders than one. The head begins with zeros: whatever the images, the first loss
# is log(classes), if each of them counts once.
JOB = [
    "model=timm", "model.timm=test_resnet", "model.head_init_scale=0", "model.drop_path=0.1", "data=digits",
    "batch=64", "microbatch=8",
    "augment.auto=rand-m9-mstd0.5-inc1", "augment.flip=0.5", "augment.erase=0.5", "optim.clip=0.01",
    "optim.warmup_epochs=0",
    f"steps={END}", "save_every=2", "keep=99", "evaluate_every=never", "log_every=1", "threads=1",
    "world_timeout=2",
]  # fmt: skip


class Broken(Exception):
    """A promise that is not kept, in words."""


class Lab:
    """Trains in a folder of its own, each job once, and gives its run's folder."""

    def __init__(self, folder: Path, gpus: int):
        self._folder, self._job = folder, [*JOB, f"data.cache={folder / 'cache'}"]
        self.device = "cuda" if gpus else "cpu"
        largest = min(8, gpus) if gpus else 1
        self.usual_ranks = 2 ** (largest.bit_length() - 1)
        many = gpus if gpus > 1 else min(4, max(2, cores()))
        self.worlds = [ranks for ranks in (2, 4, 8) if ranks <= many]
        self.many_device = "cuda" if gpus > 1 else "cpu"  # many ranks on one GPU are tried on the CPU

    def usual(self, name: str = "") -> Path:
        """As most runs are: all GPUs of the machine, or one process."""
        return self._trained("ddp", self.usual_ranks, self.device, name)

    def ddp(self, ranks: int) -> Path:
        return self._trained("ddp", ranks, self.many_device)

    def tree(self, ranks: int) -> Path:
        """With workers where there are ranks."""
        return self._trained("tree", ranks, self.many_device)

    def _trained(self, reduce: str, ranks: int, device: str, name: str = "") -> Path:
        run = self._run(name or f"{reduce}-{ranks}-{device}")
        if not (run / "status.json").exists():
            self.start(run.name, reduce, ranks, device)
        return run

    def resumed(self, run: Path) -> Path:
        """To its end, as usual() trains."""
        self.start(run.name, "ddp", self.usual_ranks, self.device)
        return run

    def start(self, name: str, reduce: str, ranks: int, device: str) -> None:
        with self._started(name, reduce, ranks, device) as job:
            code = job.wait(PATIENCE)
        if code:
            raise Broken(f"{name}: train.py ended with exit {code}:\n{self.words(name)}")

    def interrupted(self, name: str, number: signal.Signals) -> tuple[Path, int]:
        """A usual run of which rank 0 got a signal after some steps, and its exit code."""
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
            f"{name}: trained {END} steps before the signal came, three times: is this machine busy?"
        )

    def _started(self, name: str, reduce: str, ranks: int, device: str) -> Any:
        workers = 2 if ranks > 1 else 0
        arguments = [*self._job, f"run={name}", f"reduce={reduce}", f"device={device}", f"workers={workers}"]
        command = processes.command(processes.script(), ranks)
        return processes.started([*command, *arguments], self._folder / f"{name}.txt", self._folder)

    def words(self, name: str, lines: int = 12) -> str:
        """The last of what a job said."""
        return processes.last_words(self._folder / f"{name}.txt", lines)

    def _run(self, name: str) -> Path:
        return self._folder / "runs" / name

    def copy(self, run: Path, name: str) -> Path:
        return Path(shutil.copytree(run, self._run(name)))


# ---- the promises ------------------------------------------------------------------------------------------


def rerun(lab: Lab) -> None:
    same(lab.usual(), lab.usual("again"))


def resume(lab: Lab) -> None:
    run, _ = lab.interrupted("killed", signal.SIGKILL)
    same(lab.usual(), lab.resumed(run))


def preempted(lab: Lab) -> None:
    run, code = lab.interrupted("preempted", signal.SIGTERM)
    status = reader.status(run)
    # torchrun would start again what ends with anything but 0.
    expected = Exit.PREEMPTED if lab.usual_ranks == 1 else Exit.DONE
    if (status["reason"], status["exit_code"], code) != ("preempted", Exit.PREEMPTED, expected):
        raise Broken(
            f"after SIGTERM: exit {code}, and status.json says {status['reason']},"
            f" {status['exit_code']}:\n{lab.words(run.name)}"
        )
    if not checkpoint(run, status["step"]).exists():
        raise Broken(f"after SIGTERM, step {status['step']} is not saved")
    same(lab.usual(), lab.resumed(run))


def damaged(lab: Lab) -> None:
    run = lab.copy(lab.usual(), "damaged")
    (run / "status.json").unlink()  # as if it had been killed after its last step
    path = checkpoint(run, END) / "model.safetensors"
    bytes_ = bytearray(path.read_bytes())
    bytes_[-1] ^= 1
    path.write_bytes(bytes_)
    lab.resumed(run)
    if f"skipped a damaged checkpoint: {checkpoint(run, END).name}" not in lab.words(run.name, 100):
        raise Broken(f"a damaged checkpoint was not named:\n{lab.words(run.name)}")
    same(lab.usual(), run)


def data_elastic(lab: Lab) -> None:
    """The same images in each step; the same mixing, if the gradients that begin from the same weights are
    the same.
    """
    one, *others = [lab.tree(ranks) for ranks in (1, *lab.worlds)]
    for other in others:
        agree(one, other, "images", END)
        agree(one, other, "grad_norm", 1, within=1e-4)


def each_counts_once(lab: Lab) -> None:
    """Each image once an epoch, by the order itself, which is tied to what was trained by the hash of the
    first step's images.
    """
    import numpy as np
    from xxhash import xxh3_64_hexdigest

    from reconverge import build
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
                f"an epoch of {steps} steps of {cfg.batch} images takes {different} different ones on {ranks}"
                " ranks"
            )
    images = build.augmented(cfg, data.training)
    loaded = [images[microbatch] for microbatch in order.steps(0, 1)]
    digests = [batch.digest for batch, _ in loaded]  # type: ignore[misc]
    expected, found = xxh3_64_hexdigest(np.array(digests).tobytes()), reader.record(run)[0]["images"]
    if found != expected:
        raise Broken(f"the images of step 1 have the hash {found}, and those of its sample ids {expected}")
    for trained in (run, lab.tree(lab.worlds[0])):
        loss, log = reader.record(trained)[0]["loss"], math.log(len(data.training.classes))
        if abs(loss - log) > 1e-5:
            raise Broken(
                f"{trained.name}: the first loss is {loss}, and of {cfg.batch} images it is log(classes) ="
                f" {log}"
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
                f"{ranks} ranks have another {different[0]} than one ({len(different)} of {len(names)}"
                " tensors differ)"
            )


def gradients(lab: Lab) -> None:
    for ranks in lab.worlds:
        agree(lab.ddp(1), lab.ddp(ranks), "grad_norm", 1, within=1e-4)
        # From weights that are no longer equal to the last bit.
        agree(lab.ddp(1), lab.ddp(ranks), "grad_norm", 2, within=1e-2)


CHECKS: dict[str, tuple[str, Callable[[Lab], None]]] = {
    "R1": ("the same command twice: the same bits", rerun),
    "R2": ("killed (kill -9) and resumed: the same bits", resume),
    "R3": ("other numbers of ranks and workers: the same images and mixing", data_elastic),
    "R4": ("other numbers of ranks with reduce=tree: the same bits", weight_elastic),
    "samples": ("each image once an epoch, and each counts in the loss", each_counts_once),
    "gradients": ("other numbers of ranks with reduce=ddp: the same gradient, clipped", gradients),
    "batchnorm": ("running statistics follow microbatch 0, whatever the ranks", batch_norm),
    "preemption": ("SIGTERM: the step is saved, exit 75; resumed: the same bits", preempted),
    "damage": ("a damaged checkpoint is named and skipped: the same bits", damaged),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CHECKS,
        metavar="NAME",
        help=f"some of {', '.join(CHECKS)} (default: all)",
    )


def main(arguments: argparse.Namespace) -> int:
    import torch

    folder = Path(tempfile.mkdtemp(prefix="reconverge-selftest-"))
    lab = Lab(folder, torch.cuda.device_count())
    many = f"{', '.join(map(str, lab.worlds))} ranks on {lab.many_device}"
    say(
        f"training in {folder}: {lab.usual_ranks} rank{'s' * (lab.usual_ranks > 1)} on {lab.device}; against"
        f" one rank: {many}"
    )
    broken = []
    try:
        for name in arguments.only or CHECKS:
            if fault := _fault(CHECKS[name][1], lab):
                broken.append(name)
                say("  " + fault.replace("\n", "\n  "))
            say(f"{'BROKEN' if fault else 'kept':<8}{name:<12}{CHECKS[name][0]}")
    finally:
        if not broken:
            shutil.rmtree(folder)
    if broken:
        say(f"not kept on this machine: {', '.join(broken)}; the runs stay in {folder}")
    return Exit.BUG if broken else Exit.DONE


def _fault(check: Callable[[Lab], None], lab: Lab) -> str:
    """What is wrong, in words; none is lost because the run of another check did not end."""
    try:
        check(lab)
    except Broken as broken:
        return str(broken)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- two runs, side by side --------------------------------------------------------------------------------


def same(one: Path, other: Path) -> None:
    """Every step and the last checkpoint, bit for bit."""
    from reconverge.run import first_difference

    found = [
        first_difference.records(one, other, 1, END),
        first_difference.checkpoints(checkpoint(one, END), checkpoint(other, END)),
    ]
    if any(found):
        raise Broken("\n".join([f"{one.name} and {other.name}", *(line for line in found if line)]))


def agree(one: Path, other: Path, key: str, last: int, within: float = 0.0) -> None:
    """A value of each step up to `last`, relatively `within`."""
    for mine, theirs in zip(reader.record(one)[:last], reader.record(other)[:last], strict=True):
        a, b = mine[key], theirs[key]
        if a != b and not (within and math.isclose(a, b, rel_tol=within)):
            raise Broken(f"step {mine['step']}: {key} is {a} in {one.name} and {b} in {other.name}")


def checkpoint(run: Path, step: int) -> Path:
    return reader.checkpoint_of(run / "checkpoints", step)
