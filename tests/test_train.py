"""train.py on a few real images: the files of a run, the reasons why it stops, and its exit codes."""

import json
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, _main, weights

from reconverge.base.errors import Exit, explain
from reconverge.data.order import Order


def metrics(run):
    return [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]


def test_trains_evaluates_and_leaves_the_folder(train, capsys):
    assert (
        train("model=convnext_atto", "steps=12", "run=a", "evaluate_every=6", "save_every=6", "log_every=2")
        == 0
    )
    folder = Path("runs/a")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "record.jsonl",
        "status.json",
        "classes.txt",
        "checkpoints",
        "curves.png",
        "first_batch.png",
        "predictions.png",
        "outcomes.npz",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000012",
    ]
    records = metrics("a")
    assert [record["step"] for record in records] == [2, 4, 6, 6, 8, 10, 12, 12]
    assert records[-1]["raw_top1"] > 5
    status = json.loads((folder / "status.json").read_text())
    assert (status["reason"], status["exit_code"], status["step"]) == ("done", 0, 12)
    said = capsys.readouterr().out
    raw, ema = ([record[f"{kind}_top1"] for record in (records[3], records[-1])] for kind in ("raw", "ema"))
    best = max(range(2), key=lambda number: (max(raw[number], ema[number]), -number))
    evaluations = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert [line.partition("  best")[0] for line in evaluations] == [
        f"epoch {epoch}  top-1 {ema[number]:.2f} % EMA, {raw[number]:.2f} % raw"
        for number, epoch in enumerate(("0.86", "1.71"))  # 6 and 12 of 7 steps an epoch
    ]
    assert f"best {max(raw[best], ema[best]):.2f} %" in evaluations[1]
    assert f"is finished: {status['summary']}\n" in said
    assert status["summary"].splitlines()[:2] == [
        "step 12 of 28, epoch 1.71 of 4",
        f"  top-1     {ema[1]:.2f} % EMA, {raw[1]:.2f} % raw",
    ]
    assert status["summary"].splitlines()[-1] == "  folder    runs/a/"
    for part in (
        "3.38 M parameters",
        "16 images = 2 microbatches x 8",
        "7 of them warm-up",
        "half-life 34 steps, 4.9 epochs",
        "120 training",
        "R2 resumed",
        "runs/a/",
    ):
        assert part in said
    environment = json.loads((folder / "environment.json").read_text())
    assert set(environment["facts"]) == {
        "code",
        "versions",
        "libraries",
        "threads",
        "hardware",
        "ranks",
        "forward_images",
        "pixels",
        "data",
    }
    assert environment["promises"] == {"R1": True, "R2": True, "R3": True, "R4": False}
    assert environment["facts"]["data"]["order"] == "order-1"
    assert len(environment["starts"]) == 1
    assert (folder / "classes.txt").read_text().split() == [str(digit) for digit in range(10)]


def test_layer_decay_is_shown_layer_by_layer(train, capsys):
    assert train("model=convnext_atto", "steps=1", "run=a", "optim.layer_decay=0.5") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer ")]
    assert [row.split()[1] for row in rows] == ["0", "1", "2", "3", "4", "5", "6"]
    # stem: a 4 x 4 convolution to 40 channels with its bias, and a norm; head: a norm of 320 and 10 classes
    assert rows[0].split(None, 2)[2] == "lr x 0.01562, 2,040 parameters: stem.0.bias ... stem.1.weight"
    assert rows[6].split(None, 2)[2] == "lr x 1, 3,850 parameters: head.fc.bias ... head.norm.weight"


