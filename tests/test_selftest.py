"""reconverge selftest passes on the correct code, and fails with the right check on several broken copies of
it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from reconverge.commands import selftest

BREAKS = {
    "unkeyed mixing": (
        "R1", "src/reconverge/data/mix.py",
        '        with chance.scope(*key[:1], "mix", *key[1:]):\n'
        "            return self.mixup(images, labels)",
        "        return self.mixup(images, labels)",
    ),
    "order by rank": (
        "R3", "src/reconverge/data/order.py",
        "mine = block(self.microbatches, rank, ranks, tree=False)",
        "mine = range(rank, self.microbatches, ranks)",
    ),
    "wrong gradient scale": (
        "gradients", "src/reconverge/distributed/world.py",
        "        return dist.all_reduce(values,",
        "        values.div_(self.size)\n        return dist.all_reduce(values,",
    ),
    "broadcast BatchNorm buffers": (
        "batchnorm", "train.py",
        "        statistics.settle(skip)",
        "        world.broadcast(model.net.buffers())",
    ),
    "a dropped sample": (
        "samples", "src/reconverge/data/order.py",
        "        chosen, repeats = np.divmod(positions, self.repeats)",
        "        chosen, repeats = np.divmod(np.maximum(positions, 1), self.repeats)",
    ),
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, forking):
    """Runs the selftest of the build in a folder, with its temporary files in tmp_path."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return _run


def _run(root, *arguments):
    """Its exit code and output."""
    done = subprocess.run(
        [sys.executable, "-c", "from reconverge.commands import main; main()", "selftest", *arguments],
        env=os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def build(tmp_path):
    """A copy of this build."""
    root = tmp_path / "build"
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copy(ROOT / "train.py", root)
    return root


@pytest.mark.slow
def test_a_sound_build_keeps_everything(build, tmp_path, run):
    code, said = run(build)
    assert code == 0, said
    assert [line.split()[:2] for line in said.splitlines()[1:]] == [
        ["passed", name] for name in selftest.CHECKS
    ]
    assert not list(tmp_path.glob("reconverge-selftest-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_build_is_told(build, tmp_path, run, name):
    promise, file, sound, broken = BREAKS[name]
    text = (build / file).read_text()
    assert text.count(sound) == 1
    (build / file).write_text(text.replace(sound, broken))
    code, said = run(build, "--only", promise)
    assert code == 1, said
    assert f"FAILED  {promise}" in said
    assert "train.py ended with exit" not in said  # it trains without an error, but wrongly
    (kept,) = tmp_path.glob("reconverge-selftest-*")
    assert (kept / "runs").exists()


def test_what_selftest_compares_can_differ(tmp_path):
    """Each comparison on records that are written by hand."""
    import json

    def folder(name, **values):
        path = Path(tmp_path / name)
        path.mkdir()
        line = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "images": "a"} | values
        (path / "record.jsonl").write_text(json.dumps(line) + "\n")
        return path

    one = folder("one")
    selftest.agree(one, folder("same"), "images", 1)
    selftest.agree(one, folder("near", grad_norm=1.00001), "grad_norm", 1, within=1e-4)
    for other, key in (
        (folder("images", images="b"), "images"),
        (folder("norm", grad_norm=0.5), "grad_norm"),
    ):
        with pytest.raises(selftest.Broken, match=f"step 1: {key} is"):
            selftest.agree(one, other, key, 1, within=1e-4 if key == "grad_norm" else 0.0)
