"""The command line: what is refused, with which message, and how fast."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT

import reconverge
from reconverge.base.errors import Stop
from reconverge.config import foreign
from reconverge.config.compose import composed, from_text, to_text
from reconverge.config.setting import flat
from reconverge.config.settings import Eval, Train
from reconverge.training.clock import Clock

# what is typed, the line "given", something of "allowed", something of "change"
REFUSED = [
    (["epohcs=30"], "epohcs", "python train.py --help lists", "epochs=30"),
    (["optim.lrr=1"], "optim.lrr", "lr, lr_batch, min_lr", "optim.lr"),
    (["optm.lr=1"], "optm", "python train.py --help lists", "optim.lr=1"),
    (["model.size.x=1"], "model.size", "str", "model.size"),
    (["+epochs=3"], "+epochs=3", "none can be added", "epochs=3"),
    (["++new=3"], "++new=3", "none can be added", "python train.py --help lists the settings"),
    (["+foo=1"], "+foo=1", "none can be added", "python train.py --help lists the settings"),
    (["~model"], "~model", "none can be added or removed", "model"),
    (["hydra.run.dir=x"], "hydra.run.dir=x", "run=NAME", "drop it"),
    (["--typo"], "--typo", "--cfg", "--help"),
    (["-m", "seed=1,2", "--cfg"], "-m with --cfg", "key=value,value", "-m without --cfg"),
    (["-m", "model=glob(*)"], "-m with model=glob(*)", "key=value,value", "-m without"),
    (["-m", "seed=1,2", "optim.lr=1e-3,fast"], "optim.lr", "float", "optim.lr="),
    (["-m", "seed=1,1"], "for seed=1 and for seed=1", "a run folder for each", "each value once"),
    (["seed=1,2"], "seed=1,2", "", ""),
    (["model=convnext_q"], "model=convnext_q", "convnext_atto, convnext_b", "model=convnext_"),
    (["model=roadmap/07_kernel_57"], "model=roadmap/07_kernel_57",
        "roadmap/00_resnet50, roadmap/01_stage_ratio", "model=roadmap/07_kernel_5"),
    (["model/roadmap=00_resnet50"], "model/roadmap=00_resnet50", "model=FOLDER/NAME",
        "model=roadmap/00_resnet50"),
    (["model=timm"], "model.timm=", "name of the timm model", "model.timm"),
    (["model=timm", "model.timm=a/b", "run=a"], "model.timm=a/b", "name of the timm model", "model.timm"),
    (["model=deit_s", "recipe=in1k"], "size deit_s) with recipe=in1k", "atto, t, s, b, l",
        "model.drop_path="),
    (["model=swin_b_384", "model.drop_path=0", "microbatch=2"], "augment.size=32 with model=swin_b_384",
        "the size that it is built for", "augment.size=384 evaluate.size=384"),
    (["model=vit_s", "model.drop_path=0", "microbatch=2", "evaluate.size=48"],
        "evaluate.size=48 with model=vit_s", "the size that it is built for", "augment.size=32"),
    (["data=imagnet"], "data=imagnet",
        "ade20k, digits, eval/a, eval/c, eval/c_bar, eval/imagenet1k, eval/r, eval/real, eval/sketch,"
        " eval/v2, folder, imagenet1k, imagenet22k, maps, scenes, shards, synthetic", "data=imagenet"),
    (["recipe=in2k"], "recipe=in2k", "ft_in1k_384, ft_in22k_in1k_224, ft_in22k_in1k_384, in1k, in1k_iso",
        "recipe=in"),
    (["tracker=wandbb"], "tracker=wandbb", "none, tensorboard, wandb", "tracker=wandb"),
    (["epochs=many"], "epochs", "int", "epochs="),
    (["optim.lr=fast"], "optim.lr", "float", "optim.lr="),
    (["compile=perhaps"], "compile", "bool", "compile="),
    (["recipe.drop_path={t: x}"], "recipe.drop_path", "float", "recipe.drop_path"),
    (["epochs=0"], "epochs=0", "at least 1", "epochs=1"),
    (["augment.flip=1.5"], "augment.flip=1.5", "at most 1", "augment.flip=1"),
    (["optim.lr=nan"], "optim.lr=nan", "finite numbers", "another optim.lr"),
    (["precision=fp8"], "precision=fp8", "fp32, tf32, bf16, fp16", "precision=fp"),
    (["save_every=often"], "save_every=often", "epochs as in 2epoch", "save_every"),
    (["augment.auto=rand-z9"], "augment.auto=rand-z9", "RandAugment", "augment.auto"),
    (["model=null"], "Got NoneType", "name of a file", "recipe=demo"),
    (["recipe=3"], "Got int", "name of a file", "recipe=demo"),
    (["resume_allow=[optm.lr]"], "resume_allow=optm.lr", "a setting, or code", "resume_allow=[optim.lr]"),
    ([""], "", "", ""),
    (["--verbose"], "--verbose", "--cfg", "--help"),
    (["augment.auto=autoaugment"], "augment.auto=autoaugment", "RandAugment", "augment.auto"),
    (["run=../elsewhere"], "run=../elsewhere", "runs/", "run"),
    (["run=.."], "run=..", "runs/", "run"),
    (["data=folder"], "data=folder without data.root", "train/ and val/", "data.root=/path"),
    (["model=convnext_xl", "recipe=in1k"], "size xl) with recipe=in1k", "atto, t, s, b, l",
        "model.drop_path="),
    (["microbatch=7"], "microbatch=7 with batch=128", "2, 4, 8, 16, 32, 64, 128", "microbatch=8"),
    (["microbatch=48"], "microbatch=48 with batch=128", "even numbers", "microbatch=32"),
    (["batch=127"], "batch=127", "even", "batch=128"),
    (["epochs=3"], "warmup_epochs=3 with epochs=3", "shorter than the schedule", "optim.warmup_epochs="),
    (["augment.scale=[0.5,0.2]"], "augment.scale", "smallest, largest", "augment.scale="),
    (["augment.ratio=[1]"], "augment.ratio", "smallest, largest", "augment.ratio="),
    (["optim.betas=[0.9,1.0]"], "optim.betas", "two numbers", "optim.betas="),
    (["data.std=[0.2,0.2,0]"], "data.std", "three numbers", "data.std="),
    (["precision=tf32", "device=cpu"], "precision=tf32", "fp32, bf16, fp16", "precision=fp32"),
    (["data.val=null"], "data.val=null with evaluate_every=", "never", "evaluate_every=never"),
    (["recipe.dataset=imagenet2k"], "recipe.dataset=imagenet2k", "imagenet1k, imagenet22k",
        "recipe.dataset=imagenet"),
    (["evaluate_every=seldom"], "evaluate_every=seldom", "never: not at all", "evaluate_every"),
    (["data.kind=trained"], "data.kind=trained", "eval.py", "data=digits"),
]  # fmt: skip


# What a user of other frameworks types -> what the line "change" says, from its beginning.
MEANT = [
    ("lr=1e-3", "optim.lr=1e-3"),
    ("warmup_lr=1", "optim.warmup_lr=1"),
    ("size=64", "augment.size=64 evaluate.size=64"),
    ("freeze=backbone", "optim.layer_decay=0.5, say: no layer can be frozen"),
    ("loss=bce", "nothing: the loss is cross-entropy"),
    ("num_classes=5", "leave it out: the number of classes comes from the data"),
    ("model.num_classes=5", "leave it out: the number of classes comes from the data"),
    ("optim.name=sgd", "nothing: AdamW is the only optimizer"),
    ("optim=sgd", "nothing: AdamW is the only optimizer"),
    ("mix=0", "mix.SETTING=0"),
    ("optim.schedule=cosine", "leave it out: each of them is a linear warm-up and a cosine decay"),
    ("hydra/launcher=joblib", "drop it"),
    ("grad_accum=4", "batch= and microbatch=: a step accumulates batch / microbatch gradients"),
    ("pretrained=true", "init=timm:NAME"),
    ("resume=runs/a", "the same command again"),
    ("num_epochs=3", "epochs=3"),
    ("batch-size=64", "batch=64"),
    ("gpus=4", "launch/local.sh --ranks N"),
    ("fp16=true", "precision=bf16 or precision=fp16"),
    ("precision=16", "precision=fp16 or precision=bf16"),
    ("lr_scheduler=step", "optim.warmup_epochs="),
    ("img_size=96", "augment.size=96 evaluate.size=96"),
    ("no_aug=true", "augment.auto=none"),
    ("augment.auto=None", "augment.auto=none"),
    ("augment.auto=null", "augment.auto=none"),
    ("evaluate_every=none", "evaluate_every=never"),
    ("device=gpu", "device=cuda"),
    ("model=resnet18", "model=timm model.timm=resnet18, if timm has"),
    ("model=convnext_tiny", "model=convnext_t; or model=timm model.timm=convnext_tiny"),
    ("data=/data/flowers", "data=folder data.root=/data/flowers"),
    ("data=cifar10", "data=folder data.root=/path"),
    ("optim.betas=[0.9", "optim.betas= in one of these forms"),
    ("seed=1,2", "-m seed=1,2 for a run with each"),
    ("recipe=cifar", "recipe= with one of these"),
    ("augment.foo=2", "python train.py --help lists the settings"),
    ("foo=1", "python train.py --help lists the settings"),
    ("--lr=3", "optim.lr=3"),
    ("--epochs=3", "epochs=3"),
    ("--hlep", "--help"),
]  # fmt: skip


@pytest.fixture
def run_main(monkeypatch, capsys):
    from conftest import _main

    def run(*arguments, script="train"):
        code = _main(script, arguments, monkeypatch)
        return code, capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "given", "allowed", "change"),
    REFUSED,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_in_three_lines(run_main, arguments, given, allowed, change):
    code, said = run_main(*arguments)
    assert code == 2
    first, *lines = said.err.splitlines()
    assert first == "reconverge stopped (exit 2):"
    assert len(lines) == 3
    for line, name, part in zip(lines, ("given", "allowed", "change"), (given, allowed, change), strict=True):
        assert line.startswith(f"  {name}")
        assert part in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(("typed", "meant"), MEANT, ids=[typed for typed, _ in MEANT])
def test_a_suggestion_is_what_is_meant_or_none(run_main, typed, meant):
    code, said = run_main(typed)
    assert code == 2
    assert said.err.splitlines()[-1].removeprefix("  change   ").startswith(meant)


def test_eval_suggests_its_own_settings(run_main):
    for typed, meant in (
        ("model=convnext_t", "checkpoint=runs/NAME"),
        ("chekpoint=runs/a", "checkpoint=runs/a"),
        ("--batch-size=8", "batch=8"),
        ("foo=1", "python eval.py --help lists the settings"),
    ):
        code, said = run_main(typed, script="eval")
        assert code == 2
        assert said.err.splitlines()[-1].removeprefix("  change   ").startswith(meant)


def test_no_word_of_others_hides_a_setting_and_each_advice_names_settings_that_exist():
    """Whoever follows the advice must not be refused again."""
    keys = {key for key, *_ in flat(Train())} | {key for key, *_ in flat(Eval())}
    for words in (foreign.WORDS, foreign.EVAL_WORDS):
        listed = [word for key in words for word in key.split()]
        assert len(listed) == len(set(listed))
        for text in [*words.values(), *foreign.VALUES.values()]:
            for key in re.findall(r"([a-z_.]+)=", text):
                assert key in keys | {"key", "model", "data", "machine", "tracker"}, text
    assert not {word for key in foreign.WORDS for word in key.split()} & {key for key, *_ in flat(Train())}
    assert not {word for key in foreign.EVAL_WORDS for word in key.split()} & {
        key for key, *_ in flat(Eval())
    }


def test_a_long_list_of_files_is_shortened_by_its_folders(run_main):
    allowed = run_main("model=nosuch")[1].err.splitlines()[2]
    assert "roadmap/NAME" in allowed
    assert "roadmap/00" not in allowed
    allowed = run_main("model=roadmap/nosuch")[1].err.splitlines()[2]
    assert "roadmap/00_resnet50" in allowed
    assert "convnext_t" not in allowed


def test_what_is_allowed_after_a_bad_flag_names_every_flag(run_main):
    allowed = run_main("--typo")[1].err.splitlines()[2]
    for flag in ("--help", "--cfg", "--check", "-m", "--version"):
        assert f" {flag}" in allowed
    assert "--check" not in run_main("--typo", script="eval")[1].err


def test_the_default_name_of_a_run_tells_class_folders_apart(compose, tmp_path):
    def name(*arguments):
        return compose(*arguments).run

    assert name() == "convnext_atto-demo-digits-s0"
    assert (
        name("data=folder", "data.root=/x/flowers", "recipe=finetune") == "convnext_atto-finetune-flowers-s0"
    )
    assert name("data=shards", "data.root=birds/", "seed=2") == "convnext_atto-demo-birds-s2"
    assert name("data=folder", "data.root='/x/my birds (2)'", "debug=short").endswith("-my-birds-2-s0-short")
    assert name("data=folder", "data.root=.").endswith(f"-{tmp_path.name}-s0")  # the working folder
    assert name("data=folder", "data.root=/") == "convnext_atto-demo-folder-s0"
    assert name("data=imagenet1k", "data.root=/x/y") == "convnext_atto-demo-imagenet1k-s0"
    assert name("data=folder", "data.root=/x/y", "debug=synthetic") == "convnext_atto-demo-synthetic-s0"
    assert name("data=folder", "data.root=/x/y", "run=a") == "a"


def test_a_batch_larger_than_the_data_is_refused_when_the_index_is_known(train, capsys):
    assert train("batch=512") == 2
    said = capsys.readouterr().err
    assert "batch=512, but there are only 120 training images" in said
    assert "batch=120" in said


WITHOUT_TORCH = """
import runpy, sys
sys.argv = {argv!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    code = ended.code
heavy = ("torch", "timm", "torchvision", "torchmetrics", "matplotlib", "sklearn", "wandb")
heavy = [name for name in heavy if name in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""


def process(*argv, script="train.py"):
    code = WITHOUT_TORCH.format(argv=[str(ROOT / script), *argv])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("argv", [["epohcs=1"], ["microbatch=7"], ["model=convnext_xl", "recipe=in1k"]])
def test_a_refusal_does_not_wait_for_torch(argv):
    done = process(*argv)
    assert done.returncode == 2
    assert "given" in done.stderr


def test_help_shows_groups_choices_and_examples():
    done = process("--help")
    assert done.returncode == 0, done.stderr
    for part in (
        "model: convnext_atto, convnext_b",
        "model/roadmap: 00_resnet50, 01_stage_ratio",
        "deit_b, deit_s",
        "recipe: ade20k, ade20k_22k, deit, demo, finetune",
        "data: ade20k, digits, folder",
        "task: classify, segment",
        "machine: auto, cpu, gpu_exact, gpu_fast",
        "tracker: none, tensorboard, wandb",
        "debug: overfit, profile, short, synthetic",
    ):
        assert part in done.stdout
    assert done.stdout.count("python train.py") - done.stdout.count("python train.py -sc") - 1 == 9
    for part in (
        "== The network: model.* ==",
        "== The machine preset: machine.* ==",
        "model.drop_path=0 ",  # the value of this command, and below what it means
        "stochastic depth (drop path)",
        "optim.lr=0.003 ",
        "(Table 5)",
        "augment.scale=[0.8,1]",
    ):
        assert part in done.stdout
    listed = set(re.findall(r"^([a-z_]+(?:\.[a-z_]+)?)=", done.stdout, re.M))
    assert listed >= {key for key, *_ in flat(Train())}
    assert "optim.lr=0.004 " in process("--help", "model=convnext_t", "recipe=in1k").stdout
    said = process("--help", script="eval.py").stdout
    assert all(
        word in said
        for word in ("runs/NAME", "size=", *(path.stem for path in (ROOT / "conf/data/eval").iterdir()))
    )


def test_version_names_the_libraries():
    script = Path(sys.executable).parent / "reconverge"
    for said in (
        process("--version").stdout,
        process("--version", script="eval.py").stdout,
        subprocess.run([script, "--version"], capture_output=True, text=True).stdout,
    ):
        assert " ".join(said.split()).startswith(f"reconverge {reconverge.__version__} (python 3.")
        assert f"torch {metadata.version('torch')}" in " ".join(said.split())


def test_cfg_job_prints_what_would_run(compose):
    done = process("--cfg", "job", "--resolve", "model=convnext_t", "recipe=in1k")
    assert done.returncode == 0, done.stderr
    assert from_text(done.stdout, Train) == compose("model=convnext_t", "recipe=in1k")
    assert "drop_path: 0.1\n" in done.stdout
    assert "microbatch: 128\n" in done.stdout
    assert not Path("runs").exists()


def test_shell_completion(monkeypatch):
    assert "complete" in process("-sc", "install=bash").stdout
    monkeypatch.setenv("COMP_LINE", "train.py recipe=")
    assert process("-sc", "query=bash").stdout.split()[2:5] == [
        "recipe=deit",
        "recipe=demo",
        "recipe=finetune",
    ]


def test_a_typo_in_a_recipe_file_is_named(tmp_path, monkeypatch, capsys):
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "recipe" / "mine.yaml").write_text("# @package _global_\nepohcs: 30\n")
    from hydra.core.global_hydra import GlobalHydra

    with pytest.raises(Stop, match="epohcs"):
        composed(conf, "config", Train, ["recipe=mine"])
    GlobalHydra.instance().clear()


def test_a_step_of_the_roadmap_is_a_model_by_its_folder(compose):
    cfg = compose("model=roadmap/04_width_96", "recipe=in1k")
    assert (cfg.run, cfg.model.name, cfg.model.size) == (
        "roadmap_04_width_96-in1k-digits-s0",
        "roadmap_04_width_96",
        "t",
    )
    assert (cfg.model.layer_scale, cfg.model.drop_path, cfg.microbatch) == (None, 0.1, 128)
    cfg = compose("model=roadmap/b_15_downsampling", "recipe=in1k")
    assert (cfg.run, cfg.model.size, cfg.model.layer_scale) == (
        "roadmap_b_15_downsampling-in1k-digits-s0",
        "b",
        1e-6,
    )


def test_models_of_one_size_take_that_of_the_images_and_any_of_timms_its_name(compose):
    assert (
        compose(
            "model=swin_t", "model.drop_path=0.2", "microbatch=8", "augment.size=64", "evaluate.size=64"
        ).model.image_size
        == 64
    )
    cfg = compose("model=timm", "model.timm=resnet18.a1_in1k")
    assert (cfg.run, cfg.model.name, cfg.model.timm, cfg.model.size) == (
        "resnet18.a1_in1k-demo-digits-s0",
        "resnet18.a1_in1k",
        "resnet18.a1_in1k",
        "t",
    )


def test_the_command_line_beats_debug_beats_recipe(compose):
    cfg = compose("recipe=in1k", "model=convnext_t", "debug=overfit", "optim.lr=5", "model.drop_path=0.33")
    assert (cfg.optim.lr, cfg.model.drop_path, cfg.mix.smoothing) == (5.0, 0.33, 0.0)
    assert (
        compose("model=convnext_xl", "recipe=in1k", "model.drop_path=0.5", "microbatch=32").microbatch == 32
    )


def test_recipes_state_every_setting_that_they_own():
    """Otherwise a change of a default would change a recipe."""
    import yaml

    owned = ("optim", "augment", "mix", "ema", "evaluate", "segment")
    for path in (ROOT / "conf" / "recipe").glob("*.yaml"):
        given = yaml.safe_load(path.read_text())
        task = given["recipe"].get("task", "classify")
        read = {key for key, _, checks in flat(Train()) if checks["task"] in ("", task)} - {"evaluate.batch"}
        if given["schedule_steps"]:
            assert given["optim"]["warmup_steps"]
            assert "epochs" not in given
        else:
            assert given["epochs"]
        if given["optim"]["warmup_steps"]:  # then the epochs are not read
            read -= {"optim.warmup_epochs"}
        for section in owned:
            names = {key.partition(".")[2] for key in read if key.startswith(f"{section}.")}
            assert set(given.get(section, {})) == names, f"{path.name}: {section}"
        header = path.read_text()
        for part in (f"expected {'mIoU' if task == 'segment' else 'top-1'}", "command:"):
            assert part in header


def test_text_goes_both_ways(compose):
    cfg = compose("optim.clip=1", "optim.eps=1e-7")
    assert from_text(to_text(cfg), Train) == cfg
    assert all(checks["help"] for schema in (Train, Eval) for _, _, checks in flat(schema()))


def test_batch_notice_tells_the_linear_rule(train, capsys):
    assert train("steps=1", "run=a") == 0
    said = capsys.readouterr().out
    assert (
        "batch=16 is not the recipe's 128: the learning rate is not rescaled and stays 0.003; the linear rule"
        " would give optim.lr=0.000375" in said
    )
    assert train("steps=1", "run=b", "optim.lr=1e-3") == 0
    assert "not rescaled" not in capsys.readouterr().out


def test_counts_in_epochs_and_steps(compose):
    cfg = compose(
        "batch=100", "microbatch=10", "epochs=10", "save_every=2epoch", "evaluate_every=7", "steps=55"
    )
    clock = Clock.of(cfg, 1060)
    assert (clock.steps_per_epoch, clock.total, clock.end, clock.save_every, clock.evaluate_every) == (
        10,
        100,
        55,
        20,
        7,
    )
    assert [step for step in range(1, 56) if clock.due(clock.save_every, step)] == [20, 40, 55]
    assert [step for step in range(1, 56) if clock.due(0, step)] == [55]
    assert json.dumps(clock.microbatches) == "10"
    never = Clock.of(compose("batch=100", "microbatch=10", "evaluate_every=never"), 1060)
    assert not any(never.due(never.evaluate_every, step) for step in range(never.end + 1))