def test_without_validation_images_nothing_is_evaluated_and_the_end_says_so(
    train, capsys, digits, tmp_path, evaluate
):
    shutil.copytree(digits / "train", tmp_path / "images" / "train")
    arguments = [f"data.root={tmp_path / 'images'}", "data.val=null", "evaluate_every=never", "run=a"]
    assert train(*arguments, "steps=3") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        "a is finished: step 3 of 28, epoch 0.43 of 4",
        "  top-1     not evaluated after this step (evaluate_every=never)",
        "  folder    runs/a/",
    ]
    assert any("120 training and no validation images" in line for line in said)
    assert not any("raw_top1" in record for record in metrics("a"))
    assert {path.name for path in Path("runs/a").glob("*.png")} == {"first_batch.png"}
    assert train(*arguments, "steps=3") == 0
    assert "a is finished: step 3 of 28" in capsys.readouterr().out
    assert train(*arguments, "steps=5") == 0  # continues, without an evaluation at the start
    assert train(*arguments, "steps=4") == 0  # nothing left to do
    assert evaluate("checkpoint=runs/a") == 2
    assert "data.val=null" in capsys.readouterr().err


def test_a_run_that_was_not_evaluated_can_be_at_its_end(train, capsys):
    assert train("run=a", "steps=2", "evaluate_every=never") == 0
    capsys.readouterr()
    assert train("run=a", "steps=3", "evaluate_every=0") == 0
    assert re.search(r"^epoch 0.43  top-1 .* EMA, .* raw  best ", capsys.readouterr().out, re.MULTILINE)


def test_the_end_compares_with_what_is_published(train, capsys):
    given = ["model=convnext_atto", "recipe=in1k", "augment.size=32", "evaluate.size=32"]
    assert train(*given, "steps=1", "run=a", "evaluate_every=0") == 0
    text = "not comparable: no top-1 of convnext_atto with recipe=in1k is published"
    status = json.loads(Path("runs/a/status.json").read_text())
    assert f"\n  compared  {text}\n" in status["summary"]
    assert status["comparison"] == text
    assert status["summary"] in capsys.readouterr().out


def test_again_says_finished(train, capsys):
    assert train("steps=2", "run=a", "evaluate_every=0") == 0
    before = weights("a")
    capsys.readouterr()
    assert train("steps=2", "run=a", "evaluate_every=0") == 0
    said = capsys.readouterr().out
    assert "a is finished: step 2 of 28, epoch 0.29 of 4\n  top-1 " in said
    assert said.endswith("run=NAME starts a new run; remove runs/a to repeat this one\n")
    assert train("steps=4", "run=a") == 0  # the cap may grow
    assert weights("a") != before


def test_the_same_command_gives_the_same_bits_in_another_process(train, start):
    """R1, and the workers of R3."""
    arguments = ["steps=5", "evaluate_every=never"]
    assert train(*arguments, "run=a") == 0
    process = start(*arguments, "run=b", "workers=2", real=True)
    assert process.wait(180) == 0
    assert [weights("a", kind) for kind in ("model", "ema", "optimizer")] == [
        weights("b", kind) for kind in ("model", "ema", "optimizer")
    ]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(train, capsys, digits):
    """A huge learning rate: step 2 still changes the weights (the rate of step 1 is 0), and step 3 has
    infinities.
    """
    assert (
        train(
            "run=a",
            "optim.lr=1e30",
            "save_every=1",
            "evaluate_every=0",
            "log_every=10",
            "keep=9",
            "augment.auto=none",
        )
        == 70
    )
    said = capsys.readouterr().err
    assert "step 3: the loss is nan" in said
    assert f"its sample ids: {Order(120, 16, 8, 0).step_ids(2)}" in said
    saved = sorted(Path("runs/a/checkpoints").iterdir())
    assert saved[-1].name == "step-00000002"
    from safetensors.torch import load_file

    assert all(
        tensor.isfinite().all() for path in saved for tensor in load_file(path / "model.safetensors").values()
    )
    status = json.loads(Path("runs/a/status.json").read_text())
    assert (status["reason"], status["exit_code"]) == ("failed", 70)


