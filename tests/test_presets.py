"""machine=NAME: what a preset sets, that it never touches a recipe, and what a person is told of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, weights

from reconverge.config import presets
from reconverge.config.compose import composed
from reconverge.config.listing import groups
from reconverge.config.setting import flat
from reconverge.config.settings import Train

PRESETS = sorted(path.stem for path in (ROOT / "conf/machine").iterdir())
HARDWARE = next([one.key for one in group] for title, group in groups(Train) if title == "Hardware and speed")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def values(cfg):
    return {key: value for key, value, _ in flat(cfg)}


def test_what_each_preset_composes_to(compose, golden):
    lines = []
    for name in PRESETS:
        cfg = compose(f"machine={name}")
        lines += [f"{name} {key}={values(cfg)[key]}" for key in ("machine.name", *HARDWARE)]
    golden("machine_presets.txt", "\n".join(lines))


def test_auto_is_what_the_program_does_without_a_preset(compose):
    assert values(compose("machine=auto")) == values(compose())
    neutral = values(Train())
    assert {key: values(compose())[key] for key in HARDWARE} == {key: neutral[key] for key in HARDWARE}


# A model that each recipe knows, where convnext_t is none.
MODELS = {
    "ft_in1k_384": "convnext_b", "in1k_iso": "convnext_iso_s", "in1k_roadmap": "roadmap/03_depthwise",
    "deit": "deit_s", "swin": "swin_t", "swin_in22k": "swin_t", "swin_ft_in1k_384": "swin_b_384",
    "swin_ft_in22k_in1k_224": "swin_b", "swin_ft_in22k_in1k_384": "swin_b_384",
    "ade20k_22k": "convnext_b",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "gpu_fast" else pytest.mark.slow)  # it changes the most
        for name in PRESETS
    ],
)
def test_a_preset_changes_only_the_machine_under_every_recipe(compose, name):
    for recipe in sorted(path.stem for path in (ROOT / "conf/recipe").iterdir()):
        task = "segment" if recipe in ("ade20k", "ade20k_22k", "scenes") else "classify"
        arguments = [f"task={task}", f"model={MODELS.get(recipe, 'convnext_t')}", f"recipe={recipe}"]
        plain, preset = values(compose(*arguments)), values(compose(*arguments, f"machine={name}"))
        assert {key for key in plain if plain[key] != preset[key]} <= {"machine.name", *HARDWARE}
        assert preset["machine.name"] == name


def test_the_command_line_and_a_recipe_win(compose, tmp_path):
    cfg = compose("precision=fp32", "machine=gpu_fast", "deterministic=true")
    assert (cfg.precision, cfg.deterministic, cfg.channels_last) == ("fp32", True, True)
    conf = Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))
    recipe = conf / "recipe/demo.yaml"
    recipe.write_text(recipe.read_text() + "precision: fp16\ncheckpointing: true\n")
    cfg = composed(conf, "config", Train, ["machine=gpu_fast"])
    assert (cfg.precision, cfg.checkpointing, cfg.compile) == ("fp16", True, True)
    assert composed(conf, "config", Train, ["machine=gpu_fast", "precision=tf32"]).precision == "tf32"


def test_what_a_preset_gave_and_costs_in_words(compose):
    def words(*arguments):
        return presets.in_words(compose(*arguments))

    assert words() == words("machine=auto", "deterministic=false") == ""
    assert words("machine=gpu_fast") == (
        "gpu_fast: device=cuda precision=bf16 channels_last=true compile=true deterministic=false fused=true"
        " copy_ahead=true workers=null; costs R1 and R2 (deterministic=false: other bits each time)"
    )
    assert words("machine=gpu_exact", "workers=3", "compile=true") == (
        "gpu_exact: device=cuda precision=bf16 channels_last=false deterministic=true fused=true"
        " copy_ahead=true; replaced by the recipe or the command line: compile=true workers=3;"
        " costs no promise"
    )
    assert words("machine=gpu_fast", "deterministic=true").endswith("; costs no promise")
    # Of a run whose preset has another name now, or none.
    assert words("machine.name=gone") == ""


def test_a_preset_of_ones_own_is_one_more_file(tmp_path, monkeypatch):
    conf = Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))
    mine = "# @package _global_\nmachine: {name: mine}\nprecision: bf16\nevaluate: {batch: 512}\n"
    (conf / "machine/mine.yaml").write_text(mine)
    monkeypatch.setattr(presets, "ROOT", tmp_path)
    cfg = composed(conf, "config", Train, ["machine=mine", "precision=fp32"])
    assert cfg.evaluate.batch == 512
    assert presets.in_words(cfg) == (
        "mine: evaluate.batch=512; replaced by the recipe or the command line: precision=fp32; costs no"
        " promise"
    )


def test_the_header_of_each_says_what_it_keeps(compose):
    for name in PRESETS:
        text = (ROOT / f"conf/machine/{name}.yaml").read_text()
        same_bits = "# keeps: R1, R2, R3\n" in text
        assert same_bits == compose(f"machine={name}").deterministic
        assert same_bits or "# keeps: R3; gives up R1, R2\n" in text


def test_the_cpu_trains_the_bits_of_auto_and_goes_on_with_it(train, capsys):
    """A preset is only a way to write settings: it may change when the run goes on."""
    assert train("steps=2", "run=plain", "device=cpu", "evaluate_every=never") == 0
    assert "preset" not in capsys.readouterr().out
    assert train("steps=1", "run=preset", "machine=cpu", "evaluate_every=never") == 0
    assert "\npreset       cpu: device=cpu precision=fp32 " in capsys.readouterr().out
    assert train("steps=2", "run=preset", "device=cpu", "evaluate_every=never") == 0
    assert weights("plain") == weights("preset")
    assert json.loads(Path("runs/preset/environment.json").read_text())["lost"] == []


@WITHOUT_GPU
@pytest.mark.parametrize("name", ["gpu_exact", "gpu_fast"])
def test_a_preset_for_gpus_is_refused_without_one(train, reconverge, capsys, name):
    bench = ["bench", "model", f"machine={name}", "--batches", "1", "--seconds", "0.01"]
    assert train(f"machine={name}") == 2
    said = capsys.readouterr().err
    for text in (said, reconverge(*bench)[1]):
        assert f"given    machine={name}, but torch finds no GPU" in text
        assert "change   machine=auto; for a GPU, check nvidia-smi" in text
    assert not list(Path("runs").iterdir())
    # The command line may still say otherwise.
    assert train(f"machine={name}", "device=cpu", "compile=false", "steps=1", "evaluate_every=never") == 0
    assert "replaced by the recipe or the command line: device=cpu" in capsys.readouterr().out


def test_the_plan_names_the_memory_under_a_preset(reconverge):
    def memory(*arguments):
        code, said = reconverge("plan", "model=convnext_t", "recipe=in1k", *arguments)
        assert code == 0, said
        rows = {line[:12].strip(): line[13:] for line in said.splitlines()}
        return rows["memory"], rows.get("preset")

    plain, preset = memory("precision=bf16")
    under, row = memory("machine=gpu_fast")
    assert preset is None
    assert row.startswith("gpu_fast: device=cuda precision=bf16 ")
    assert under == plain.replace("rank:", "rank with precision=bf16 of machine=gpu_fast:")
    assert " GB for each rank: weights" in memory("machine=gpu_exact", "precision=fp32")[0]


def test_a_preset_that_does_not_exist_is_refused_with_those_that_do(train, capsys):
    assert train("machine=gpu_fats") == 2
    said = capsys.readouterr().err
    assert "machine: auto, cpu, gpu_exact, gpu_fast" in said
    assert "change   machine=gpu_fast" in said
