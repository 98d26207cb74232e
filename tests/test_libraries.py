"""What a recipe takes from an installed library does not change in silence: golden texts hold it, and the
slow test compares them, and mixing and erasing of 300 microbatches, under every timm that pip can install.
"""

import os
import re
import subprocess
import sys
from itertools import zip_longest

import library_numbers
import published_engine
import pytest
from conftest import ROOT, started_zygote
from zygote import Forked

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


def installed(version, kept):
    """The folder of this version of timm; None if pip cannot get it here."""
    folder = os.path.join(kept, version)
    install = [REAL, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", folder]
    install += [f"timm=={version}"]
    if os.path.isdir(folder) or not subprocess.run(install, capture_output=True, timeout=300).returncode:
        return folder
    return None


@pytest.fixture
def printed(tmp_path):
    """printed(folder, script, *arguments): what this script prints under the timm in this folder, as a fork
    of a process that has imported torch but no timm.
    """

    def printed(folder, script, *arguments):
        path = os.pathsep.join([folder, str(ROOT / "src"), str(ROOT / "tests")])
        process = Forked(
            without_timm,
            [str(ROOT / "tests" / script), *arguments],
            environment=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-2000:]
        return out

    with started_zygote(tmp_path, without="timm") as without_timm:
        yield printed


@pytest.mark.slow
def test_every_timm_gives_the_same_numbers(tmp_path, printed):
    """All that pip can install mix and erase 300 microbatches alike; some, the oldest among them, are asked
    for everything else. RECONVERGE_TIMMS may name a folder that has them already, by version.
    """
    kept = os.environ.get("RECONVERGE_TIMMS", str(tmp_path))
    folders = {version: folder for version in versions() if (folder := installed(version, kept))}
    assert len(folders) >= 2, f"only {list(folders)} could be installed"
    different = {}
    for version, folder in folders.items():
        said = printed(folder, "published_engine.py")
        assert said.startswith(f"{version} ")
        if "'other bits': 0" not in said:
            different[version] = [said]
    names = [text.__name__ for text in library_numbers.TEXTS if text is not library_numbers.initial_weights]
    expected = "".join((ROOT / "tests" / "golden" / f"library_{name}.txt").read_text() for name in names)
    weights = (ROOT / "tests" / "golden" / "library_initial_weights.txt").read_text()
    for version in {*list(folders)[::4], list(folders)[-1]}:
        pairs = zip_longest(printed(folders[version], "library_numbers.py", *names).splitlines(),
            expected.splitlines())  # fmt: skip
        lines = [pair for pair in pairs if pair[0] != pair[1]]
        drawn = printed(folders[version], "library_numbers.py", "initial_weights")
        if spreads(drawn) != spreads(weights):
            lines.append("initial weights")
        if lines:
            different.setdefault(version, []).extend(lines[:5])
    assert not different


def spreads(text):
    """Each kind of parameter and its standard deviation. timm before 1.0.23 draws the weights of ViT in
    another order, so only their distribution can be compared.
    """
    rows = [line.rpartition(": ") for line in text.splitlines()]
    return [(kind, f"{float(numbers.split()[1]):.1g}") for kind, _, numbers in rows if kind]