def test_the_suppressed_step_is_found_at_the_log_interval(train, capsys):
    assert (
        train(
            "run=a", "optim.lr=1e30", "save_every=0", "evaluate_every=0", "log_every=5", "augment.auto=none"
        )
        == 70
    )
    assert "step 3:" in capsys.readouterr().err
    assert metrics("a") == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(train, precision):
    assert train("run=a", "steps=4", "evaluate_every=0", f"precision={precision}", "log_every=1") == 0
    assert all(math.isfinite(record["loss"]) for record in metrics("a") if "loss" in record)
    scaler = json.loads(Path("runs/a/checkpoints/step-00000004/state.json").read_text())["scaler"]
    assert bool(scaler) == (precision == "fp16")


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_the_precision_may_change_if_that_is_allowed(train, capsys, before, after):
    """The checkpoint of a run without fp16 has no loss scale, and one of fp16 has."""
    arguments = ["run=a", "evaluate_every=never", "log_every=1"]
    assert train(*arguments, "steps=2", f"precision={before}") == 0
    assert train(*arguments, "steps=4", f"precision={after}") == 78
    capsys.readouterr()
    assert train(*arguments, "steps=4", f"precision={after}", "resume_allow=[precision]") == 0
    said = " ".join(capsys.readouterr().out.split())
    fresh = "step-00000002 was trained without a loss scale: it starts at 65536"
    assert (fresh in said) == (after == "fp16")
    scaler = json.loads(Path("runs/a/checkpoints/step-00000004/state.json").read_text())["scaler"]
    assert scaler.get("_growth_tracker") == (2 if after == "fp16" else None)
    assert all(math.isfinite(record["loss"]) for record in metrics("a"))


def test_fp16_overflow_skips_the_update_and_the_clock_goes_on(train, capsys):
    """With large weights of the head, the loss times 65536 overflows float16; the scale is halved until it
    fits.
    """
    assert (
        train(
            "run=a",
            "steps=6",
            "precision=fp16",
            "log_every=1",
            "model.head_init_scale=3e4",
            "augment.auto=none",
        )
        == 0
    )
    assert any(record.get("grad_norm", 0) is None for record in metrics("a"))
    assert (
        json.loads(Path("runs/a/checkpoints/step-00000006/state.json").read_text())["scaler"]["scale"] < 65536
    )


def test_a_full_disk_keeps_the_last_good_checkpoint(train, small_disk, monkeypatch, capsys):
    subprocess.run(
        ["mount", "-o", "remount,size=75m", str(small_disk)], check=True
    )  # one checkpoint of 54 MB, not two
    monkeypatch.chdir(small_disk)
    given = ["model=convnext_atto", "run=a", "steps=4", "save_every=1"]
    assert train(*given) == 74
    assert re.search("24 MB free in .* for a checkpoint of 54 MB", capsys.readouterr().err)
    from reconverge.run import checkpoint

    path, skipped = checkpoint.newest_valid(Path("runs/a/checkpoints"))
    assert (path.name, skipped) == ("step-00000001", [])
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    assert train(*given) == 0


def test_a_broken_image_stops_with_its_name(train, digits, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(digits, root)
    broken = sorted((root / "train" / "3").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:60])
    assert train("run=a", f"data.root={root}", "workers=1") == 65
    assert str(broken) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError("x"), Exit.PERMISSION),
        (FileNotFoundError("x"), Exit.MISSING),
        (OSError(28, "No space left on device"), Exit.DISK),
        (MemoryError(), Exit.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Exit.OUT_OF_MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
            ),
            Exit.OUT_OF_MEMORY,
        ),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), Exit.OUT_OF_MEMORY),
    ],
)
def test_errors_of_the_system_have_their_exit_code(error, code):
    assert explain(error).code == code


