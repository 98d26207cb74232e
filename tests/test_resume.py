"""R2: killed at any instant, restored from any checkpoint, with other workers: the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, weights
from zygote import Forked

KINDS = ("model", "ema", "optimizer")
STEPS = 8


def bits(run):
    return [weights(run, kind) for kind in KINDS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits, zygote):
    """An uninterrupted run of 8 steps with a checkpoint at each, as a process of its own; its folder."""
    from conftest import SMALL

    folder = tmp_path_factory.mktemp("whole")
    command = [
        str(ROOT / "train.py"),
        *SMALL,
        f"data.root={digits}",
        f"data.cache={folder}/cache",
        "run=whole",
        *EVERY,
    ]
    process = Forked(
        zygote,
        command,
        folder=folder,
        environment=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return folder / "runs" / "whole"


# Every kind of random number; and timm's smallest ConvNeXt, with checkpoints of 4 MB instead of 54.
CHANCE = ["mix.mixup=0.8", "model.drop_path=0.2", "augment.erase=0.25"]
TINY = ["model=timm", "model.timm=test_convnext"]
EVERY = [f"steps={STEPS}", "save_every=1", "evaluate_every=3", "log_every=1", "keep=100", *CHANCE, *TINY]
WEIGHTS = [*EVERY, "evaluate_every=never"]  # where only these are compared


def copy(whole, name, last):
    """The run after `last` steps: without later checkpoints and status.json, but with later metrics."""
    Path("runs").mkdir(exist_ok=True)
    folder = Path("runs") / name
    shutil.copytree(
        whole,
        folder,
        ignore=lambda path, names: [n for n in names if n.startswith("step-") and int(n[5:]) > last],
    )
    (folder / "status.json").unlink()
    return folder


def expected(whole):
    files = json.loads((whole / "checkpoints" / f"step-{STEPS:08d}" / "MANIFEST.json").read_text())["files"]
    return [files[f"{kind}.safetensors"]["sha256"] for kind in KINDS]


def records(folder, *without):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("images_per_second", "data_wait", "save_wait")
        }
        for line in lines
    ]


def test_restoring_at_every_step_gives_the_same_tail(whole, train):
    for step in range(1, STEPS):
        folder = copy(whole, f"from{step}", step)
        assert train(*EVERY, f"run=from{step}", f"workers={step % 2}") == 0
        assert bits(f"from{step}") == expected(whole), f"restored after step {step}"
        assert records(folder) == records(whole)
        shutil.rmtree(folder)


def test_another_seed_gives_other_bits(whole, train):
    assert train(*WEIGHTS, "run=other", "seed=1") == 0
    assert all(mine != theirs for mine, theirs in zip(bits("other"), expected(whole), strict=True))


def test_global_generators_are_poisoned_and_untouched(whole, train):
    """Random numbers outside a keyed scope would change the bits or the generators' states."""
    random.seed(123), np.random.seed(123), torch.manual_seed(123)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert train(*EVERY, "run=a") == 0
    assert bits("a") == expected(whole)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_newest_checkpoint_is_named_and_skipped(whole, train, capsys, harm):
    folder = copy(whole, "a", 5)
    file = (
        folder
        / "checkpoints"
        / "step-00000005"
        / ("model.safetensors" if harm == "flip" else "optimizer.safetensors")
    )
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 4
    file.write_bytes(content if harm == "flip" else content[:-7])
    assert train(*WEIGHTS, "run=a") == 0
    said = capsys.readouterr().out
    what = "the sha256 of model.safetensors is not" if harm == "flip" else "optimizer.safetensors has"
    assert f"skipped a damaged checkpoint: step-00000005: {what}" in said
    assert "resumed after step 4" in said
    assert bits("a") == expected(whole)


def test_all_checkpoints_bad_stops(whole, train, capsys):
    folder = copy(whole, "a", 2)
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    assert train(*EVERY, "run=a") == 65
    said = capsys.readouterr().err
    assert "step-00000002: state.json" in said
    assert "step-00000001: state.json" in said


