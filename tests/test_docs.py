"""Every command in README, CONTRIBUTING and docs/ can be pasted into a shell and is accepted; those about a
trained run are carried out; every link leads somewhere, also those to places that have moved.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, trained
from hydra.core.global_hydra import GlobalHydra

from reconverge.commands import main, parsed
from reconverge.config import compose, listing, rules
from reconverge.config.settings import Eval

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "native/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = (
    "python train.py",
    "python eval.py",
    "reconverge ",
    "torchrun ",
    "launch/local.sh ",
    "launch/seeds.sh ",
    "sbatch ",
)
# What other pages and old messages point to, and what has moved since.
OLD_TARGETS = """
README.md: imagenet-in-two-commands recipes your-own-folder start-from-other-weights what-a-run-leaves
    what-to-do-with-it resume several-gpus-several-nodes the-promises-and-how-to-check-them machine-settings
    models the-code
docs/promises.md: the-promises-and-how-they-are-kept microbatches-ranks-forward-passes how-gradients-are-added
    what-a-run-records when-a-rank-is-lost reconverge-selftest---only-name-
    reconverge-verify-run---from-step---steps-n---ranks-r---allow-env
docs/evaluate.md: evaluate-predict-export-measure evalpy the-published-sets predict reconverge-export
    reconverge-bench
docs/cluster.md: several-gpus-several-nodes launchlocalsh launchslurmsbatch many-runs
docs/extending.md: extending a-model an-augmentation a-recipe a-data-set an-evaluation-set a-job
docs/data.md: what-reconverge-prepare-source---to-dir-takes what-it-makes the-order faults
    from-bytes-to-pixels speed
docs/recipes.md: recipes before-it-trains batch-and-learning-rate at-the-end weights-from-elsewhere
docs/architecture.md: architecture the-rooms what-may-change-under-a-run how-data-flows
docs/roadmap.md: the-roadmap-from-resnet-to-convnext
    what-is-chosen-where-the-paper-and-the-authors-code-are-silent-or-disagree
docs/models.md: docs/experiments.md: docs/curves.png: docs/first_batch.png:
"""


def blocks(page, language="bash"):
    """The blocks of code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def commands():
    """(page, words) of the commands in blocks of bash and between backticks."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *re.findall(r"`([^`\n]+)`", prose(page))]:
            if line.startswith(PROGRAMS):
                found.append((page.name, shlex.split(line, comments=True)))
    return found


COMMANDS = commands()


def test_there_are_some():
    assert len(COMMANDS) > 60
    assert {given[0] for _, given in COMMANDS} >= {
        "python",
        "reconverge",
        "torchrun",
        "launch/local.sh",
        "sbatch",
    }


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_blocks_can_be_pasted_into_a_shell(page):
    languages = set(re.findall(r"^```(\S*)\n(?:.*?\n)?```$", page.read_text(), re.S | re.M))
    assert languages <= {"bash", "text", "python"}, "each block says what it is"
    for block in blocks(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, (block, done.stderr)
        for line in block.splitlines():  # an explanation is a comment
            assert not re.search(r"\s{2,}[^#\s]", line.strip().removesuffix("\\")), line


@pytest.mark.parametrize(
    ("page", "given"), COMMANDS, ids=[f"{page}: {' '.join(given)}"[:90] for page, given in COMMANDS]
)
def test_each_is_accepted(page, given, monkeypatch):
    """Composed and checked as it is before torch is imported; `...` stands for more, and a word in capitals
    for a name.
    """
    given = [
        word.replace("recipe=NAME", "recipe=in1k").replace("model=MODEL", "model=convnext_t")
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


def anchors(page):
    """Of each heading GitHub's address, and what `<a id>` adds."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    addresses = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return addresses | set(re.findall(r'<a id="([^"]+)">', page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_old_links_still_lead_somewhere():
    for name, targets in re.findall(r"(\S+):((?:\s+(?!\S+:)\S+)*)", OLD_TARGETS):
        assert (ROOT / name).exists(), name
        missing = set(targets.split()) - anchors(ROOT / name) if name.endswith(".md") else None
        assert not missing, (name, missing)


def test_the_page_of_settings_is_current():
    """Stale? python -m reconverge.config.listing > docs/settings.md"""
    assert (ROOT / "docs" / "settings.md").read_text() == listing.markdown()


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
    """One after the other, as somebody who reads the page; data where it says, for want of ImageNet the
    digits.
    """
    shutil.copytree(learned, "runs")
    for folder in ("photos", "my photos"):
        shutil.copytree(digits / "val" / "3", folder)
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


def test_a_model_is_used_in_python_as_the_page_says(learned, digits, tmp_path, monkeypatch, capsys):
    (program,) = blocks(ROOT / "docs" / "evaluation.md", "python")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(learned, "runs")
    shutil.copy(next((digits / "val" / "3").iterdir()), "photo.jpg")
    monkeypatch.setattr(sys, "argv", ["reconverge", "export", "runs/NAME", "--to", "timm"])
    with pytest.raises(SystemExit):
        main()
    capsys.readouterr()
    exec(compile(program, "evaluation.md", "exec"), {})
    name, probability = capsys.readouterr().out.split()
    assert name in {path.name for path in (digits / "val").iterdir()}
    assert 10 < int(probability.removesuffix("%")) <= 100