@pytest.mark.parametrize(
    "cause", [RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), None]
)
def test_a_worker_that_is_found_dead_has_died_of_its_signal(cause):
    """While torch waits for a batch, it raises a second error from the error with the name of the signal."""
    error = RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly")
    error.__cause__ = cause or queue.Empty()
    assert explain(error).code == (Exit.OUT_OF_MEMORY if cause else Exit.BUG)
    assert "a data worker died: DataLoader worker (pid" in str(explain(error))


def test_a_bug_is_not_dressed_up():
    assert explain(ValueError("x")) is None


def test_torchs_cpu_allocator_raises_what_is_expected():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert explain(raised.value).code == Exit.OUT_OF_MEMORY


@pytest.mark.parametrize("name", ["augment.size", "evaluate.size"])
def test_images_of_which_the_model_leaves_nothing_are_refused_before_the_first_step(train, capsys, name):
    assert train(f"{name}=31", "run=a") == 2
    said = capsys.readouterr()
    assert f"{name}=31 with this model: " in said.err
    assert f"change   {name}=32" in said.err
    assert "step 1" not in said.out
    assert train(f"{name}=32", "run=a", "steps=1", "evaluate_every=0") == 0


def test_a_model_that_the_meta_device_cannot_run_is_not_refused_for_its_size():
    from reconverge.models import create

    class Odd(torch.nn.Module):
        def forward(self, images):
            return images.sum().item()  # a number, which meta tensors have not

    create.refuse_sizes(Odd(), {"augment.size": 32})


def test_check_says_what_it_looked_at(train, capsys):
    assert train("--check", "run=a", "data.root=/nowhere") == 0
    assert (
        "a: the settings fit together; neither images nor devices were looked at" in capsys.readouterr().out
    )
    assert train("--check", "microbatch=7") == 2
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there_is_refused(train, capsys):
    assert train("run=a", "device=cuda") == 2
    assert "device=cpu" in capsys.readouterr().err
    assert train("run=b", "precision=tf32") == 2


def debug(monkeypatch, digits, *arguments):
    return _main(
        "train",
        [
            *[item for item in SMALL if not item.startswith(("epochs", "evaluate_every"))],
            f"data.root={digits}",
            "epochs=40",
            *arguments,
        ],
        monkeypatch,
    )


@pytest.mark.slow
def test_debug_overfit_drives_the_loss_to_nothing(monkeypatch, digits):
    assert debug(monkeypatch, digits, "debug=overfit", "steps=60", "optim.warmup_epochs=0") == 0
    losses = [
        record["loss"] for record in metrics(f"convnext_atto-overfit-{digits.name}-s0") if "loss" in record
    ]
    assert losses[0] > 0.2 > 0.01 > losses[-1]