def kill_until_done(start, arguments, kills, seed):
    """Start, kill -9 at a random moment of training or saving, start again with other workers; let the last
    one finish.
    """
    chosen = random.Random(seed)
    for kill in range(kills):
        process = start(*arguments, f"workers={chosen.randrange(3)}")
        for line in process.stdout:  # past the imports, at the first step of this start
            if line.startswith("step ") or process.poll() is not None:
                break
        time.sleep(chosen.uniform(0, 0.9))
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, f"kill {kill} came too late"
    process = start(*arguments, "workers=1")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "took over from process" in said


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(1, 30), (6, 42)])
def test_killed_at_random_moments_ends_with_the_same_bits(start, train, kills, steps):
    arguments = [
        *CHANCE,
        f"steps={steps}",
        "epochs=10",
        "save_every=2",
        "keep=2",
        "evaluate_every=20",
        "log_every=1",
    ]
    assert train(*arguments, "run=uninterrupted") == 0
    kill_until_done(start, [*arguments, "run=killed"], kills, seed=kills)
    assert bits("killed") == bits("uninterrupted")
    lines = records(Path("runs/killed"))
    assert lines == records(Path("runs/uninterrupted"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_saves_at_this_step_and_exits_75(start, train, name):
    arguments = [*EVERY, "epochs=100", "save_every=0", "evaluate_every=never"]
    process = start(*arguments, "run=a", "steps=600", "workers=1")
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert children
    for pid in [process.pid, *map(int, children)]:  # as SLURM and terminals do: every process of the job
        os.kill(pid, getattr(signal, name))
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 75, said
    status = json.loads(Path("runs/a/status.json").read_text())
    assert f"{name}: step {status['step']} is saved in runs/a" in said
    assert (status["reason"], status["exit_code"]) == ("preempted", 75)
    assert 2 <= status["step"] < 600
    end = f"steps={status['step'] + 2}"
    assert train(*arguments, "run=a", end) == 0
    assert train(*arguments, "run=uninterrupted", end) == 0
    assert bits("a") == bits("uninterrupted")


def test_a_second_process_is_refused_with_the_holder_named(whole, start, train, capsys):
    process = start(*EVERY, "steps=400", "epochs=100", "save_every=0", "evaluate_every=never", "run=a")
    for line in process.stdout:
        if line.startswith("step "):
            break
    assert train(*EVERY, "run=a") == 73
    assert f"in use by process {process.pid}" in capsys.readouterr().err
    assert process.poll() is None


CHANGES = [
    (["optim.lr=1"], "runs/a was started with optim.lr=0.003; now optim.lr=1.0"),
    (["batch=32"], "runs/a was started with batch=16; now batch=32"),
    (["precision=bf16"], "precision"),
    (["data.mean=[0,0,0]"], "data.mean"),
    (
        ["seed=1", "optim.eps=1e-7"],
        "runs/a was started with seed=0, optim.eps=1e-08; now seed=1, optim.eps=1e-07",
    ),
    (["threads=2"], "runs/a was started with threads=1; now threads=2"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_changed_setting_is_refused_by_name(whole, train, capsys, change, said):
    copy(whole, "a", 6)
    assert train(*WEIGHTS, "run=a", *change) == 78
    err = capsys.readouterr().err
    assert said in err
    names = ",".join(argument.partition("=")[0] for argument in change)
    assert "run=NAME for a new run, or remove runs/a to start over; to resume it: " in err
    assert f"resume_allow=[{names}]" in err
    # Nothing was changed: the same command as before continues.
    assert train(*WEIGHTS, "run=a") == 0
    assert bits("a") == expected(whole)


def test_a_change_may_be_allowed_by_name_and_is_recorded(whole, train, capsys):
    folder = copy(whole, "a", 2)
    assert train(*WEIGHTS, "run=a", "optim.lr=1e-3", "resume_allow=[optim.lr]") == 0
    assert "promise R2 is lost" in capsys.readouterr().out
    lost = json.loads((folder / "environment.json").read_text())["lost"]
    assert [(entry["promise"], entry["because"], entry["to"]) for entry in lost] == [
        ("R2", "optim.lr", 0.001)
    ]
    assert bits("a") != expected(whole)


@pytest.mark.parametrize(
    ("fact", "value", "said"),
    [
        ("code", "another hash", "other code (commit 1234567); now the code here"),
        ("versions", {"torch": "2.10.0"}, f"torch 2.10.0; now torch {torch.__version__.partition('+')[0]}"),
        ("hardware", "another CPU", "hardware another CPU; now hardware "),
        ("data", {"train": "other files"}, "other training images; now those of data=folder data.root=/"),
    ],
)
def test_other_code_versions_hardware_or_data_are_refused(whole, train, capsys, fact, value, said):
    """In a sentence: nobody reads hashes."""
    folder = copy(whole, "a", 6)
    environment = json.loads((folder / "environment.json").read_text())
    recorded = environment["facts"][fact]
    environment["facts"][fact] = recorded | value if isinstance(value, dict) else value
    environment["git"] = {"commit": "1234567890", "diff": ""}
    (folder / "environment.json").write_text(json.dumps(environment))
    assert train(*WEIGHTS, "run=a") == 78
    err = capsys.readouterr().err
    assert f"runs/a was started with {said}" in err
    assert "{" not in err
    assert f"to resume it: the same again, or resume_allow=[{fact}]" in err
    assert not (folder / "status.json").exists()  # as it was
    assert train(*WEIGHTS, "run=a", f"resume_allow=[{fact}]") == 0
    assert bits("a") == expected(whole)


def test_free_settings_may_change(whole, train, tmp_path, digits):
    folder = copy(whole, "a", 3)
    shutil.copytree(digits, tmp_path / "elsewhere")
    free = [
        "workers=1",
        "save_every=0",
        "evaluate_every=0",
        "tracker=tensorboard",
        f"data.root={tmp_path}/elsewhere",
        "data.cache=there",
        "copy_ahead=false",
    ]
    assert train(*EVERY, "run=a", *free) == 0
    assert bits("a") == expected(whole)
    assert (folder / "tensorboard").is_dir()


def test_threads_are_those_of_the_first_start(whole, train):
    """For any environment and number of cores at a restart."""
    folder = copy(whole, "a", 3)
    torch.set_num_threads(2)
    assert (
        train(
            *[argument for argument in WEIGHTS if not argument.startswith("threads")], "threads=null", "run=a"
        )
        == 0
    )
    assert bits("a") == expected(whole)
    assert json.loads((folder / "environment.json").read_text())["facts"]["threads"] == 1


def test_a_signal_before_an_evaluation_does_not_lose_it(whole, train):
    """As if a signal had come after step 6, when an evaluation was due: the checkpoint exists, but not its
    evaluation.
    """
    folder = copy(whole, "a", 6)
    lines = [
        line
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if not ("raw_top1" in line and '"step": 6' in line)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert train(*EVERY, "run=a") == 0
    assert records(folder) == records(whole)


def test_a_signal_in_the_middle_of_an_evaluation_saves_the_step_and_evaluates_later(whole, train):
    from reconverge.base import signals

    def hook(module, inputs):
        if (
            type(module).__name__ == "ConvNeXt"
            and not inputs[0].is_meta
            and not module.training
            and not signals._came
        ):
            signals._came[signal.SIGTERM] = 0.0

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        assert train(*EVERY, "run=a", "evaluate.batch=10") == 75
    finally:
        handle.remove()
    assert json.loads(Path("runs/a/status.json").read_text())["step"] == 3
    assert not [line for line in records(Path("runs/a")) if "raw_top1" in line]
    assert train(*EVERY, "run=a", "evaluate.batch=10") == 0
    assert bits("a") == expected(whole)
    assert [line["step"] for line in records(Path("runs/a")) if "raw_top1" in line] == [3, 6, 8]


@pytest.mark.parametrize(
    "how",
    [
        "channels_last=true",
        "precision=bf16",
        "precision=fp16",
        "fused=false",
        "checkpointing=true",
        "ema.decay=null",
        "optim.clip=0.1",
    ],
)
def test_resume_is_exact_however_the_machine_computes(train, how):
    arguments = [*TINY, "steps=5", "save_every=3", "evaluate_every=never", "log_every=1", how]
    assert train(*arguments, "run=whole") == 0
    assert train(*arguments, "steps=3", "run=halves") == 0
    assert train(*arguments, "run=halves", "workers=1") == 0
    for kind in ("model", "optimizer"):
        assert weights("halves", kind) == weights("whole", kind)


def test_the_best_is_kept_and_remembered_through_a_resume(train):
    """The checkpoints of the best raw and of the best EMA weights are saved even when save_every is not due,
    and are kept when newer ones are saved.
    """
    arguments = [*TINY, "save_every=0", "evaluate_every=1", "keep=1", "optim.lr=1e-2", "run=a"]
    assert train(*arguments, "steps=4") == 0
    assert train(*arguments, "steps=8") == 0
    lines = [line for line in records(Path("runs/a")) if "raw_top1" in line]
    summary, steps = json.loads(Path("runs/a/status.json").read_text())["summary"], {8}
    per_epoch = json.loads(Path("runs/a/status.json").read_text())["total"] / 4
    for kind in ("raw", "ema"):
        best = max(lines, key=lambda line: (line[f"{kind}_top1"], -line["step"]))
        steps.add(best["step"])
        where = f"epoch {round(best['step'] / per_epoch, 2):g}, checkpoints/step-{best['step']:08d}"
        name = {"raw": "raw", "ema": "EMA"}[kind]
        assert f"  best {name}  {best[f'{kind}_top1']:.2f} %, {where}\n" in summary
    assert [path.name for path in sorted(Path("runs/a/checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in sorted(steps)
    ]
    assert len(steps) > 1  # otherwise the test has no effect


def test_a_cap_below_the_saved_step_evaluates_and_ends(whole, train):
    folder = copy(whole, "a", 5)
    assert train(*EVERY, "run=a", "steps=2") == 0
    assert json.loads((folder / "status.json").read_text())["step"] == 5


@pytest.mark.parametrize("name", ["environment.json", "config.yaml"])
@pytest.mark.parametrize(
    "harm", ["lost", 196, 200, 204, 208]
)  # bytes that are left: ends of lines, and parts of a word
def test_a_lost_or_cut_record_stops(whole, train, capsys, name, harm):
    folder = copy(whole, "a", 5)
    (
        (folder / name).unlink()
        if harm == "lost"
        else (folder / name).write_text((folder / name).read_text()[:harm])
    )
    assert train(*EVERY, "run=a") in (65, 2)
    assert "given" in capsys.readouterr().err


def test_a_signal_before_the_first_step_stops_there(train, capsys):
    from reconverge.base import signals

    signals._came[signal.SIGINT] = 0.0
    assert train(*EVERY, "run=a") == 75
    assert "SIGINT: stopped before the first step" in capsys.readouterr().out


def test_ctrl_c_again_after_seconds_stops_at_once_and_repeats_within_a_moment_do_not(capfd):
    from reconverge.base import signals

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        signals.catch()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.told_to_stop()
        assert capfd.readouterr().err.count("SIGINT: stopping") == 1
        signals._came[signal.SIGINT] -= 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signals._came.clear()
        signals._said.clear()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, before)


def test_a_save_below_a_damaged_newer_checkpoint_is_the_one_that_stays(whole, train):
    """keep=1, the newest is damaged, and a signal asks for a save before its step is reached again."""
    from reconverge.base import signals
    from reconverge.run import checkpoint

    folder = copy(whole, "a", 6)
    (folder / "checkpoints" / "step-00000006" / "state.json").write_text("{}")
    (folder / "checkpoints" / "step-00000005" / "state.json").write_text("{}")

    def hook(module, inputs):
        if type(module).__name__ == "ConvNeXt" and not inputs[0].is_meta:
            signals._came[signal.SIGTERM] = 0.0  # in the first step after the fall back to step 4

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        assert train(*EVERY, "run=a", "keep=1", "save_every=0") == 75
    finally:
        handle.remove()
    newest, skipped = checkpoint.newest_valid(folder / "checkpoints")
    assert (newest.name, skipped) == ("step-00000005", [])
    assert train(*EVERY, "run=a", "keep=1") == 0
    assert bits("a") == expected(whole)


@pytest.mark.parametrize("save_every", [pytest.param("2", marks=pytest.mark.slow), "0"])
def test_what_was_trained_is_saved_although_an_evaluation_fails(train, digits, tmp_path, capsys, save_every):
    """A validation image that cannot be read ends the run; mended, it goes on from that step."""
    shutil.copytree(digits, tmp_path / "set")
    given = [*TINY, f"data.root={tmp_path}/set", "steps=6", "evaluate_every=2", f"save_every={save_every}"]
    assert train(*CHANCE, *given, "run=whole") == 0
    image = next((tmp_path / "set" / "val" / "7").iterdir())
    good = image.read_bytes()
    image.write_bytes(bytes(len(good)))
    assert train(*CHANCE, *given, "run=a") == 65
    assert image.name in capsys.readouterr().err
    (saved,) = Path("runs/a/checkpoints").iterdir()
    assert saved.name in ("step-00000001", "step-00000002")  # a process in the background may find it first
    image.write_bytes(good)
    assert train(*CHANCE, *given, "run=a") == 0
    assert f"resumed after step {int(saved.name[-1])}" in capsys.readouterr().out
    assert bits("a") == bits("whole")
    assert records(Path("runs/a")) == records(Path("runs/whole"))


def test_a_finished_run_whose_length_may_change_trains_on(train, capsys):
    """R2 is lost, environment.json records it, and the epochs that were added are trained."""
    assert train("epochs=2", "run=a") == 0
    assert train("epochs=3", "run=a") == 78
    assert train("epochs=3", "run=a", "resume_allow=[epochs]") == 0
    assert "promise R2 is lost" in capsys.readouterr().out
    status, environment = (
        json.loads(Path(f"runs/a/{name}.json").read_text()) for name in ("status", "environment")
    )
    assert status["step"] == status["total"] == 21
    assert not environment["promises"]["R2"]
    assert [entry["because"] for entry in environment["lost"]] == ["epochs"]
    assert train("epochs=3", "run=a") == 0  # finished, as it is now
    assert "is finished" in capsys.readouterr().out


def test_what_is_allowed_of_a_finished_run_is_noted(train, capsys):
    assert train("epochs=2", "run=a") == 0
    assert train("epochs=2", "optim.clip=1", "run=a", "resume_allow=[optim.clip]") == 0
    assert not json.loads(Path("runs/a/environment.json").read_text())["promises"]["R2"]
    assert json.loads(Path("runs/a/status.json").read_text())["reason"] == "done"
