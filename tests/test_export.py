"""Exports, loaded by their tools, are compared with our model and with an independent evaluation by timm."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from conftest import trained
from PIL import Image
from safetensors.torch import load_file

from reconverge.config.settings import Model
from reconverge.evaluation import export
from reconverge.models import create


@pytest.fixture(scope="module")
def three_epochs(digits, tmp_path_factory, cache):
    """runs/a: saved and evaluated after each of three epochs, all kept."""
    arguments = [
        "run=a",
        "epochs=3",
        "keep=3",
        "save_every=1epoch",
        "evaluate_every=1epoch",
        f"data.root={digits}",
    ]
    return trained(tmp_path_factory.mktemp("three_epochs"), cache, *arguments)


@pytest.fixture
def run(three_epochs):
    shutil.copytree(three_epochs, "runs")
    return Path("runs/a")


def net_of(run, kind="ema", step=-1):
    net = create.model(Model("convnext_atto", "atto", 0.0), 10, 1).eval()
    net.load_state_dict(load_file(sorted((run / "checkpoints").iterdir())[step] / f"{kind}.safetensors"))
    return net


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_the_timm_folder_gives_the_same_logits_labels_and_pixels(kind, run, digits, reconverge):
    code, said = reconverge("export", run, "--to", "timm", "--weights", kind, "--license", "cc0-1.0")
    assert (code, "equal bit for bit" in said) == (0, True), said
    net = timm.create_model("local-dir:runs/a/export-timm", pretrained=True).eval()
    ours = net_of(run, {"raw": "model"}.get(kind, kind))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(images), ours(images))
    assert net.pretrained_cfg["label_names"] == [str(label) for label in range(10)]
    assert net.pretrained_cfg["license"] == "cc0-1.0"
    data = timm.data.resolve_model_data_config(net)
    assert (tuple(data["input_size"]), data["crop_pct"], data["crop_mode"], data["interpolation"]) == (
        (3, 32, 32),
        1.0,
        "center",
        "bicubic",
    )
    card = (run / "export-timm" / "README.md").read_text()
    accuracy = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])[f"{kind}_top1"]
    for words in (
        "license: cc0-1.0",
        "library_name: timm",
        f"{accuracy:.2f} %",
        "train.py",
        "R1, R2, R3",
        "convnext_atto",
        "fingerprint",
    ):
        assert words in card


@torch.no_grad()
def counted_by_timm(digits):
    """timm loads the model and makes the transform; images are evaluated one by one."""
    net = timm.create_model("local-dir:runs/a/export-timm", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    files = sorted((digits / "val").rglob("*.png"))
    logits = [net(transform(Image.open(path).convert("RGB"))[None])[0] for path in files]
    truth = [net.pretrained_cfg["label_names"].index(path.parent.name) for path in files]
    right = [int(row.argmax()) == label for row, label in zip(logits, truth, strict=True)]
    losses = [float(-row.log_softmax(0)[label]) for row, label in zip(logits, truth, strict=True)]
    of_class = {
        str(name): 100 * sum(hit for hit, label in zip(right, truth, strict=True) if label == name) / 3
        for name in range(10)
    }
    return {"top1": 100 * sum(right) / len(files), "loss": float(np.mean(losses)), "per_class": of_class}


def same(found, expected):
    assert found["images"] == 30
    assert found["top1"] == pytest.approx(expected["top1"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["per_class"] == pytest.approx(expected["per_class"])


@pytest.mark.parametrize("batch", [1, 7])
def test_the_evaluator_counts_as_timm_does_image_by_image(batch, run, digits, reconverge, evaluate):
    assert reconverge("export", run, "--to", "timm")[0] == 0
    expected = counted_by_timm(digits)
    where = ["data=folder", f"data.root={digits}", "workers=0", f"batch={batch}"]
    assert evaluate("checkpoint=runs/a/export-timm", *where) == 0
    assert evaluate("checkpoint=runs/a", *where) == 0
    same(json.loads(next(Path().glob("eval-folder-*-fp32.json")).read_text())["weights"], expected)
    same(json.loads(next(run.glob("eval-folder-*.json")).read_text())["ema"], expected)


@pytest.mark.slow
def test_it_counts_the_same_on_two_and_three_ranks(run, digits, reconverge, torchrun):
    assert reconverge("export", run, "--to", "timm")[0] == 0
    expected = counted_by_timm(digits)
    for ranks, batch in ((2, 7), (3, 5)):
        where = ["data=folder", f"data.root={digits}", "workers=0", "threads=1", f"batch={batch}"]
        code, said = torchrun(ranks, "checkpoint=runs/a/export-timm", *where, script="eval.py", settings=[])
        assert code == 0, said
        (path,) = Path().glob("eval-folder-*-fp32.json")
        same(json.loads(path.read_text())["weights"], expected)
        path.unlink()


def test_the_mean_of_checkpoints_and_the_best(run, reconverge):
    code, said = reconverge("export", run, "--to", "safetensors", "--average", "3", "--weights", "raw")
    assert code == 0, said
    found = load_file(run / "export-safetensors" / "model.safetensors")
    sets = [load_file(path / "model.safetensors") for path in sorted((run / "checkpoints").iterdir())]
    assert len(sets) == 3
    for name, tensor in found.items():
        expected = sum(weights[name].double() for weights in sets) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    about = json.loads((run / "export-safetensors" / "export.json").read_text())
    assert (about["top1"], len(about["steps"])) == (None, 3)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(
        (record for record in records if "raw_top1" in record),
        key=lambda record: (record["raw_top1"], -record["step"]),
    )
    assert reconverge("export", run, "--to", "safetensors", "--best", "--weights", "raw")[0] == 0
    about = json.loads((run / "export-safetensors" / "export.json").read_text())
    assert (about["steps"], about["top1"]) == ([best["step"]], best["raw_top1"])
    code, said = reconverge("export", run, "--to", "safetensors", "--average", "4")
    assert (code, "keep=4" in said) == (66, True)


def test_the_counters_of_batch_norm_are_not_averaged():
    sets = [{"weight": torch.tensor([1.0]), "num_batches_tracked": torch.tensor(step)} for step in (1, 4)]
    assert {name: tensor.tolist() for name, tensor in export.mean(sets).items()} == {
        "weight": [1.0],
        "num_batches_tracked": 4,
    }


@torch.no_grad()
def test_torch_export_loads_in_a_process_without_us(run, reconverge):
    code, said = reconverge("export", run, "--to", "pt2")
    assert code == 0, said
    program = """
