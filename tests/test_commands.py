"""The reconverge command."""

import subprocess
import sys
from pathlib import Path

import pytest

from reconverge import commands
from reconverge.commands.models import HEADER


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["reconverge", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code, capsys.readouterr()


def test_models_prints_what_is_counted_beside_what_is_published(monkeypatch, capsys):
    names = ["convnext_t", "convnext_iso_s", "roadmap/04_width_96", "roadmap_04_width_96"]
    code, said = run(monkeypatch, capsys, "models", *names)
    assert code == 0
    header, t, t384, iso, step, again = said.out.splitlines()
    assert step == again  # by what follows model=, or by model.name
    assert header.split()[:2] == ["model=", "px"]
    assert len(set(HEADER)) == len(HEADER)
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
        "finetune,",
        "ft_in22k_in1k_224,",
        "in1k,",
        "in1k_roadmap,",
        "in22k",
    ]  # recipes at 224 px
    assert t384.split()[:8] == ["convnext_t", "384", "28.59", "28.6", "13.09", "13.1", "–", "84.1"]
    assert t384.split()[-1] == "ft_in22k_in1k_384"
    assert "finetune, in1k_iso" in iso
    assert iso.endswith("the official repository says top-1 78.7")
    assert step.split()[:7] == ["roadmap/04_width_96", "224", "33.76", "33.76", "5.27", "5.27", "80.5"]


def test_models_counts_any_of_timms(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "models", "--markdown", "resnet18", "vit_tiny_patch16_384")
    assert code == 0
    assert said.out.startswith("# Models\n")
    assert all(f"\n| {name} | " in said.out for name in HEADER[1:])  # the legend explains every column
    resnet, vit = said.out.splitlines()[-2:]
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


def clock_of(run):
    from reconverge.run import reader
    from reconverge.training import datasets

    return datasets.opened(reader.opened(Path(run)).cfg).clock


def test_batch_prints_and_draws_what_the_step_saw(train, monkeypatch, capsys, shards):
    """Compared with the microbatches that the loader loads in training."""
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
    code, said = run(monkeypatch, capsys, "batch", "runs/a", "--step", "4", "--show")  # the log's step 4
    assert code == 0
    assert said.out.startswith("step 4, epoch 1, microbatch 0 of 2; mixing key 0/mix/3/0\n")
    printed = [line.split() for line in said.out.splitlines() if line.startswith("  sample")]
    assert [int(words[1]) for words in printed] == [
        sample for part in trained for sample in part.ids.tolist()
    ]
    assert all(f"0/augment/1/{words[1]}/0" in words for words in printed)
    assert torch.equal(drawn[0], images)
    assert Path("runs/a/batch-00000004.png").stat().st_size > 10_000
    one = run(monkeypatch, capsys, "batch", "runs/a", "--step", "4", "--microbatch", "1")[1].out
    assert one.count("  sample") == 8
    total = clock_of("runs/a").total
    assert run(monkeypatch, capsys, "batch", "runs/a", "--step", str(total))[0] == 0  # the last step
    for wrong, change in (
        (["--step", "0"], "--step 1"),
        (["--step", str(total + 1)], f"--step {total}"),
        (["--step", "1", "--microbatch", "2"], "--microbatch 1"),
    ):
        code, said = run(monkeypatch, capsys, "batch", "runs/a", *wrong)
        assert (code, said.err.splitlines()[-1]) == (2, f"  change   {change}")
    assert "counted from 1" in run(monkeypatch, capsys, "batch", "runs/a", "--step", "0")[1].err
    assert run(monkeypatch, capsys, "batch", "runs/nothing", "--step", "1")[0] == 66


def test_batch_refuses_data_that_is_not_the_runs(train, monkeypatch, capsys, digits, tmp_path):
    import shutil

    shutil.copytree(digits, tmp_path / "copy")
    assert train("steps=1", "run=a", "evaluate_every=never", f"data.root={tmp_path / 'copy'}") == 0
    next((tmp_path / "copy" / "train").glob("*/*")).unlink()
    code, said = run(monkeypatch, capsys, "batch", "runs/a", "--step", "1")
    assert (code, "are not those that runs/a was trained on" in said.err) == (78, True)


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
        "(median)",
        "(99th percentile)",
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
