"""reconverge bench: what it prints and writes, and when it stops."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reconverge.models import throughput
from reconverge.models.table import MODELS


@pytest.fixture
def bench(reconverge):
    return lambda *arguments: reconverge("bench", "model", *arguments)


def test_both_phases_by_batch(bench):
    code, said = bench(
        "model=convnext_atto", "threads=1", "--batches", "1,4", "--seconds", "0.01", "--json", "found.json"
    )
    assert code == 0, said
    found = json.loads(Path("found.json").read_text())
    assert [(row["phase"], row["batch"], row["size"]) for row in found["measured"]] == [
        ("inference", 1, 32), ("inference", 4, 32), ("training", 1, 32), ("training", 4, 32)
    ]  # fmt: skip
    for row in found["measured"]:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["ms"])
        assert 0.05 < row["peak_gb"] < 20
    assert (found["model"]["name"], found["precision"], found["threads"]) == ("convnext_atto", "fp32", 1)
    assert (found["channels_last"], found["deterministic"]) == (False, True)
    assert said.count("| training | 32 |") == 2


def test_the_published_figures_stand_beside_and_a_batch_that_does_not_fit_ends_it(bench):
    """2**40 images of noise are more than any machine's memory."""
    code, said = bench(
        "model=convnext_t",
        "recipe=in1k",
        "threads=1",
        "--batches",
        f"1,{2**40}",
        "--seconds",
        "0.01",
        "--phase",
        "inference",
    )
    assert code == 0, said
    assert f"inference: a batch of {2**40} does not fit" in said
    assert "published at 224 px: V100, images/s: 774.7" in said
    assert "published at 224 px: A100 tf32 channels_last, images/s: 1943.5" in said
    assert "fp32, images as N x C x H x W, deterministic kernels, 1 thread" in said
    assert (
        "measured here with deterministic=true precision=fp32 channels_last=false compile=false\n"
        "published for the V100 with deterministic=false precision=fp32 channels_last=false compile=false\n"
        "published for the A100 with deterministic=false precision=tf32 channels_last=true compile=false\n"
    ) in said
    arguments = ["model=convnext_t", "recipe=in1k", "threads=1", "--batches", "1", "--phase", "inference"]
    code, said = bench(*arguments, "--seconds", "0.01", "deterministic=false")
    assert code == 0, said
    assert "kernels that need not be deterministic" in said
    assert "published for the V100" not in said  # measured in the same way
    assert "published for the A100 with" in said


def test_published_figures_are_of_models_that_exist():
    for model, size in [*throughput.V100, *throughput.A100]:
        assert size in [published.size for published in MODELS[model].published]
    assert throughput.figures("convnext_iso_l", 224) == {
        "V100, images/s": 94.4,
        "training at batch 32, GB": 20.4,
    }
    # Table 12 prints how much faster ConvNeXt is than Swin.
    for pair, more in (
        (("swin_t", "convnext_t"), 47),
        (("swin_s", "convnext_s"), 49),
        (("swin_b", "convnext_b"), 46),
        (("swin_l", "convnext_l"), 40),
    ):
        swin, convnext = (throughput.A100[name, 224] for name in pair)
        assert round(100 * (convnext / swin - 1)) == more


def test_wrong_input(bench):
    assert bench("--batches", "1,x")[0] == 2
    assert bench("--batches", "0")[0] == 2
    assert bench("--seconds", "0")[0] == 2
    assert bench("model=nothing")[0] == 2
    assert bench("--phase", "sleep")[0] == 2
    assert bench("augment.size=8", "evaluate.size=32")[0] == 2


def test_a_few_large_images_count_in_the_part_that_they_slow_down(reconverge, tmp_path):
    """Two of sixteen images take nearly all of the time, in decoding; joining them takes none."""
    for label in "ab":
        folder = tmp_path / "images" / "train" / label
        folder.mkdir(parents=True)
        for number in range(8):
            side = 1500 if number == 0 else 32
            pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = ["data=folder", f"data.root={tmp_path / 'images'}", "data.val=null", "evaluate_every=never"]
    arguments += ["batch=16", "microbatch=16", "augment.auto=none", "workers=0", "--seconds", "0.1"]
    code, said = reconverge("bench", "data", *arguments)
    assert code == 0, said
    rows = [line.rsplit(None, 4)[0:2] for line in said.splitlines() if line.endswith(" ms an image")]
    parts = {name.strip(): float(milliseconds) for name, milliseconds in rows}
    assert parts["decode, crop, resize"] > 2
    assert parts["collate"] < 0.3
