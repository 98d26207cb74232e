"""reconverge verify: real processes train the same steps again; the result is compared with the run's
records.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, _main
from safetensors.torch import load_file, save_file

from reconverge import commands
from reconverge.base.files import sha256_of
from reconverge.config import compose
from reconverge.config.settings import Train
from reconverge.run import first_difference

STEPS = [
    "steps=4",
    "save_every=2",
    "log_every=1",
    "model.drop_path=0.2",
    "augment.erase=0.25",
    "evaluate_every=4",
]


@pytest.fixture
def verify(monkeypatch, capsys, forking):
    def verify(*arguments):
        monkeypatch.setattr(sys, "argv", ["reconverge", "verify", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return verify


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, cache):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(cache))
        assert _main("train", [*SMALL, f"data.root={digits}", "run=a", *STEPS], patch) == 0
    return folder / "runs" / "a"


@pytest.fixture
def a(trained):
    """A run of four steps, with checkpoints after the second and the last."""
    return Path(shutil.copytree(trained, "runs/a"))


def contents(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def lie(checkpoint, kind, name):
    """Change a number in one tensor of a checkpoint, and its hash in the manifest."""
    path = checkpoint / f"{kind}.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[1] += 1e-3
    save_file(tensors, path)
    entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    edit(checkpoint / "MANIFEST.json", lambda manifest: manifest["files"].update({path.name: entry}))


def record(run, step, **values):
    path = run / "record.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[step - 1] |= values
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_same_steps_from_a_checkpoint_and_the_run_is_only_read(a, verify):
    before = contents("runs/a")
    code, said = verify("runs/a", "--from", "2")
    assert code == 0, said
    assert (
        "training steps 3 to 4 again gave the same images, losses and gradient norms, bit for bit; the hashes"
        " of the checkpoints of steps 4 are equal too" in said
    )
    assert contents("runs/a") == before
    assert [path.name for path in Path("runs").iterdir()] == ["a"]


def test_a_run_of_another_folder_leaves_no_runs_here(a, verify):
    shutil.move("runs", "elsewhere")
    code, said = verify("elsewhere/a", "--steps", "1")
    assert code == 0, said
    assert not Path("runs").exists()


def test_the_first_step_and_tensor_that_differ_are_named(a, verify):
    line = json.loads((a / "record.jsonl").read_text().splitlines()[3])
    record(a, 4, loss=line["loss"] * (1 + 2**-40))
    lie(a / "checkpoints" / "step-00000004", "optimizer", "stem.0.weight/exp_avg")
    code, said = verify("runs/a", "--from", "2")
    assert code == 1, said
    assert "step 4 is the first that differs: the loss (loss)" in said
    assert "equal in this step: images and lr and grad_norm" in said
    assert (
        "optimizer.safetensors: stem.0.weight/exp_avg (40, 3, 4, 4) is the first tensor that differs: 1 of"
        " 1920 numbers, by up to 0.001" in said
    )
    (kept,) = Path("runs").glob(".verify-a-*")
    assert str(kept) in said


def test_another_environment_is_not_comparable(a, verify):
    edit(a / "environment.json", lambda about: about["facts"]["versions"].update(numpy="1.0"))
    code, said = verify("runs/a", "--steps", "1")
    assert code == 78, said
    assert "versions: the run had {'numpy': '1.0'}, here it is {'numpy':" in said
    assert (
        "steps 1 to 1 have no kept checkpoint, so only their records are compared; --steps 2 would include"
        in said
    )
    assert [path.name for path in Path("runs").iterdir()] == ["a"]


@pytest.mark.slow
def test_allow_env_compares_all_the_same(a, verify):
    edit(a / "environment.json", lambda about: about["facts"].update(code="another", hardware="another"))
    for arguments in (["--from", "2"], []):
        code, said = verify("runs/a", *arguments, "--allow-env")
        assert code == 0, said
        assert (
            "comparing because of --allow-env, although the environment differs: code: the run had another"
            in said
        )
    record(a, 3, images="0" * 16)
    code, said = verify("runs/a", "--allow-env")
    assert code == 1
    assert "step 3 is the first that differs: the augmented images (images), 0000000000000000 and" in said


@pytest.mark.slow
def test_other_data_and_a_job_that_cannot_run_are_no_differences(train, verify, digits, tmp_path):
    data = tmp_path / "copy"
    shutil.copytree(digits, data)
    assert train("run=a", *STEPS, f"data.root={data}") == 0
    next((data / "train").glob("*/*")).unlink()
    for arguments in ([], ["--from", "2"]):
        code, said = verify("runs/a", *arguments)
        assert (code, "data: the run had {'train':" in said) == (78, True)
    shutil.rmtree(data)
    assert verify("runs/a")[0] == 66


@pytest.mark.slow
def test_a_run_of_many_ranks_is_trained_again_by_as_many(train, verify):
    command = ["batch=32", "microbatch=4", "workers=1", "steps=3", "evaluate_every=never", "save_every=2"]
    assert train("run=tree", "reduce=tree", *command) == 0
    code, said = verify("runs/tree", "--ranks", "2")
    assert code == 0, said
    assert "again, on 2 ranks" in said
    code, said = verify("runs/tree", "--ranks", "3")
    assert (
        code,
        "given    3 ranks for 8 microbatches a step with reduce=tree" in said,
        "elastic" in said,
    ) == (78, True, False)
    assert train("run=ddp", *command) == 0
    code, said = verify("runs/ddp", "--ranks", "2")
    assert (code, "ranks: the run had 1, here it is 2" in said) == (78, True)
    edit(
        Path("runs/ddp/environment.json"), lambda about: about["facts"].update(ranks=2)
    )  # its sums were made by one
    code, said = verify("runs/ddp")
    assert code == 1, said
    assert "again, on 2 ranks" in said
    assert "step-00000002/model.safetensors: head.fc.bias (10,) is the first tensor that differs" in said


def test_what_cannot_be_compared_is_refused_before_a_process_starts(a, verify):
    code, said = verify("runs/a", "--from", "3")
    assert code == 2
    assert "from one of these: 0, 2" in said
    assert verify("runs/a", "--from", "4")[0] == 2
    assert verify("runs/a", "--steps", "0")[0] == 2
    assert verify("runs/nothing")[0] == 66
    (a / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    code, said = verify("runs/a", "--from", "2")
    assert (code, "model.safetensors has 0 bytes" in said) == (65, True)
    entry = {"time": "2000-01-01T00:00:01+00:00", "promise": "R2", "because": "code", "from": "x", "to": "y"}
    starts = [
        {"time": f"2000-01-01T00:00:0{second}+00:00", "after_step": step} for second, step in ((0, 0), (2, 3))
    ]
    edit(a / "environment.json", lambda about: about.update(lost=[entry], starts=starts))
    code, said = verify("runs/a")
    assert code == 78
    assert "after step 3 the run continued with another code (x -> y)" in said
    edit(a / "environment.json", lambda about: about.update(lost=[]))
    (a / "config.yaml").write_text(
        (a / "config.yaml").read_text().replace("deterministic: true", "deterministic: false")
    )
    code, said = verify("runs/a")
    assert (code, "deterministic=false" in said) == (78, True)


def test_train_py_composes_exactly_a_runs_configuration_again(tmp_path):
    """Also values that no file of conf/ has: tables, numbers without an exact decimal form, null, text that
    YAML could misread.
    """
    given = [
        "model=swin_t",
        "recipe=swin",
        "data=folder",
        "data.root=/a",
        "optim.clip=null",
        "run=007",
        "optim.lr=0.1",
    ]
    cfg = compose.of_training(given)
    odd = replace(
        cfg,
        optim=replace(cfg.optim, lr=0.1 + 0.2, eps=5e-324),
        recipe=replace(cfg.recipe, drop_path={"1e3": 1 / 3}),
    )
    odd = replace(odd, data=replace(cfg.data, root="/a b/': 1e3 #"))
    for number, expected in enumerate((cfg, odd)):
        compose.write_conf(tmp_path / str(number), expected)
        assert compose.composed(tmp_path / str(number), "config", Train, []) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]  # Hydra leaves nothing


def test_checkpoints_are_compared_by_hash_and_then_by_tensor(tmp_path):
    def checkpoint(name, **tensors):
        folder = tmp_path / name
        folder.mkdir()
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "MANIFEST.json").write_text(
            json.dumps({"files": {"model.safetensors": {"sha256": sha256_of(folder / "model.safetensors")}}})
        )
        return folder

    a, b = torch.tensor([1.0, float("nan")]), torch.arange(3.0)
    one = checkpoint("one", a=a, b10=b, b9=b)
    assert first_difference.checkpoints(one, checkpoint("same", a=a, b10=b, b9=b)) is None
    assert "b9 exists only in" in first_difference.checkpoints(one, checkpoint("less", a=a, b10=b))
    assert "b9 is torch.float32 (3,) and torch.float64 (3,)" in first_difference.checkpoints(
        one, checkpoint("type", a=a, b10=b + 1, b9=b.double())
    )
    said = first_difference.checkpoints(one, checkpoint("zero", a=a, b10=b, b9=b * -1))
    assert "b9 (3,) is the first tensor that differs: 2 of 3 numbers, by up to 4" in said
    assert "b9 (3,) is the first tensor" in first_difference.checkpoints(
        one, checkpoint("sign", a=a, b10=b, b9=torch.tensor([-0.0, 1, 2]))
    )
