import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import trained
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms as tv

from reconverge.config.settings import Model
from reconverge.models import create


@pytest.fixture(scope="module")
def six_steps(digits, tmp_path_factory, cache):
    """runs/a: six steps, evaluated and saved after the third and the sixth."""
    arguments = ["run=a", "steps=6", "save_every=3", "evaluate_every=3"]
    return trained(tmp_path_factory.mktemp("six_steps"), cache, f"data.root={digits}", *arguments)


@pytest.fixture
def run(six_steps):
    """A copy of that run, which tests may damage."""
    shutil.copytree(six_steps, "runs")
    return Path("runs/a")


def report(run, data="folder", step=6, precision="fp32"):
    (path,) = run.glob(f"eval-{data}-*-{precision}-step-{step:08d}.json")
    return json.loads(path.read_text())


def independent(run, digits, kind, classes=10):
    """A reference: the official evaluation transform for each image, and counting in plain Python."""
    net = create.model(Model("convnext_atto", "atto", 0.0), classes, 1).eval()
    net.load_state_dict(load_file(sorted((run / "checkpoints").iterdir())[-1] / f"{kind}.safetensors"))
    transform = tv.Compose(
        [
            tv.Resize(32, interpolation=tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(32),
            tv.ToTensor(),
            tv.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    top1 = top5 = images = 0
    losses = []
    for label, folder in enumerate(sorted((digits / "val").iterdir())):
        for path in sorted(folder.iterdir()):
            with torch.no_grad():
                logits = net(transform(Image.open(path).convert("RGB"))[None])[0]
            ranked = logits.argsort(descending=True).tolist()
            top1 += ranked[0] == label
            top5 += label in ranked[:5]
            losses.append(float(-logits.log_softmax(0)[label]))
            images += 1
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": sum(losses) / images,
        "images": images,
    }


def test_equals_an_independent_count(run, digits, evaluate, capsys):
    assert evaluate("checkpoint=runs/a", "workers=0", "batch=7") == 0
    written = report(run)
    said = capsys.readouterr().out
    for name, kind in (("raw", "model"), ("ema", "ema")):
        expected = independent(run, digits, kind)
        assert written[name]["images"] == expected["images"] == 30
        assert written[name]["top1"] == pytest.approx(expected["top1"], abs=1e-9)
        assert written[name]["top5"] == pytest.approx(expected["top5"], abs=1e-9)
        assert written[name]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert f"{name:<4} top-1 {expected['top1']:.3f} %" in said
    assert written["raw"] != written["ema"]


def test_training_said_the_same(run, evaluate):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate("checkpoint=runs/a", "workers=1") == 0
    written = report(run)
    assert written["raw"]["top1"] == last["raw_top1"]
    assert written["ema"]["loss"] == pytest.approx(last["ema_loss"], rel=1e-6)


def test_one_checkpoint_other_data_and_the_same_data_elsewhere(run, evaluate, digits, tmp_path):
    assert evaluate("checkpoint=runs/a/checkpoints/step-00000003") == 0
    assert report(run, step=3)
    shutil.copytree(digits, tmp_path / "moved")
    assert evaluate("checkpoint=runs/a", f"data.root={tmp_path}/moved", "data.cache=there") == 0
    assert Path("there").is_dir()
    assert evaluate("checkpoint=runs/a", "data=digits") == 0
    assert report(run, "digits")["raw"]["images"] == 359


def test_settings_of_the_machine(run, evaluate, capsys):
    assert (
        evaluate("checkpoint=runs/a", "precision=bf16", "channels_last=true", "threads=1", "device=cpu") == 0
    )
    bf16 = report(run, precision="bf16")["raw"]["loss"]
    assert torch.get_num_threads() == 1
    assert evaluate("checkpoint=runs/a") == 0
    assert report(run)["raw"]["loss"] != bf16


def test_a_damaged_checkpoint_is_named(run, evaluate, capsys):
    (run / "checkpoints" / "step-00000006" / "ema.safetensors").write_bytes(b"x")
    assert evaluate("checkpoint=runs/a") == 0
    assert (
        "skipped a damaged checkpoint: step-00000006: ema.safetensors has 1 bytes" in capsys.readouterr().out
    )
    assert report(run, step=3)
    assert evaluate("checkpoint=runs/a/checkpoints/step-00000006") == 65


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "checkpoint"),
        (["checkpoint=runs/none"], 66, "neither a run nor"),
        (["checkpoint=runs/a", "data=folder"], 2, "data.root"),
        (["checkpoint=runs/a", "data.root=/nowhere"], 66, "/nowhere"),
        (
            ["checkpoint=runs/a", "data=folder", "data.root=PHOTOGRAPHS"],
            2,
            "folders that are not names of classes",
        ),
        (["checkpoint=runs/a", "data=synthetic", "data.images=20"], 78, "(1000) are not those of the model"),
        (["checkpoint=runs/a", "data.val=nonexistent"], 66, "nonexistent"),
        (["checkpoint=runs/a", "precision=int8"], 2, "fp32, tf32, bf16, fp16"),
        (["checkpoint=runs/a", "+x=1"], 2, "+x=1"),
        (["runs/a"], 2, "checkpoint=runs/a"),
        (["checkpoint=runs/a", "size=16"], 2, "change   size=32"),
    ],
)
def test_wrong_input(run, evaluate, photographs, capsys, arguments, code, said):
    capsys.readouterr()
    assert evaluate(*[argument.replace("PHOTOGRAPHS", str(photographs)) for argument in arguments]) == code
    assert said in capsys.readouterr().err


