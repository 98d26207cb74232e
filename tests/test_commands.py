"""The reconverge command."""

import subprocess
import sys
from pathlib import Path

import pytest

from reconverge import commands


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["reconverge", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code, capsys.readouterr()


def test_models_prints_what_is_counted_beside_what_is_published(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "models", "convnext_t", "convnext_iso_s", "roadmap_04_width_96")
    assert code == 0
    header, t, t384, iso, step = said.out.splitlines()
    assert header.split()[:2] == ["model", "px"]
    assert t.split() == [
        "convnext_t",
        "224",
        "28.59",
        "28.6",
        "4.46",
        "4.5",
        "82.1",
        "82.9",
        "Tables",
        "1,",
        "9",
        "demo,",
        "finetune,",
        "ft_in22k_in1k_224,",
        "ft_in22k_in1k_384,",
        "in1k,",
        "in1k_roadmap,",
        "in22k",
    ]
    assert t384.split()[:8] == ["convnext_t", "384", "28.59", "28.6", "13.09", "13.1", "–", "84.1"]
    assert "demo, finetune, in1k_iso" in iso
    assert iso.endswith("the official repository says 78.7")
    assert step.split()[:7] == ["roadmap_04_width_96", "224", "33.76", "33.76", "5.27", "5.27", "80.5"]


def test_models_counts_any_of_timms(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "models", "--markdown", "resnet18", "vit_tiny_patch16_384")
    assert code == 0
    resnet, vit = said.out.splitlines()[2:]
    assert resnet.startswith(
        "| resnet18 | 224 | 11.69 | – | 1.81 | – | – | – | not in the paper |"
    )  # torchvision's: 11.69 M, 1.81 G
    assert vit.startswith("| vit_tiny_patch16_384 | 384 | 5.79 | – |")
    code, said = run(monkeypatch, capsys, "models", "resnet5")
    assert code == 2
    assert "resnet50" in said.err


def test_wrong_usage_and_help(monkeypatch, capsys):
    assert run(monkeypatch, capsys)[0] == 2
    assert run(monkeypatch, capsys, "modles")[0] == 2
    code, said = run(monkeypatch, capsys, "--help")
    assert code == 0
    assert "models" in said.out


def test_the_command_is_installed_and_helps_without_torch():
    script = Path(sys.executable).parent / "reconverge"
    assert subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout.startswith(
        "usage: reconverge"
    )
    code = (
        "import sys; from reconverge import commands; sys.argv = ['reconverge', '--help']\ntry:"
        " commands.main()\nfinally: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_batch_prints_and_draws_what_the_step_saw(train, monkeypatch, capsys, shards):
    """Against what the loader is asked for while it trains."""
    import torch

    from reconverge.data.loader import Images
    from reconverge.data.mix import Mix

    asked, mixed = [], []
    load, mix = Images.__getitem__, Mix.__call__
    monkeypatch.setattr(
        Images,
        "__getitem__",
        lambda images, microbatch: (asked.append(microbatch), load(images, microbatch))[1],
    )
    monkeypatch.setattr(Mix, "__call__", lambda self, *given: (mixed.append(mix(self, *given)), mixed[-1])[1])
    arguments = [
        "data=shards",
        f"data.root={shards}",
        "data.window=2",
        "steps=5",
        "run=a",
        "evaluate_every=never",
    ]
    assert train(*arguments) == 0
    trained, images = (
        asked[6:8],
        torch.cat([pixels for pixels, _ in mixed[6:8]]),
    )  # step 3, two microbatches a step
    capsys.readouterr()
    drawn = []
    from reconverge.report import pictures

    seen = pictures.seen
    monkeypatch.setattr(
        pictures, "seen", lambda path, pixels, *rest: (drawn.append(pixels), seen(path, pixels, *rest))[1]
    )
    code, said = run(monkeypatch, capsys, "batch", "runs/a", "--step", "3", "--show")
    assert code == 0
    printed = [line.split() for line in said.out.splitlines() if line.startswith("  sample")]
    assert [int(words[1]) for words in printed] == [
        sample for part in trained for sample in part.ids.tolist()
    ]
    assert all(f"0/augment/1/{words[1]}/0" in words for words in printed)
    assert torch.equal(drawn[0], images)
    assert Path("runs/a/batch-00000003.png").stat().st_size > 10_000
    assert (
        run(monkeypatch, capsys, "batch", "runs/a", "--step", "3", "--microbatch", "1")[1].out.count(
            "  sample"
        )
        == 8
    )
    for wrong, expected in ((["--step", "999"], 2), (["--step", "0", "--microbatch", "2"], 2)):
        assert run(monkeypatch, capsys, "batch", "runs/a", *wrong)[0] == expected
    assert run(monkeypatch, capsys, "batch", "runs/nothing", "--step", "0")[0] == 66


def test_batch_refuses_data_that_is_not_the_runs(train, monkeypatch, capsys, digits, tmp_path):
    import shutil

    shutil.copytree(digits, tmp_path / "copy")
    assert train("steps=1", "run=a", "evaluate_every=never", f"data.root={tmp_path / 'copy'}") == 0
    next((tmp_path / "copy" / "train").glob("*/*")).unlink()
    code, said = run(monkeypatch, capsys, "batch", "runs/a", "--step", "0")
    assert (code, "not the data" in said.err) == (78, True)


def test_bench_data_measures_each_part(monkeypatch, capsys, shards):
    arguments = [
        "model=convnext_t",
        "recipe=in1k",
        "data=shards",
        f"data.root={shards}",
        "batch=16",
        "microbatch=8",
    ]
    code, said = run(
        monkeypatch, capsys, "bench", "data", *arguments, "--seconds", "0.5", "--gpu", "100", "workers=1"
    )
    assert code == 0, said.err
    for part in (
        "read and verify",
        "decode, crop, resize",
        "flip and RandAugment",
        "collate",
        "1 worker:",
        "(p50)",
        "(p99)",
        "GPUs that train 100",
    ):
        assert part in said.out
    parts = [
        float(line.split(" ms")[0].split()[-1])
        for line in said.out.splitlines()
        if line.endswith("ms an image")
    ]
    together = next(
        float(line.split(" ms:")[0].split()[-1]) for line in said.out.splitlines() if "together" in line
    )
    assert len(parts) == 4
    speed = next(
        float(line.split(" images/s")[0].split()[-1]) for line in said.out.splitlines() if "together" in line
    )
    assert speed == pytest.approx(1000 / together, rel=0.01, abs=1)
    assert sum(parts) == pytest.approx(together, abs=0.01)
    assert run(monkeypatch, capsys, "bench", "data", "epohcs=3")[0] == 2
    assert run(monkeypatch, capsys, "bench", "data", "--seconds", "0")[0] == 2
