"""What a recipe takes from an installed library does not change in silence: golden texts hold it, and the
slow test compares them, and mixing and erasing of 300 microbatches, under every timm that pip can install.
"""

import os
import re
import subprocess
import sys

import library_numbers
import published_engine
import pytest
from conftest import ROOT

REAL = sys.executable  # other tests put a fork in its place


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("text", library_numbers.TEXTS, ids=lambda text: text.__name__)
def test_what_recipes_take_from_libraries_is_what_it_was(text, golden):
    golden(f"library_{text.__name__}.txt", "\n".join(text()))


@pytest.mark.parametrize(
    "mix",
    [{}, {"mixup": 0.0}, {"cutmix": 0.0}, {"probability": 0.5, "switch": 0.2, "smoothing": 0.0},
     {"mixup": 0.0, "cutmix": 0.0}],
)  # fmt: skip
def test_mixing_and_erasing_are_the_published_engines(mix):
    """timm 0.3.2, bit for bit; newer ones cut another box."""
    found = published_engine.compared(40, side=64, **mix)
    assert found.pop("other bits") == 0
    expected = {
        "mixup": mix.get("mixup") != 0,
        "cutmix": mix.get("cutmix") != 0,
        "not mixed": mix.get("probability", 1) < 1 or (mix.get("mixup") == 0 and mix.get("cutmix") == 0),
    }
    assert {kind: count > 0 for kind, count in found.items()} == expected


def test_the_box_of_cutmix_is_cut_from_halves_rounded_down():
    """A side of 11 pixels takes 5 before and 5 after the centre."""
    from reconverge.data import mix

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix.np.random, "randint", lambda low, high: 20)
        assert mix._cut(40, 11 / 40 + 1e-9) == slice(15, 25)
        patch.setattr(mix.np.random, "randint", lambda low, high: 38)
        assert mix._cut(40, 11 / 40 + 1e-9) == slice(33, 40)


def versions():
    """The versions of timm that pyproject.toml allows and pip knows, newest first."""
    (lowest,) = re.findall(r'"timm>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    said = subprocess.run(
        [REAL, "-m", "pip", "index", "versions", "timm"], capture_output=True, text=True, timeout=120
    ).stdout
    found = re.search(r"Available versions: (.*)", said)
    known = re.findall(r"\d+\.\d+\.\d+", found[1]) if found else []
    return [version for version in known if numbered(version) >= numbered(lowest)]


def numbered(version):
    return tuple(map(int, version.split(".")))


def test_inc0_is_not_increasing_whatever_timm_makes_of_it():
    """timm before 1.0.29 takes the text "0" for true."""
    from reconverge.config.settings import Augment
    from reconverge.data import transforms

    for auto, passed in (
        ("rand-m9-inc0-mstd0.5", "rand-m9-mstd0.5"),
        ("rand-m9-mstd0.5-inc0", "rand-m9-mstd0.5"),
        ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        ("none", None),
    ):
        with pytest.MonkeyPatch.context() as patch:
            given = {}
            make = transforms.transforms_imagenet_train

            def kept(*sizes, make=make, given=given, **options):
                given.update(options)
                return make(*sizes, **options)

            patch.setattr(transforms, "transforms_imagenet_train", kept)
            transforms.training(Augment(auto=auto), library_numbers.MEAN)
        assert given["auto_augment"] == passed


@pytest.mark.slow
def test_every_timm_gives_the_same_numbers(tmp_path):
    """All that pip can install; RECONVERGE_TIMMS may name a folder that has some already, by version."""
    kept = os.environ.get("RECONVERGE_TIMMS", str(tmp_path))
    names = [text.__name__ for text in library_numbers.TEXTS]
    expected = "".join((ROOT / "tests" / "golden" / f"library_{name}.txt").read_text() for name in names)
    tried, different = [], {}
    for version in versions():
        folder = os.path.join(kept, version)
        if not os.path.isdir(folder):
            install = [
                REAL,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                folder,
                f"timm=={version}",
            ]
            if subprocess.run(install, capture_output=True, timeout=300).returncode:
                continue  # pip cannot get it here
        path = os.pathsep.join([folder, str(ROOT / "src"), str(ROOT / "tests")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        mixed, numbers = (
            subprocess.run([REAL, str(ROOT / "tests" / script), *arguments], env=environment,
                capture_output=True, text=True, timeout=600)
            for script, arguments in (("published_engine.py", []), ("library_numbers.py", names))
        )  # fmt: skip
        assert mixed.stdout.startswith(f"{version} "), mixed.stderr
        tried.append(version)
        if "'other bits': 0" not in mixed.stdout:
            different[version] = mixed.stdout
        elif numbers.stdout != expected:
            lines = zip(numbers.stdout.splitlines(), expected.splitlines(), strict=False)
            different[version] = [pair for pair in lines if pair[0] != pair[1]][:5] or numbers.stderr[-500:]
    assert len(tried) >= 2, f"only {tried} could be installed"
    assert not different
