"""Tests the layout of the code: which folder may import which, and which files may use which library."""

import ast
import subprocess

import pytest
from conftest import ROOT

PACKAGE = ROOT / "src" / "reconverge"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room, and each module beside them, imports from itself and from those before it.
ORDER = [
    "base", "config", "distributed", "data", "models", "training", "run", "weights", "report", "tasks",
    "evaluation", "milestones", "build", "prepare", "commands",
]  # fmt: skip


def imports(path, top_level_only=False):
    """Modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def room(name):
    """base of reconverge.base.errors, build of reconverge.build; nothing of the package itself."""
    return [*name.split("."), ""][1]


@pytest.mark.parametrize("path", [path for path in FILES if room(module(path))], ids=module)
def test_imports_run_one_way(path):
    own = ORDER.index(room(module(path)))
    others = {room(name) for name in imports(path) if name.startswith("reconverge.")} & set(ORDER)
    assert {other for other in others if ORDER.index(other) > own} == set()


def test_data_does_not_know_the_models():
    for path in (PACKAGE / "data").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("reconverge.models")]


def test_modules_import_each_other_in_no_circle():
    """Imports inside functions count too."""
    names = {module(path): path for path in FILES}
    known = {
        name: {
            target
            for imported in imports(path)
            for target in (imported, imported.rpartition(".")[0])
            if target in names and target not in (name, "reconverge")
        }
        for name, path in names.items()
    }
    known["reconverge.commands"] = set()  # COMMANDS names its modules, and imports none of them by a line
    while free := [name for name, others in known.items() if not others & known.keys()]:
        for name in free:
            del known[name]
    assert not known


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("hydra", {"config.compose", "config.messages"}),
        ("omegaconf", {"config.compose", "config.messages", "config.published"}),
        ("torch.distributed", {"distributed.group", "distributed.world"}),
        ("wandb", {"run.tracker"}),
        (
            "timm",
            {
                "models.table", "models.drop_path", "models.isotropic", "models.roadmap", "models.layers",
                "models.pyramid",
                "weights.read", "weights.stored", "data.transforms", "base.imagenet",
            },
        ),
        ("segmentation_models_pytorch", {"models.upernet"}),
        ("random", {"base.chance", "data.mix", "data.transforms"}),  # these draw in scopes of chance
    ],
)  # fmt: skip
def test_only_these_files_name(library, files):
    naming = {
        module(path).removeprefix("reconverge.")
        for path in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    assert naming == files


HEAVY = ("torch", "timm", "torchvision", "torchmetrics", "matplotlib", "sklearn", "wandb", "safetensors")


def test_what_runs_before_the_configuration_is_accepted_imports_nothing_heavy():
    light, queue = set(), ["train.py", "eval.py"]
    names = {module(path): path for path in FILES} | {name: ROOT / name for name in queue}
    while queue:
        name = queue.pop()
        light.add(name)
        for imported in imports(names[name], top_level_only=True):
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}"
            for candidate in (imported, imported.rpartition(".")[0]):
                if candidate in names and candidate not in light:
                    queue.append(candidate)
    assert {"reconverge.run.folder", "reconverge.run.reader", "reconverge.training.datasets"} <= light


@pytest.mark.parametrize("path", [*FILES, ROOT / "train.py", ROOT / "eval.py"], ids=lambda path: path.name)
def test_files_and_functions_stay_short(path):
    """A file is at most 400 lines, a function 80; train() 70, with the step unabridged."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            most = 70 if path.name == "train.py" else 80
            assert node.end_lineno - node.lineno < most, node.name


def test_lines_have_at_most_110_columns():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], check=True, capture_output=True, text=True
    ).stdout
    text = (".py", ".yaml", ".sh", ".sbatch", ".c", ".h", ".html", ".toml", "Makefile", "run")
    for path in [ROOT / name for name in listed.splitlines() if name.endswith(text)]:
        longest = max(map(len, path.read_text().splitlines()), default=0)
        assert longest <= 110, path
