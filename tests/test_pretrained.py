"""What init= names: files, folders, downloads; and that nothing of a foreign file is run."""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision

from reconverge.base import imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.weights import read


def tensors(value=1.0):
    return {"a.weight": torch.full((2, 3), value), "a.bias": torch.zeros(2)}


def stopped(init):
    with pytest.raises(Stop) as caught:
        read.read(init)
    return caught.value.code, str(caught.value)


def official(path, **other):
    """A training checkpoint as the official code writes it: two sets of weights, optimizer, options."""
    options = argparse.Namespace(
        model="convnext_tiny",
        lr=4e-3,
        drop_path=0.1,
        aa="rand-m9-mstd0.5-inc1",
        output_dir=None,
        nb_classes=1000,
    )
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 4e-3, "betas": (0.9, 0.999), "params": [0]}],
    }
    torch.save(
        {"optimizer": optimizer, "epoch": 299, "scaler": {"scale": 65536.0}, "args": options, **other}, path
    )


# ---- files ----


def test_an_official_training_checkpoint_gives_its_raw_weights_and_by_name_its_ema():
    official("c.pth", model=tensors(1.0), model_ema=tensors(2.0))
    for init, value in (("c.pth", 1.0), ("c.pth:raw", 1.0), ("c.pth:ema", 2.0)):
        found = read.read(init)
        assert found.tensors.keys() == tensors().keys()
        assert (found.tensors["a.weight"] == value).all()
        assert found.classes is None
    import hashlib

    assert found.origin["sha256"] == hashlib.sha256(Path("c.pth").read_bytes()).hexdigest()
    assert found.origin["path"] == str(Path("c.pth").absolute())


def test_which_set_is_meant_is_never_guessed():
    official("ema.pth", model_ema=tensors())
    code, said = stopped("ema.pth")
    assert (code, "change   init=ema.pth:ema" in said) == (Exit.USAGE, True)
    official("raw.pth", model=tensors())
    code, said = stopped("raw.pth:ema")
    assert (code, "change   init=raw.pth\n" in said + "\n") == (Exit.USAGE, True)
    torch.save({"model": tensors(), "state_dict": tensors(2.0)}, "both.pth")
    assert stopped("both.pth")[0] == Exit.USAGE
    safetensors.torch.save_file(tensors(), "one.safetensors")
    assert stopped("one.safetensors:ema")[0] == Exit.USAGE
    shutil.copy("one.safetensors", "one.safetensors:ema")
    assert "or the ema weights of one.safetensors" in stopped("one.safetensors:ema")[1]
    assert stopped("timm:test_vit:ema")[0] == Exit.USAGE


def test_plain_files_of_tensors():
    safetensors.torch.save_file(tensors(3.0), "w.safetensors")
    torch.save(tensors(3.0), "w.pt")
    torch.save(tensors(3.0), "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": tensors(3.0), "meta": {"epoch": 3}}, "timm.pth")
    for name in ("w.safetensors", "w.pt", "old.pth", "timm.pth", str(Path("w.pt").absolute())):
        assert torch.equal(read.read(name).tensors["a.weight"], tensors(3.0)["a.weight"])


@pytest.mark.parametrize(
    ("init", "code", "says"),
    [
        ("nowhere.pth", 66, "no such file"),
        ("runs/none", 66, "no such file"),
        ("mine", 66, "init=runs/mine"),
        (".", 66, "without checkpoints/ and config.json"),
        ("runs/mine", 66, "no checkpoint yet"),
        ("notes.txt", 2, ".safetensors, .pth or .pt"),
        ("numbers.pth", 2, "the keys of this file are epoch, lr"),
        ("list.pth", 2, "the keys of this file are"),
        ("timm:convnext_tny", 2, "timm:convnext_tiny"),
        ("timm:convnext_tiny.fb_in99k", 2, "timm:convnext_tiny.fb_in"),
        ("hf-hub:convnext", 2, "OWNER/NAME"),
        ("torchvision:convnext_tny", 2, "init=torchvision:convnext_tiny"),
        ("torchvision:ResNet50_Weights.V9", 2, "full name"),
        (
            "torchvision:resnet50",
            2,
            "torchvision:ResNet50_Weights.IMAGENET1K_V1, torchvision:ResNet50_Weights.IMAGENET1K_V2",
        ),
    ],
)
def test_what_cannot_be_read_is_named(init, code, says):
    Path("runs/mine/checkpoints").mkdir(parents=True)
    Path("notes.txt").write_text("x")
    torch.save({"epoch": 3, "lr": 0.1}, "numbers.pth")
    torch.save([1, 2], "list.pth")
    found, said = stopped(init)
    assert (found, says in said) == (code, True), said


# ---- safety ----


