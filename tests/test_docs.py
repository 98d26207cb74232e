"""Every command in the README and in docs/ is accepted; those about a trained run are carried out."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, trained
from hydra.core.global_hydra import GlobalHydra

from reconverge.commands import main, parsed
from reconverge.config import compose, rules
from reconverge.config.settings import Eval

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "python train.py",
    "python eval.py",
    "reconverge ",
    "torchrun ",
    "launch/local.sh ",
    "launch/seeds.sh ",
    "sbatch ",
)


def commands():
    """(page, arguments) of the commands in code blocks and between backticks. Text after two spaces is an
    explanation.
    """
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            line
            for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
            for line in block.splitlines()
        ]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        for line in lines:
            line = line.removeprefix("$ ")
            if line.startswith(PROGRAMS):
                found.append((page.name, shlex.split(re.split(r"\s{2,}", line)[0])))
    return found


COMMANDS = [
    (page, given) for page, given in commands() if "epohcs=30" not in given and given[1] != "stopped"
]  # shown because it is refused


def test_there_are_some():
    assert len(COMMANDS) > 40
    assert {given[0] for _, given in COMMANDS} >= {
        "python",
        "reconverge",
        "torchrun",
        "launch/local.sh",
        "sbatch",
    }


@pytest.mark.parametrize(
    ("page", "given"), COMMANDS, ids=[f"{page}: {' '.join(given)}"[:90] for page, given in COMMANDS]
)
def test_each_is_accepted(page, given, monkeypatch):
    """The command is composed and checked as before torch is imported. `...` means more arguments, and a word
    in capitals is a name.
    """
    given = [
        word.replace("recipe=NAME", "recipe=in1k")
        for word in given
        if word != "..." and not re.fullmatch(r"\[.*\]|key=value", word)
    ]
    try:
        if given[0] == "reconverge":
            words = [{"N": "3", "STEP": "3", "PERCENT": "3"}.get(word, word) for word in given[1:]]
            if len(words) == 1 and words[0] in (
                "prepare",
                "check",
                "verify",
                "export",
                "batch",
                "report",
                "bench",
            ):
                return  # the command's name alone
            arguments = parsed(words)
            if getattr(arguments, "overrides", []):
                rules.check(compose.of_training([word for word in arguments.overrides if "=" in word]))
            return
        script = next((word for word in given if word.endswith((".py", ".sh", ".sbatch"))), "train.py")
        overrides = [
            word for word in given[given.index(script) + 1 :] if "=" in word and not word.startswith("-")
        ]
        if script == "eval.py":
            cfg = compose.composed(ROOT / "conf", "eval", Eval, overrides)
            rules.evaluation(cfg)
            return
        for combination in compose.combinations(overrides):
            name = next(
                (word for word in combination if word == "data=folder" or word == "data=imagenet1k"), ""
            )
            more = (
                ["data.root=/path"]
                if name and not any(word.startswith("data.root=") for word in combination)
                else []
            )
            rules.check(compose.of_training([*combination, *more]))
    finally:
        GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def learned(digits, tmp_path_factory, cache):
    """runs/NAME: five checkpoints of it."""
    return trained(
        tmp_path_factory.mktemp("docs"),
        cache,
        f"data.root={digits}",
        "run=NAME",
        "epochs=5",
        "keep=5",
        "save_every=1epoch",
        "evaluate_every=1epoch",
    )


ABOUT_A_RUN = [
    given
    for _, given in COMMANDS
    if any("runs/NAME" in word for word in given) and (given[1] == "eval.py" or given[:2] == ["reconverge",
            "export"]) and "suite=robustness" not in given
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of exporters
def test_those_about_a_run_are_carried_out(learned, digits, monkeypatch, evaluate, tmp_path, capsys):
    """One after the other, as a reader of the page would do it, with the digits instead of ImageNet."""
    shutil.copytree(learned, "runs")
    shutil.copytree(digits / "val" / "3", "photos")
    (tmp_path / "real").symlink_to(digits)
    assert len(ABOUT_A_RUN) > 8
    for given in ABOUT_A_RUN:
        words = [re.sub("^data.root=.*", f"data.root={digits}", word) for word in given]
        if words[0] == "reconverge":
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                main()
            code = int(ended.value.code or 0)
        else:
            words = [word for word in words if word != "data=imagenet1k"]
            code = evaluate(*words[2:], "workers=0")
        assert code == 0, (given, capsys.readouterr().err)
    assert Path("runs/NAME/export-timm/README.md").exists()
