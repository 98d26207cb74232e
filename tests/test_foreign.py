"""Runs that may come from somebody else: what they load is held against what it is for, before it is used."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import trained, weights
from safetensors.torch import load_file, save_file

FILES = ("model", "ema", "optimizer")
ARGUMENTS = ["model=timm", "model.timm=test_convnext", "run=a", "save_every=2", "evaluate_every=never"]
ARGUMENTS += ["ema.decay=0.9", "keep=5", "log_every=1"]


@pytest.fixture(scope="module")
def two_saved(digits, tmp_path_factory, cache):
    """runs/a: checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("two_saved")
    return trained(folder, cache, *ARGUMENTS, "steps=4", f"data.root={digits}")


@pytest.fixture
def run(two_saved):
    shutil.copytree(two_saved, "runs")
    return Path("runs/a")


def newest(run):
    return sorted((run / "checkpoints").iterdir())[-1]


def signed(folder):
    """The manifest made anew, as somebody would who tampers with a checkpoint."""
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def changed(folder, name, change):
    tensors = load_file(folder / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    signed(folder)


def first(tensors, end=""):
    return next(name for name, tensor in tensors.items() if name.endswith(end) and tensor.numel() > 1)


def one_element(tensors):
    tensors[first(tensors)] = torch.zeros(1)


def none_at_all(tensors):
    tensors.clear()


def one_fewer(tensors):
    del tensors[first(tensors)]


def one_more(tensors):
    tensors["another"] = torch.zeros(3)


def doubles(tensors):
    tensors[first(tensors)] = tensors[first(tensors)].double()


def not_finite(tensors):
    tensors[first(tensors)].view(-1)[-1] = float("nan")


CHANGES = (one_element, none_at_all, one_fewer, one_more, doubles, not_finite)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_does_not_fit_is_refused_before_anything_is_copied(run, train, capsys, name, change):
    changed(newest(run), name, change)
    assert train(*ARGUMENTS, "steps=6") == 65
    said = capsys.readouterr().err
    assert f"{name}.safetensors" in said
    assert weights("a") == sha256((newest(run) / "model.safetensors").read_bytes()).hexdigest()
    assert newest(run).name == "step-00000004"


@pytest.mark.parametrize("change", [lambda t: t.sub_(10), lambda t: t.fill_(1e6)])
@pytest.mark.parametrize("kind", ["step", "exp_avg_sq"])
def test_values_that_no_training_gives_are_refused(run, train, capsys, change, kind):
    if kind == "exp_avg_sq" and change(torch.ones(1)) > 1:
        return
    path = newest(run)
    changed(path, "optimizer", lambda tensors: [change(v) for k, v in tensors.items() if k.endswith(kind)])
    assert train(*ARGUMENTS, "steps=6") == 65
    assert "values that no training gives" in capsys.readouterr().err


@pytest.mark.parametrize("state", [None, [], {"scale": 1.0}, "x"])
def test_a_loss_scale_of_another_form_is_refused(run, train, state):
    path = newest(run)
    numbers = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(numbers | {"scaler": state}))
    signed(path)
    assert train(*ARGUMENTS, "steps=6") == 65


@pytest.mark.parametrize("name", [*(f"{one}.safetensors" for one in FILES), "state.json"])
def test_a_manifest_that_leaves_out_a_file_is_damage(run, train, capsys, name):
    path = newest(run) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    assert train(*ARGUMENTS, "steps=5") == 0
    said = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: step-00000004: MANIFEST.json leaves out {name}" in said


def test_another_step_than_the_folders_is_damage(run, train, capsys):
    path = newest(run)
    numbers = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(numbers | {"step": 1000}))
    signed(path)
    assert train(*ARGUMENTS, "steps=5") == 0
    assert "step-00000004: state.json is of step 1000" in capsys.readouterr().out


@pytest.mark.parametrize("change", CHANGES)
def test_eval_export_and_init_refuse_them_too(run, reconverge, evaluate, train, small, capsys, change):
    changed(newest(run), "model", change)
    changed(newest(run), "ema", change)
    assert evaluate("checkpoint=runs/a", "workers=0", "device=cpu") == 65
    code, said = reconverge("export", run, "--to", "safetensors")
    assert code == 65, said
    if change is one_more or change is one_fewer or change is none_at_all or change is one_element:
        return  # other models may start from a part of these: init_strict decides
    assert train(*ARGUMENTS, "run=b", "init=runs/a", "steps=1") == (0 if change is doubles else 65)


