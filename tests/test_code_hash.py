"""The code that decides the bits of a run must not change for a resumed run. Other code may change."""

import shutil
import subprocess

import pytest
from conftest import ROOT, SMALL
from safetensors.torch import load_file
from test_imports import FILES, imports, module, room
from zygote import Forked

from reconverge.base import environment
from reconverge.base.environment import DECIDES

ONLY_LOOKS = ("report", "evaluation", "prepare", "commands")
# A module whose every name is a function that does nothing.
NOTHING = "def __getattr__(name):\n    return lambda *arguments, **named: {}\n"


@pytest.fixture
def build(tmp_path):
    """A copy of this build."""
    root = tmp_path / "build"
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copytree(ROOT / "native", root / "native")
    shutil.copy(ROOT / "train.py", root)
    return root


def test_every_room_is_of_one_kind():
    assert {room(module(path)) for path in FILES} - {""} == {*DECIDES, *ONLY_LOOKS}


def test_the_step_reaches_no_other_rooms_but_for_pictures_and_sweeps():
    names = {module(path): path for path in FILES} | {"train": ROOT / "train.py"}
    reached, queue = set(), ["train"]
    while queue:
        name = queue.pop()
        reached.add(name)
        for imported in imports(names[name]):
            for target in (imported, imported.rpartition(".")[0]):
                if target in names and target not in reached:
                    queue.append(target)
    rooms = {room(name) for name in reached} - {""}
    assert rooms - set(DECIDES) == {"report", "commands"}
    looking = {name for name in reached if room(name) in ONLY_LOOKS}
    assert looking == {
        "reconverge.report", "reconverge.report.map_pictures",
        "reconverge.report.panel", "reconverge.report.pictures",
        "reconverge.commands", "reconverge.commands.sweep",
    }  # fmt: skip


def test_the_hash_changes_with_what_decides_and_with_nothing_else(build, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", build)
    before, package = environment.code_hash(), build / "src" / "reconverge"
    for path in [*build.rglob("*.py"), *build.glob("native/*.[ch]")]:
        within = path.is_relative_to(package) and path.relative_to(package).parts[0].removesuffix(".py")
        decides = path.suffix in (".c", ".h") or path.name == "train.py" or within in DECIDES
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert (environment.code_hash() != before) == decides, path
        path.write_bytes(text)
    assert environment.code_hash() == before


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits_while_what_only_looks_is_replaced(build, digits, tmp_path, zygote):
    """It does not resume with another training step."""

    def train(*arguments):
        command = [build / "train.py", *SMALL, f"data.root={digits}", *arguments]
        process = Forked(
            zygote,
            [*command, "save_every=2", "evaluate_every=2", "run=a"],
            environment={"PYTHONPATH": str(build / "src"), "HOME": str(tmp_path), "PATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = process.communicate()
        return process.returncode, said

    assert train("steps=4")[0] == 0
    expected = load_file("runs/a/checkpoints/step-00000004/model.safetensors")
    shutil.rmtree("runs/a")
    assert train("steps=2")[0] == 0
    for name in ONLY_LOOKS:
        for path in (build / "src" / "reconverge" / name).rglob("*.py"):
            path.write_text(NOTHING if path.name != "__init__.py" else "")
    code, said = train("steps=4")
    assert code == 0, said
    found = load_file("runs/a/checkpoints/step-00000004/model.safetensors")
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    with open(build / "src/reconverge/training/ema.py", "a") as file:
        file.write("# another step\n")
    code, said = train("steps=6")
    assert code == 78, said
    assert "runs/a was started with other code" in said