def test_a_run_without_a_checkpoint(run, evaluate, capsys):
    shutil.rmtree(run / "checkpoints")
    assert evaluate("checkpoint=runs/a") == 66
    assert "no checkpoint yet" in capsys.readouterr().err


def test_an_export_for_other_tools_is_no_checkpoint(run, evaluate, capsys):
    (run / "export-onnx").mkdir()
    (run / "export-onnx" / "export.json").write_text("{}")
    assert evaluate("checkpoint=runs/a/export-onnx") == 66
    assert "an export for other tools" in capsys.readouterr().err


def test_each_way_of_evaluating_has_a_file_of_its_own(run, evaluate):
    assert (
        evaluate("checkpoint=runs/a")
        == evaluate("checkpoint=runs/a", "size=48", "mode=squash")
        == evaluate("checkpoint=runs/a", "batch=7")
        == 0
    )
    assert sorted(json.loads(path.read_text())["evaluate"]["size"] for path in run.glob("eval-*.json")) == [
        32,
        48,
    ]


def test_every_data_setting_of_the_command_line_counts(run, evaluate, digits):
    assert evaluate("checkpoint=runs/a", "data.val=train") == 0
    assert {json.loads(path.read_text())["raw"]["images"] for path in run.glob("eval-*.json")} == {120}
    assert evaluate("checkpoint=runs/a") == 0
    plain = report_of(run, 30)
    assert evaluate("checkpoint=runs/a", "data.mean=[0,0,0]") == 0
    assert report_of(run, 30)["raw"]["loss"] != plain["raw"]["loss"]


def report_of(run, images):
    (found,) = (
        r
        for r in (json.loads(path.read_text()) for path in run.glob("eval-*.json"))
        if r["raw"]["images"] == images
    )
    return found


def test_other_data_is_normalised_as_the_runs_was(train, evaluate, digits):
    """The same images under another name of data must give the same numbers, and only validation images are
    needed.
    """
    assert train("run=b", "steps=4", "evaluate_every=0", "data.mean=[0,0,0]", "data.std=[1,1,1]") == 0
    assert evaluate("checkpoint=runs/b", "data.name=same") == 0
    shutil.copytree(digits / "val", Path("only") / "val")
    assert evaluate("checkpoint=runs/b", "data=folder", "data.root=only", "data.name=elsewhere") == 0
    run = Path("runs/b")
    assert report(run, "same", 4)["raw"] == report(run, "elsewhere", 4)["raw"]


def test_the_folder_of_checkpoints_and_a_run_named_like_one(train, evaluate):
    assert train("run=step-1", "steps=2", "evaluate_every=0") == 0
    assert evaluate("checkpoint=runs/step-1") == 0
    assert evaluate("checkpoint=runs/step-1/checkpoints") == 0


@pytest.mark.parametrize(
    "arguments",
    [["model=timm", "model.timm=test_vit", "model.image_size=32"], ["model=timm", "model.timm=test_resnet"]],
)
def test_any_model_of_timms_is_built_again_as_it_was_trained(train, evaluate, arguments):
    """One model for a fixed image size, and one with running statistics."""
    assert train("run=t", "steps=2", "evaluate_every=0", *arguments) == 0
    last = json.loads(Path("runs/t/metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate("checkpoint=runs/t") == 0
    assert report(Path("runs/t"), step=2)["ema"]["loss"] == pytest.approx(last["ema_loss"], rel=1e-6)