def test_debug_synthetic_short_and_profile(monkeypatch, digits, tmp_path):
    assert debug(monkeypatch, digits, "debug=synthetic", "steps=2", "data.images=32", "data.classes=7") == 0
    assert metrics("convnext_atto-demo-synthetic-s0")[-1]["step"] == 2
    assert debug(monkeypatch, digits, "debug=short") == 0
    assert [
        record["step"] for record in metrics(f"convnext_atto-demo-{digits.name}-s0-short") if "loss" in record
    ] == list(range(1, 21))
    assert debug(monkeypatch, digits, "debug=profile", "debug.profile=2", "steps=5") == 0
    trace = json.loads(Path(f"runs/convnext_atto-demo-{digits.name}-s0-profile/trace.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])


def test_two_steps_of_the_recipe_at_224_pixels(monkeypatch, photographs):
    arguments = [
        "model=convnext_atto",
        "recipe=in1k",
        "data=folder",
        f"data.root={photographs}",
        "batch=8",
        "microbatch=4",
        "steps=2",
        "threads=2",
    ]
    assert _main("train", [*arguments, "run=a", "workers=1", "log_every=1"], monkeypatch) == 0
    assert [record["lr"] for record in metrics("a") if "lr" in record] == pytest.approx(
        [0, 4e-3 / (20 * 7 - 1)]
    )


@pytest.mark.parametrize("arguments", [["steps=3", "debug.profile=10"], ["steps=1", "debug.profile=2"]])
def test_a_trace_that_the_end_cuts_short_is_written_or_not_but_ends_well(train, arguments):
    assert train("run=a", *arguments) == 0
    assert Path("runs/a/trace.json").exists() == ("steps=3" in arguments)


def test_an_evaluation_that_is_not_finite_stops(train, capsys):
    assert train("run=a", "steps=1", "evaluate_every=0", "precision=fp16", "model.layer_scale=1e8") == 70
    assert "the evaluation of the raw weights has the loss nan" in capsys.readouterr().err


def test_metrics_are_json_whatever_overflows(train):
    assert (
        train(
            "run=a",
            "steps=2",
            "precision=fp16",
            "log_every=1",
            "model.layer_scale=1e8",
            "evaluate_every=0",
        )
        == 70
    )
    text = Path("runs/a/metrics.jsonl").read_text()
    assert text
    assert "NaN" not in text
    assert "Infinity" not in text


def test_class_names_may_be_anything(train, digits, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(digits, root)
    for split in ("train", "val"):
        (root / split / "3").rename(root / split / "$x^$ _{} 猫")
    assert train("run=a", "steps=1", "evaluate_every=0", f"data.root={root}") == 0


def test_a_file_where_a_folder_is_wanted(train, capsys):
    Path("runs").write_text("x")
    assert train("run=a") == 66
    assert "given" in capsys.readouterr().err


def test_a_reader_that_goes_away_does_not_end_the_training(small):
    import shlex

    command = (
        f"{sys.executable} {ROOT}/train.py {shlex.join(small)} run=a steps=6 log_every=1 evaluate_every=never"
        " | head -3"
    )
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL, timeout=100)
    for _ in range(100):
        if json.loads(Path("runs/a/status.json").read_text())["reason"] == "done":
            break
        time.sleep(0.2)
    assert json.loads(Path("runs/a/status.json").read_text())["reason"] == "done"


@pytest.mark.slow
def test_convnext_t_trains_at_224_pixels_as_the_readme_says(monkeypatch, photographs):
    arguments = [
        "model=convnext_t",
        "recipe=in1k",
        "data=folder",
        f"data.root={photographs}",
        "batch=8",
        "microbatch=4",
        "steps=2",
    ]
    assert _main("train", [*arguments, "run=a", "threads=1", "workers=0"], monkeypatch) == 0


@pytest.mark.slow
def test_the_compiled_model_trains_to_the_same_loss(train):
    given = [
        "model=timm",
        "model.timm=test_convnext",
        "model.drop_path=0.5",
        "steps=3",
        "log_every=1",
        "evaluate_every=never",
    ]
    assert train("run=a", *given) == 0
    assert train("run=b", *given, "compile=true") == 0
    plain, compiled = ([record["loss"] for record in metrics(run) if "loss" in record] for run in "ab")
    assert plain == pytest.approx(compiled, rel=1e-4)
    assert weights("a") != weights("b")  # other kernels, other bits: else nothing was compiled
    names = json.loads(Path("runs/b/checkpoints/step-00000003/MANIFEST.json").read_text())
    assert (
        names["files"].keys()
        == json.loads(Path("runs/a/checkpoints/step-00000003/MANIFEST.json").read_text())["files"].keys()
    )


@pytest.mark.slow
def test_the_default_run_reaches_97_percent():
    """python train.py without arguments, the first command of the README."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    last = metrics("convnext_atto-demo-digits-s0")[-1]
    assert max(last["raw_top1"], last["ema_top1"]) >= 97
    again = subprocess.run(
        [sys.executable, str(ROOT / "train.py")], capture_output=True, text=True, timeout=180
    )
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert os.path.exists("runs/convnext_atto-demo-digits-s0/curves.png")