@pytest.mark.parametrize(
    ("tensor", "code", "words"),
    [
        (torch.ones(24, dtype=torch.int8), 2, "int8"),
        (torch.ones(24, dtype=torch.bool), 2, "bool"),
        (torch.ones(24, dtype=torch.complex64), 2, "complex64"),
        (torch.ones(24).to(torch.float8_e4m3fn), 2, "float8"),
        (torch.full((24,), 1e300, dtype=torch.float64), 65, "not finite as float32"),
        (torch.full((24,), float("inf")), 65, "not finite"),
        (torch.eye(24)[0].to_sparse(), 2, "sparse_coo"),
        (torch.empty(24, device="meta"), 2, "without values"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(run, train, capsys, tensor, code, words):
    tensors = load_file(newest(run) / "model.safetensors")
    assert tensors["stem.0.bias"].shape == (24,)
    torch.save(tensors | {"stem.0.bias": tensor}, "given.pth")
    assert train(*ARGUMENTS, "run=b", "init=given.pth", "steps=1") == code
    said = capsys.readouterr().err
    assert "stem.0.bias" in said
    assert words in said
    assert not Path("runs/b").exists()


def test_half_precision_weights_are_cast(run, train):
    tensors = load_file(newest(run) / "model.safetensors")
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, "given.pth")
    still = ["optim.lr=0", "optim.min_lr=0", "optim.warmup_epochs=0"]
    assert train(*ARGUMENTS, *still, "run=b", "init=given.pth", "steps=1") == 0
    found = load_file(newest(Path("runs/b")) / "model.safetensors")
    loaded = [name for name in tensors if not name.startswith("head.fc")]
    assert all(torch.equal(found[name], tensors[name].half().float()) for name in loaded)


@pytest.mark.parametrize(
    "setting",
    [
        *("optim.lr=inf", "optim.lr=nan", "optim.lr=1e400", "ema.decay=nan", "augment.ratio=[0.5,inf]"),
        *("optim.betas=[0.9,nan]", "data.mean=[0.5,nan,0.5]", "model.drop_path=nan", "world_timeout=inf"),
    ],
)
def test_no_setting_is_infinite(train, capsys, setting):
    assert train(setting, "run=b") == 2
    assert setting.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_that_an_update_broke_are_never_saved(train, capsys, precision):
    """The gradient of step 1 is finite, and so is its norm; the weights after it are not."""
    broken = ["optim.lr=1e38", "optim.warmup_epochs=0", "optim.weight_decay=1e30", f"precision={precision}"]
    assert train(*ARGUMENTS, *broken, "run=b", "save_every=1", "steps=3") == 70
    said = capsys.readouterr().err
    assert "after its update some weights are not finite" in said
    assert not list(Path("runs/b/checkpoints").glob("step-*"))


PLANTED = "import pathlib; pathlib.Path('{where}').write_text('ran'); raise SystemExit(3)"


def test_nothing_is_imported_from_the_working_folder(train, tmp_path):
    ran = tmp_path / "ran"
    for name in ("tensorboardX", "runpy", "json", "reconverge", "subprocess", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(PLANTED.format(where=ran))
    assert train(*ARGUMENTS, "run=b", "steps=1", "tracker=tensorboard") == 0
    assert not ran.exists()
    assert list(Path("runs/b/tensorboard").glob("events.*"))


def test_torchrun_imports_nothing_from_the_working_folder(tmp_path):
    from reconverge.commands import processes

    ran = tmp_path / "ran"
    for name in ("torch", "numpy", "runpy"):
        (tmp_path / f"{name}.py").write_text(PLANTED.format(where=ran))
    (tmp_path / "apart").mkdir()
    script = tmp_path / "apart" / "script.py"
    script.write_text("import os; print('rank', os.environ['RANK'])")
    with processes.started(processes.command(script, 2), tmp_path / "words.txt") as job:
        assert job.wait(100) == 0
    assert "rank 1" in (tmp_path / "words.txt").read_text()
    assert not ran.exists()


STAGED = ["data=shards", "data.window=2", "evaluate_every=never", "run=b", "steps=2"]


@pytest.mark.parametrize("where", ["scratch", "runs", "link", "another"])
def test_staging_removes_nothing_of_others(run, train, shards, capsys, where):
    """Neither what lies in scratch/NAME, nor the run's own checkpoints, nor the copies of another run."""
    data = [*STAGED, f"data.root={shards}"]
    own = Path("scratch/b")
    own.mkdir(parents=True)
    if where == "scratch":
        (own / "thesis.tex").write_text("years of work")
    elif where == "runs":
        assert train(*data) == 0
        own = Path("runs/b")
    elif where == "link":
        own.rmdir()
        own.symlink_to("../runs/a")
    else:
        (own / "reconverge-stage.txt").write_text("copies of shards for the run /elsewhere/runs/b\n")
        (own / "000000.tar").write_text("a copy")
    kept = own / "checkpoints" if where == "runs" else own
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert before
    assert train(*data, "steps=4", f"data.stage={own.parent}") == 2
    assert "not copies of this run" in capsys.readouterr().err
    assert before.items() <= {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}.items()


def test_staging_goes_on_where_it_was_killed_and_leaves_nothing(train, shards):
    from reconverge.data.shards import staged_name

    own = Path("scratch/b")
    own.mkdir(parents=True)
    (own / "reconverge-stage.txt").write_text(f"copies of shards for the run {Path('runs/b').resolve()}\n")
    (own / staged_name(0)).write_text("half a copy")
    (own / f".draft-{'0' * 32}").write_text("half a copy")
    assert train(*STAGED, f"data.root={shards}", "data.stage=scratch") == 0
    assert not own.exists()


def test_only_our_own_leftovers_are_removed_from_checkpoints(run, train):
    folder = run / "checkpoints"
    for name, file in ((".old-thesis", "a.txt"), (".new-00000001", "notes.txt"), ("step-by-step", "b.txt")):
        (folder / name).mkdir()
        (folder / name / file).write_text("of somebody")
    (folder / ".old-00000002").mkdir()
    (folder / ".old-00000002" / "state.json").write_text("ours")
    assert train(*ARGUMENTS, "steps=6") == 0
    assert not (folder / ".old-00000002").exists()
    assert (folder / ".old-thesis" / "a.txt").exists()
    assert (folder / ".new-00000001" / "notes.txt").exists()
    assert (folder / "step-by-step" / "b.txt").exists()


# ---- checkpoints that are gone -----------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["done", "killed"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_run_whose_checkpoints_are_gone_does_not_start_over_its_record(run, train, capsys, ended, whole):
    if ended == "killed":
        status = json.loads((run / "status.json").read_text())
        assert status["saved"] == 4
        (run / "status.json").write_text(json.dumps(status | {"reason": "running"}))
    for folder in [run / "checkpoints"] if whole else list((run / "checkpoints").iterdir()):
        shutil.rmtree(folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(*ARGUMENTS, "steps=6") == 66
    said = capsys.readouterr().err
    assert "saved one after step 4" in said
    assert "remove runs/a to begin this one again" in said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_that_never_saved_starts_again(train):
    assert train(*ARGUMENTS, "run=b", "optim.lr=1e38", "optim.warmup_epochs=0", "steps=9") == 70
    assert json.loads(Path("runs/b/status.json").read_text())["saved"] == 0
    assert train(*ARGUMENTS, "run=b", "steps=1") == 0


# ---- links -------------------------------------------------------------------------------------------------

WRITTEN = ["tracker.log", "metrics.jsonl", "record.jsonl", "status.json", "environment.json", "config.yaml"]
WRITTEN += ["classes.txt", "first_batch.png", "curves.png", "predictions.png", "outcomes.npz", "lock"]
WRITTEN += ["quarantine.jsonl", "tracker-tensorboard.json", "trace.json"]
FOLDERS = ["checkpoints", "errors", "tensorboard", "wandb"]


@pytest.mark.parametrize("name", [*WRITTEN, *FOLDERS, "checkpoints/step-00000004"])
def test_training_writes_through_no_link(run, train, capsys, tmp_path, name):
    target = tmp_path / "target"
    if name in WRITTEN:
        target.write_text("of somebody")
    else:
        shutil.copytree(run / name, target) if (run / name).is_dir() else target.mkdir()
    before = {path: path.read_bytes() for path in (target, *target.rglob("*")) if path.is_file()}
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    assert train(*ARGUMENTS, "steps=6", "tracker=tensorboard", "keep=1") == 65
    assert f"{name} is a link" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (target, *target.rglob("*")) if path.is_file()}