import torch
images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
torch.save(torch.export.load("runs/a/export-pt2/model.pt2").module()(images), "logits.pt")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path.cwd())
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.load("logits.pt"), net_of(run)(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of onnxscript's and torch's own making
@torch.no_grad()
def test_onnx_at_batches_of_one_and_five(run, reconverge):
    import onnx
    import onnxruntime

    code, said = reconverge("export", run, "--to", "onnx")
    assert code == 0, said
    path = run / "export-onnx" / "model.onnx"
    assert onnx.load(path).opset_import[0].version == export.OPSET
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), net_of(run)(images), rtol=1e-4, atol=1e-4)


def test_check_finds_what_was_changed(run, reconverge):
    folder = run / "export-timm"
    assert reconverge("export", run, "--to", "timm")[0] == 0
    assert reconverge("export", "--check", folder)[0] == 0
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()

    def refused(what):
        code, said = reconverge("export", "--check", folder)
        assert (code, what in said) == (65, True), said

    (folder / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    refused("model.safetensors has changed since the export")
    # The hashes in export.json are right, but the model is a different one.
    about = json.loads((folder / "export.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    tensors["stem.0.bias"] += 1
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    about["files"]["model.safetensors"] = export.sha256_of(folder / "model.safetensors")
    (folder / "export.json").write_text(json.dumps(about))
    refused("export.json has changed since the export")
    del about["sha256"]
    rest = json.dumps(about, sort_keys=True)
    (folder / "export.json").write_text(
        json.dumps(about | {"sha256": hashlib.sha256(rest.encode()).hexdigest()})
    )
    refused("logits of the example differ")
    assert config["architecture"] == "convnext_atto"
    (folder / "export.json").write_text("{")
    refused("export.json")


def test_a_number_of_an_export_is_not_changed_unseen(run, reconverge):
    assert reconverge("export", run, "--to", "safetensors")[0] == 0
    path = run / "export-safetensors" / "export.json"
    whole = json.loads(path.read_text())
    for key, value in {"top1": 99.0, "steps": [7], "mean": [0.0, 0.0, 0.0], "classes": ["a"]}.items():
        path.write_text(json.dumps(whole | {key: value}))
        code, said = reconverge("export", "--check", path.parent)
        assert (code, "export.json has changed since the export" in said) == (65, True), said
    path.write_text(json.dumps(whole))
    assert reconverge("export", "--check", path.parent)[0] == 0


def test_wrong_input(run, reconverge, tmp_path):
    for arguments, code, words in (
        (["export", run], 2, "--to timm"),
        (["export", run, "--to", "timm", "--check"], 2, "both"),
        (["export", run, "--to", "timm", "--average", "0"], 2, "1 or more"),
        (["export", run, "--to", "timm", "--average", "2", "--best"], 2, "--best"),
        (["export", tmp_path / "nothing", "--to", "timm"], 66, "neither a run nor"),
        (["export", "--check", run], 66, "no export.json"),
        (["export", run, "--to", "timm", "--out", run], 2, "files that are not an export"),
        (["export", run, "--to", "keras"], 2, "invalid choice"),
    ):
        found, said = reconverge(*arguments)
        assert (found, words in said) == (code, True), (arguments, said)
    shutil.rmtree(run / "checkpoints")
    code, said = reconverge("export", run, "--to", "timm")
    assert (code, "no checkpoint" in said) == (66, True), said


def test_a_model_that_timm_lacks(train, reconverge):
    small = [
        "model=roadmap/15_downsampling",
        "model.drop_path=0",
        "microbatch=8",
        "ema.decay=0.9",
        "recipe.name=mine",
        "augment.size=32",
    ]
    assert train("run=own", "steps=1", *small, "evaluate_every=never", "evaluate.size=32") == 0
    code, said = reconverge("export", "runs/own", "--to", "timm")
    assert (code, "which is not a model of timm" in said) == (2, True), said
    assert reconverge("export", "runs/own", "--to", "pt2")[0] == 0
