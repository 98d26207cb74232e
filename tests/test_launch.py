"""launch/local.sh: torchrun's ranks on this machine, and the exit code of the run, which torchrun loses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FORK, FORKING, ROOT, SMALL, weights

LOCAL = str(ROOT / "launch" / "local.sh")
SEEDS = str(ROOT / "launch" / "seeds.sh")
JOB = [
    "device=cpu",
    "model=timm",
    "model.timm=test_resnet",
    "save_every=0",
    "evaluate_every=never",
    "log_every=1",
    "epochs=40",
    "optim.warmup_epochs=0",
]


@pytest.fixture
def launch(digits, zygote):
    """A script with train.py's arguments for a small job, in a process group of its own, as a terminal starts
    it. Its Pythons are forks.
    """
    processes = []

    def launch(*options, script=LOCAL):
        process = subprocess.Popen(
            [script, *options, *SMALL, *JOB, f"data.root={digits}"],
            env=os.environ | FORKING | {"PYTHON": FORK, "RECONVERGE_ZYGOTE": zygote},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield launch
    for process in processes:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def seen(process, text):
    """Its output up to a line that begins with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            return "".join(lines)
    raise AssertionError("".join(lines))


def ended(process):
    said = process.communicate(timeout=240)[0]
    return process.returncode, said


def status(run):
    return json.loads((Path("runs") / run / "status.json").read_text())


def test_what_is_mistyped_is_said_once_and_at_once(launch):
    for script, options, part in (
        (LOCAL, ["--ranks=2", "epohcs=3"], "change   epochs"),
        (LOCAL, ["--ranks", "two"], "--ranks two"),
        (LOCAL, ["--ranks=2", "-m", "seed=0,1", "--cfg"], "-m with --cfg"),
        (SEEDS, ["0", "one", "--"], "whole numbers"),
        (SEEDS, ["0", "1"], "followed by --"),
    ):
        began = time.monotonic()
        code, said = ended(launch(*options, script=script))
        assert code == 2
        assert said.count(part) == 1, said
        assert "torch" not in said
        assert time.monotonic() - began < 20  # two seconds, on a machine that does nothing else
    assert not Path("runs").exists()


def test_without_a_gpu_the_number_of_ranks_is_asked_for(launch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    code, said = ended(launch())
    assert code == 2
    assert "--ranks N" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_script_saves_the_step_and_it_returns_75(launch, name):
    process = launch("--ranks=2", "run=a", "steps=120")
    seen(process, "step 3/")
    os.kill(process.pid, getattr(signal, name))
    os.kill(process.pid, getattr(signal, name))  # again at once, as schedulers do
    code, said = ended(process)
    assert code == 75, said
    assert (status("a")["reason"], status("a")["exit_code"]) == ("preempted", 75)
    assert f"{name}: step {status('a')['step']} is saved" in said
    if name == "SIGTERM":
        code, said = ended(launch("--ranks=2", "run=a", f"steps={status('a')['step'] + 2}"))
        assert code == 0, said
        assert "resumed after step" in said
        # status.json still says 0, of the start before: what this one ends with is another thing.
        code, said = ended(launch("--ranks=2", "run=a", "seed=1"))
        assert code == 78, said
        assert status("a")["exit_code"] == 0


@pytest.mark.slow
def test_a_terminals_ctrl_c_reaches_the_ranks_once(launch):
    process = launch("--ranks=2", "run=a", "steps=120")
    seen(process, "step 3/")
    os.killpg(process.pid, signal.SIGINT)  # the group in the foreground
    code, said = ended(process)
    assert code == 75, said
    assert "Traceback" not in said[: said.index("is saved in runs/a")]


@pytest.mark.slow
def test_a_killed_rank_is_started_again_with_the_same_bits_or_ends_with_69(launch, train, digits):
    given = ["save_every=5", "keep=9", "reduce=tree"]
    # The run that is not started again is long: it cannot reach its end before the signal does.
    for run, steps, restarts, expected in (("again", 60, 1, 0), ("once", 5000, 0, 69)):
        process = launch(f"--max-restarts={restarts}", "--ranks", "2", f"run={run}", f"steps={steps}", *given)
        seen(process, "step 7/")
        ranks = f"^{FORK} -u {ROOT}/train.py run={run} .*data.root={digits}"
        pids = subprocess.run(["pgrep", "-f", ranks], capture_output=True, text=True).stdout.split()
        rank_0 = json.loads(Path(f"runs/{run}/lock").read_text())["pid"]  # it lives, and notes what became
        (rank_1,) = set(map(int, pids)) - {rank_0}
        os.kill(rank_1, signal.SIGKILL)
        code, said = ended(process)
        assert code == expected, said
    assert status("once")["exit_code"] == 69
    assert train(*JOB, *given, "steps=60", "run=alone") == 0  # in this process: by tree, the same bits
    for kind in ("model", "ema", "optimizer"):
        assert weights("again", kind) == weights("alone", kind)


@pytest.mark.slow
def test_seeds_are_runs_of_several_ranks_each(launch, digits):
    code, said = ended(launch("--ranks=2", "0", "1", "--", "steps=2", script=SEEDS))
    assert code == 0, said
    assert said.count("2 ranks by torchrun") == 1  # the second run introduces itself in short
    assert f"== run 2 of 2: test_resnet-demo-{digits.name}-s1  (seed=1)\n" in said
    assert len(list(Path("runs").glob("*/checkpoints"))) == 2
    table = [line.split()[:2] for line in said[said.rindex("\nrun ") :].splitlines()[2:]]
    assert [row for row in table if row[0].endswith(("s0", "s1"))] == [
        [f"test_resnet-demo-{digits.name}-s{seed}", "0"] for seed in (0, 1)
    ]
    assert weights(f"test_resnet-demo-{digits.name}-s0") != weights(f"test_resnet-demo-{digits.name}-s1")


def test_a_rank_leaves_before_python_is_taken_down():
    """There gloo's threads may abort it. What it has to do at its end is done, and its code stays."""
    program = (
        "import atexit; from reconverge.base import launcher\n"
        "class Late:\n    def __del__(self): print('taken down')\n"
        "late = Late(); atexit.register(print, 'at exit'); launcher.leave(75)"
    )
    for ranks, said in (("1", ["at exit", "taken down"]), ("2", ["at exit"])):
        around = os.environ | {"RANK": "0", "WORLD_SIZE": ranks}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=around)
        assert (done.returncode, done.stdout.split("\n")[:-1]) == (75, said), done.stderr