class Malicious:
    """Unpickled, it makes the file `pwned`."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def write_malicious(path, how):
    if how == "plain pickle":
        Path(path).write_bytes(pickle.dumps(Malicious(), protocol=2))
    else:
        content = (
            {"model": tensors(), "args": argparse.Namespace(hook=Malicious())}
            if how == "in Namespace"
            else {"model": Malicious()}
        )
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "in Namespace"])
@pytest.mark.parametrize("path", ["evil.pth", "evil.pt", "evil.safetensors", "folder/pytorch_model.bin"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(path, how):
    Path("folder").mkdir()
    Path("folder/config.json").write_text(json.dumps({"architecture": "convnext_tiny"}))
    write_malicious(path, how)
    code, said = stopped("folder" if path.startswith("folder") else path)
    assert code == Exit.DAMAGED
    assert not Path("pwned").exists()
    if how != "plain pickle" and not path.endswith(".safetensors"):
        assert "posix.mkdir, which could run code" in said
        assert "save the weights alone: torch.save(model.state_dict(), FILE)" in said
    assert "weights_only" not in said  # torch's own message tells how to run it
    if how == "plain pickle":
        pickle.loads(Path(path).read_bytes())
    else:
        torch.load(shutil.copy(path, "evil"), weights_only=False)
    assert Path("pwned").exists()  # it was armed


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_file_is_refused(name):
    whole = {"a": torch.zeros(1000)}
    (safetensors.torch.save_file if name.endswith("s") else torch.save)(whole, name)
    data = Path(name).read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], data[:5], b"", b"\xff" * 8 + data[8:]):
        if damaged == b"\xff" * 8 + data[8:] and name == "w.pth":
            continue  # a zip file is read from its end
        Path(name).write_bytes(damaged)
        assert stopped(name)[0] == Exit.DAMAGED


def test_what_may_not_be_read_is_told_apart_from_damage(monkeypatch):
    torch.save(tensors(), "w.pth")

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied", "w.pth")

    monkeypatch.setattr(torch, "load", refuse)  # root may read everything
    with pytest.raises(PermissionError):
        read.read("w.pth")


# ---- folders of timm, and downloads from the caches that the libraries keep ----


def timm_folder(path, name, safe, **config):
    net = timm.create_model(name, num_classes=4)
    timm.models.save_for_hf(net, path, model_config=config, safe_serialization=safe)
    return net.state_dict()


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_timm(safe):
    saved = timm_folder("folder", "test_convnext", safe, label_names=["n1", "n2", "n3", "n4"])
    assert Path("folder/pytorch_model.bin").exists() != safe
    found = read.read("folder")
    assert found.tensors.keys() == saved.keys()
    assert all(torch.equal(found.tensors[name], saved[name]) for name in saved)
    assert found.classes == ["n1", "n2", "n3", "n4"]
    assert found.origin["architecture"] == "test_convnext"
    Path("folder/checkpoints").mkdir()
    assert "the folder of a run, or a timm folder" in stopped("folder")[1]
    os.rmdir("folder/checkpoints")
    Path("folder/config.json").write_text("{}")
    assert stopped("folder")[0] == Exit.DAMAGED


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub, repository, name, **config):
    """Put a timm folder where the hub's library keeps a download."""
    snapshot = hub / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    net = timm.create_model(name)
    timm.models.save_for_hf(net, snapshot, model_config=config, safe_serialization=True)
    return net.state_dict()


def test_hub_names_download_through_timm(hub):
    saved = cached(hub, "owner/mine", "test_convnext", label_names=[f"c{row}" for row in range(1000)])
    found = read.read("hf-hub:owner/mine")
    assert all(torch.equal(found.tensors[name], saved[name]) for name in saved)
    assert found.classes[:2] == ["c0", "c1"]
    assert found.origin["architecture"].startswith("test_convnext")


def test_timm_names_download_through_timm(hub):
    saved = cached(hub, "timm/test_convnext.r160_in1k", "test_convnext")
    state = torch.random.get_rng_state()
    for name in ("timm:test_convnext", "timm:test_convnext.r160_in1k"):
        found = read.read(name)
        assert all(torch.equal(found.tensors[name], saved[name]) for name in saved)
        assert found.origin["architecture"] == "test_convnext.r160_in1k"  # the tag is on record, given or not
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("init", ["timm:convnext_tiny.fb_in22k", "hf-hub:owner/none"])
def test_a_download_without_a_network(init, hub):
    code, said = stopped(init)
    assert (code, "name the file or folder" in said) == (Exit.MISSING, True)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_torchvision_downloads_or_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    code, said = stopped("torchvision:squeezenet1_1")
    assert (code, "name the file or folder" in said) == (Exit.MISSING, True)
    (tmp_path / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    saved = torchvision.models.squeezenet1_1().state_dict()
    torch.save(saved, tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    for init in ("torchvision:squeezenet1_1", "torchvision:SqueezeNet1_1_Weights.IMAGENET1K_V1"):
        found = read.read(init)
        assert all(torch.equal(found.tensors[name], saved[name]) for name in saved)
    write_malicious(tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth", "zip")
    assert stopped("torchvision:squeezenet1_1")[0] == Exit.DAMAGED
    assert not Path("pwned").exists()


def test_class_lists_are_the_published_ones():
    """Trap 15 of the published code: the 21841 synsets have all of IN-1K's but n04399382, its class 850."""
    large, small = imagenet.of_head(21841), imagenet.of_head(1000)
    assert (len(large), len(small)) == (21841, 1000)
    assert large == sorted(large)
    assert small == sorted(small)
    assert small[0] == "n01440764"
    assert set(small) - set(large) == {"n04399382"}
    assert small.index("n04399382") == 850
    assert imagenet.of_head(10) is None
