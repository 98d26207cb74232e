"""Who may import whom, and who may name which library: the layout of the code, held."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "src" / "reconverge"
FILES = sorted(PACKAGE.rglob("*.py"))


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


# Lower ranks know nothing of higher ones. The number is the floor; a file imports from its own or a lower
# floor.
FLOORS = {
    "reconverge": 0, "reconverge.settings": 0, "reconverge.errors": 0, "reconverge.signals": 0,
    "reconverge.jsonl": 0,
    "reconverge.clock": 1, "reconverge.chance": 1, "reconverge.world": 1, "reconverge.ranks": 1,
    "reconverge.environment": 1, "reconverge.lock": 1, "reconverge.progress": 1, "reconverge.tracker": 1,
    "reconverge.synsets": 1, "reconverge.jobs": 1,
    "reconverge.data": 2, "reconverge.data.order": 2, "reconverge.data.index": 2, "reconverge.data.tar": 2,
    "reconverge.data.files": 2, "reconverge.data.folder": 2, "reconverge.data.shards": 2,
    "reconverge.data.stage": 2, "reconverge.data.decode": 2, "reconverge.data.native": 2,
    "reconverge.data.sources": 2, "reconverge.data.transforms": 2, "reconverge.data.loader": 2,
    "reconverge.data.mix": 2,
    "reconverge.models": 2, "reconverge.models.drop_path": 2, "reconverge.models.isotropic": 2,
    "reconverge.models.roadmap": 2, "reconverge.models.batch_norm": 2, "reconverge.models.layers": 2,
    "reconverge.models.layouts": 2, "reconverge.models.pretrained": 2, "reconverge.models.weights": 2,
    "reconverge.models.throughput": 2, "reconverge.passes": 2, "reconverge.gradients": 2,
    "reconverge.record": 2, "reconverge.optim": 2, "reconverge.ema": 2, "reconverge.checkpoint": 2,
    "reconverge.compare": 2,
    "reconverge.prepare": 3, "reconverge.prepare.odd": 3, "reconverge.prepare.layouts": 3,
    "reconverge.prepare.scatter": 3, "reconverge.prepare.make": 3,
    "reconverge.evaluate": 3, "reconverge.outcomes": 3, "reconverge.state": 3, "reconverge.config": 3,
    "reconverge.checks": 3, "reconverge.estimate": 3, "reconverge.pictures": 4, "reconverge.opened": 4,
    "reconverge.run": 4, "reconverge.published": 4, "reconverge.evalsets": 4, "reconverge.predict": 4,
    "reconverge.trained": 4, "reconverge.export": 4, "reconverge.bench_data": 4, "reconverge.bench_model": 4,
    "reconverge.describe": 5, "reconverge.sweep": 4,
    "reconverge.report": 5, "reconverge.charts": 5, "reconverge.page": 5,
    "reconverge.commands": 5, "reconverge.commands.models": 5, "reconverge.commands.prepare": 5,
    "reconverge.commands.check": 5, "reconverge.commands.batch": 5, "reconverge.commands.bench": 5,
    "reconverge.commands.plan": 5, "reconverge.commands.verify": 5, "reconverge.commands.selftest": 5,
    "reconverge.commands.export": 5, "reconverge.commands.report": 5,
}  # fmt: skip


def test_every_file_has_a_floor():
    assert {module(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_run_one_way(path):
    for name in imports(path):
        if name.startswith("reconverge"):
            target = name if name in FLOORS else name.rpartition(".")[0]
            assert FLOORS[target] <= FLOORS[module(path)], f"{module(path)} imports {name}"


def test_data_does_not_know_the_models():
    for path in (PACKAGE / "data").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("reconverge.models")]


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("hydra", {"reconverge.config"}),
        ("omegaconf", {"reconverge.config"}),
        ("torch.distributed", {"reconverge.world"}),
        ("wandb", {"reconverge.tracker"}),
        (
            "timm",
            {
                "reconverge.models",
                "reconverge.models.drop_path",
                "reconverge.models.isotropic",
                "reconverge.models.roadmap",
                "reconverge.models.layers",
                "reconverge.models.pretrained",
                "reconverge.data.transforms",
                "reconverge.data.mix",
                "reconverge.synsets",
                "reconverge.export",
            },
        ),
        (
            "random",
            {"reconverge.chance", "reconverge.data.mix", "reconverge.data.transforms"},
        ),  # these draw in scopes of chance
    ],
)
def test_only_these_files_name(library, files):
    naming = {
        module(path)
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
    assert {"reconverge.run", "reconverge.opened"} <= light


@pytest.mark.parametrize(
    "path", [*FILES, ROOT / "train.py", ROOT / "eval.py"], ids=lambda path: Path(path).name
)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
