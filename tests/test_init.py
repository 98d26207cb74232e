"""init= through the real command line: a chain of two runs on other classes and another resolution, and
resumed runs.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, _main, trained, weights
from safetensors.torch import load_file
from test_pretrained import write_malicious

from reconverge.base.errors import Exit, Stop
from reconverge.weights import read


@pytest.fixture(scope="session")
def halves(digits, tmp_path_factory):
    """The small digits in two label sets: 0 to 4, and 5 to 9."""
    root = tmp_path_factory.mktemp("halves")
    for half, labels in (("low", "01234"), ("high", "56789")):
        for split in ("train", "val"):
            for label in labels:
                shutil.copytree(digits / split / label, root / half / split / label)
    return root


@pytest.fixture(scope="session")
def low(halves, tmp_path_factory, cache):
    """runs/low: two steps on the digits 0 to 4, of another seed, with a checkpoint after each."""
    arguments = ["run=low", "seed=1", "steps=2", "save_every=1", "evaluate_every=never"]
    return trained(tmp_path_factory.mktemp("low"), cache, f"data.root={halves}/low", *arguments)


@pytest.fixture
def tune(low, halves, monkeypatch):
    """train.py on the digits 5 to 9 at 48 px, beside a copy of the run on 0 to 4."""
    shutil.copytree(low, "runs")
    fixed = [
        *SMALL,
        f"data.root={halves}/high",
        "run=high",
        "augment.size=48",
        "evaluate.size=48",
        "evaluate_every=never",
    ]
    return lambda *arguments: _main("train", [*fixed, *arguments], monkeypatch)


def newest(run, kind="model"):
    return load_file(sorted(Path("runs", run, "checkpoints").iterdir())[-1] / f"{kind}.safetensors")


def origin():
    return json.loads(Path("runs/high/environment.json").read_text())["facts"]["init"]


@pytest.mark.parametrize(
    ("suffix", "kind", "step"),
    [("", "model", 2), (":ema", "ema", 2), ("/checkpoints/step-00000001", "model", 1)],
)
def test_a_run_starts_where_another_ended_and_records_its_parent(tune, capsys, suffix, kind, step):
    """With a learning rate of 0, raw and EMA weights stay as they were loaded."""
    assert (
        tune(
            f"init=runs/low{suffix}", "steps=1", "optim.lr=0", "optim.min_lr=0", "model.head_init_scale=0.001"
        )
        == 0
    )
    parent = Path(f"runs/low/checkpoints/step-{step:08d}")
    given, raw, ema = load_file(parent / f"{kind}.safetensors"), newest("high"), newest("high", "ema")
    for name, tensor in given.items():
        for ours in (raw, ema):
            if name == "head.fc.weight":
                assert not torch.equal(ours[name], tensor)  # five classes too, but different ones
                assert ours[name].abs().max() < 0.001 * 0.02 * 6
            elif name != "head.fc.bias":
                assert torch.equal(ours[name], tensor)
    digest = json.loads((parent / "MANIFEST.json").read_text())["files"][f"{kind}.safetensors"]["sha256"]
    kept = {key: origin()[key] for key in ("run", "step", "weights", "sha256")}
    assert kept == {
        "run": "low",
        "step": step,
        "weights": "ema" if suffix == ":ema" else "raw",
        "sha256": digest,
    }
    said = capsys.readouterr().out
    assert (
        f"{'ema' if suffix == ':ema' else 'raw'} weights of run low after step {step}; sha256 {digest[:12]}"
        in said
    )
    assert (
        f"{len(given) - 2} loaded, 0 converted, 0 missing, 0 unexpected, 0 of another shape, 2 of the head"
        in said
    )
    assert (
        "fresh, 5 classes; the 5 classes of the file are different ones (model.head_init_scale=0.001)" in said
    )
    assert "its classes are not the data's 5 (5, 6, 7, ...): 0 of the 5 names match" in said


@pytest.fixture
def evaluated(low):
    """runs/low with two evaluations: raw weights are best after step 1, EMA weights after step 2."""
    shutil.copytree(low, "runs")
    lines = [{"step": 1, "raw_top1": 60.0, "ema_top1": 40.0}, {"step": 2, "raw_top1": 50.0, "ema_top1": 45.0}]
    Path("runs/low/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("suffix", "kind", "step", "top1"),
    [(":best", "model", 1, 60), (":raw:best", "model", 1, 60), (":ema:best", "ema", 2, 45)],
)
@pytest.mark.usefixtures("evaluated")
def test_best_takes_the_checkpoint_with_the_best_top1_of_these_weights(suffix, kind, step, top1):
    found = read.read(f"runs/low{suffix}")
    given = load_file(f"runs/low/checkpoints/step-{step:08d}/{kind}.safetensors")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in given.items())
    assert (found.origin["step"], found.origin["best_top1"]) == (step, top1)
    assert f"after step {step}, its best top-1 ({top1:.2f} %)" in found.origin["text"]
    assert found.classes == list("01234")


def test_a_run_starts_from_the_best_weights_of_another(tune):
    line = {"step": 1, "raw_top1": 60.0, "ema_top1": 40.0}
    Path("runs/low/metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert tune("init=runs/low:ema:best", "steps=1", "optim.lr=0", "optim.min_lr=0") == 0
    parent = load_file("runs/low/checkpoints/step-00000001/ema.safetensors")
    assert all(
        torch.equal(newest("high")[name], tensor) for name, tensor in parent.items() if "head.fc" not in name
    )
    assert origin()["weights"] == "ema"


@pytest.mark.parametrize(
    ("init", "code", "says"),
    [
        ("runs/low/checkpoints/step-00000001:best", Exit.USAGE, "init=runs/low:best"),
        ("runs/low/checkpoints/step-00000001:ema:best", Exit.USAGE, "init=runs/low:ema:best"),
        ("weights.safetensors:best", Exit.USAGE, "only a run has a best checkpoint"),
        ("timm:test_vit:best", Exit.USAGE, "only a run has a best checkpoint"),
        ("runs/none:best", Exit.MISSING, "init=runs/none: there is no such file"),
        ("runs/never:best", Exit.MISSING, "runs/never were never evaluated"),
        ("runs/lost:ema:best", Exit.MISSING, "step-00000002"),
        ("runs/bad:best", Exit.DAMAGED, "step-00000001"),
        ("runs/two:best", Exit.USAGE, "can mean the path"),
    ],
)
@pytest.mark.usefixtures("evaluated")
def test_a_best_that_is_not_there_is_refused(init, code, says):
    shutil.copy("runs/low/checkpoints/step-00000001/model.safetensors", "weights.safetensors")
    for name in ("never", "lost", "bad", "two", "two:best"):
        shutil.copytree("runs/low", f"runs/{name}")
    Path("runs/never/metrics.jsonl").unlink()
    shutil.rmtree("runs/lost/checkpoints/step-00000002")
    with open("runs/bad/checkpoints/step-00000001/model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(Stop) as stopped:
        read.read(init)
    assert (stopped.value.code, says in str(stopped.value)) == (code, True), str(stopped.value)


def test_the_same_classes_keep_their_head(tune, halves):
    assert tune("init=runs/low", "steps=1", "optim.lr=0", "optim.min_lr=0", f"data.root={halves}/low") == 0
    assert all(torch.equal(tensor, newest("high")[name]) for name, tensor in newest("low").items())
    assert origin()["head"] == "kept, 5 classes"


def test_some_of_the_classes_are_mapped_by_name(tune, digits, capsys):
    assert (
        tune(
            "init=runs/low",
            "init_head=mapped",
            "steps=1",
            "optim.lr=0",
            "optim.min_lr=0",
            f"data.root={digits}",
        )
        == 0
    )
    assert torch.equal(newest("high")["head.fc.weight"][:5], newest("low")["head.fc.weight"])
    assert (
        "mapped by name, 5 of 10 classes from 5; initial weights for 5, 6, 7, 8, 9" in capsys.readouterr().out
    )


def test_a_resumed_run_goes_on_from_its_own_checkpoint(tune, capsys):
    """Even without the parent, the bits are those of a run without interruption."""
    assert tune("init=runs/low", "steps=3", "save_every=2", "run=whole") == 0
    assert tune("init=runs/low", "steps=2", "save_every=2") == 0
    shutil.rmtree("runs/low")
    capsys.readouterr()
    assert tune("init=runs/low", "steps=3", "save_every=2") == 0
    assert "sha256" in (said := capsys.readouterr().out)
    assert "this run's own checkpoint has taken their place" in said
    assert [weights("high", kind) for kind in ("model", "ema", "optimizer")] == [
        weights("whole", kind) for kind in ("model", "ema", "optimizer")
    ]
    assert tune("init=runs/low:ema", "steps=4") == 78
    assert "runs/high was started with init=runs/low; now init=runs/low:ema" in capsys.readouterr().err
    assert tune("steps=4") == 78
    assert tune("init=runs/low", "init_head=keep", "steps=4") == 78


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["init=runs/none"], 66, "no such file"),
        (["init=low"], 66, "init=runs/low"),
        (
            ["init=runs/low/checkpoints/step-00000002/ema.safetensors"],
            2,
            "init=runs/low/checkpoints/step-00000002:ema",
        ),
        (["init=runs/low", "init_head=keep", "data=digits"], 2, "the head has 5 classes and the data 10"),
        (["init=runs/low", "init_head=new"], 2, "auto, keep, mapped, fresh"),
        (["init_head=mapped"], 2, "init_head=mapped without init"),
        (["init_strict=false"], 2, "init_strict=False without init"),
        (["init=runs/low", "model=convnext_t"], 2, "of another shape"),
        (["init=evil.pth"], 65, "posix.mkdir"),
        (["init=damaged.safetensors"], 65, "header"),
    ],
)
def test_what_stops_it_leaves_no_run(tune, capsys, arguments, code, says):
    write_malicious("evil.pth", "zip")
    Path("damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert tune("steps=1", *arguments) == code
    assert says in capsys.readouterr().err
    assert not Path("pwned").exists()
    assert not Path("runs/high").exists()


def test_a_damaged_checkpoint_of_the_parent_is_named(tune, capsys):
    damaged = Path("runs/low/checkpoints/step-00000002/model.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert tune("init=runs/low/checkpoints/step-00000002", "steps=1") == 65
    assert "is not the recorded one" in capsys.readouterr().err
    assert tune("init=runs/low", "steps=1") == 0
    assert "after step 1; skipped a damaged checkpoint: step-00000002" in capsys.readouterr().out
    assert tune("init=runs/low:ema", "steps=1", "run=b", "ema.decay=null") == 0


def test_a_parent_without_ema(tune, capsys):
    assert tune("steps=1", "run=plain", "ema.decay=null") == 0
    assert tune("init=runs/plain:ema", "steps=1") == 2
    assert "no EMA weights" in capsys.readouterr().err


def test_a_recipe_for_pre_training_and_one_for_fine_tuning_make_a_chain(halves, monkeypatch, capsys):
    """As published: no validation images for the first, other classes, a larger size, layer decay and a fresh
    head for the second.
    """

    def run(*arguments):
        return _main("train", [*SMALL, "model.drop_path=0", "steps=2", *arguments], monkeypatch)

    small = ["augment.size=32", "data.val=null", "optim.warmup_epochs=0"]
    assert run("recipe=in22k", f"data.root={halves}/low", "run=parent", *small) == 0
    assert "no validation images" in capsys.readouterr().out
    fine = [
        "recipe=ft_in22k_in1k_384",
        f"data.root={halves}/high",
        "augment.size=48",
        "evaluate.size=48",
        "evaluate_every=0",
        "ema.decay=null",
    ]
    assert run(*fine, "run=high", "init=runs/parent", "optim.warmup_epochs=0", "augment.erase=0") == 0
    said = capsys.readouterr().out
    assert "raw weights of run parent after step 2" in said
    assert "fresh, 5 classes" in said
    assert "(model.head_init_scale=0.001)" in said
    assert "layer 0" in said
    assert "random weights" not in said
    assert origin()["sha256"] == weights("parent")
