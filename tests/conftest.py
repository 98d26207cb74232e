"""Most tests run in one process, because importing torch and timm takes seconds. A test that needs its own
process gets a fork of a process that has imported them (zygote.py). Some tests start a real process, to check
that it makes no difference.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # threads that spin while waiting make the other processes ten times slower

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from PIL import Image
from zygote import Forked

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FORK = str(ROOT / "tests" / "python")  # for programs that start a Python: a fork of the zygote instead
# For torchrun, beside it: its ranks, whose parent is the zygote, cannot read its command line.
FORKING = {"PET_STANDALONE": "1"}

# Two microbatches of 8 images of 32 x 32 pixels a step, 7 steps an epoch: a step takes a tenth of a second.
SMALL = [
    "data=folder",
    "batch=16",
    "microbatch=8",
    "epochs=4",
    "optim.warmup_epochs=1",
    "threads=1",
    "workers=0",
    "evaluate_every=never",  # which, with its pictures, takes half a second of CPU
]
# The same for several ranks, with every kind of random number. With eight microbatches a step, two and four
# ranks add gradients in another order than one rank.
DRAWN = [
    "augment.auto=rand-m9-mstd0.5-inc1",
    "augment.scale=[0.08,1.0]",
    "augment.flip=0.5",
    "augment.erase=0.5",
    "model.drop_path=0.3",
]
JOB = [
    *SMALL,
    "batch=64",
    "microbatch=8",
    *DRAWN,
    "optim.clip=1.0",
    "optim.warmup_epochs=0",
    "log_every=1",
    "recipe.name=mine",
]


# How often a test kills, stops or races a run at random moments.
FAULTS = int(os.environ.get("FAULTS", "10"))

settings.register_profile("tests", deadline=None)  # two processes, and what they start, share the cores
settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    """Start the longest tests first; at the end, the other process would have to wait for them."""
    items.sort(key=lambda item: item.path.name != "test_transfer.py")


def pytest_collection_finish():
    """Exclude the imported modules from garbage collection, which would take a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # otherwise some libraries print what they have left, below the summary


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _native(way):
    """The native library, with AVX2 or scalar. It is a failure if it was built but cannot be used."""
    from reconverge.data import native

    said = native.choose("auto")
    require("native", "not built" not in said, said)
    assert said.startswith("native"), said
    library = native.Native(simd=way == "AVX2")
    if library.simd != (way == "AVX2"):
        pytest.skip("no AVX2 here")
    return library


@pytest.fixture(params=["AVX2", "scalar"])
def library(request):
    return _native(request.param)


@pytest.fixture(scope="module", params=["AVX2", "scalar", "not native"])
def decoder(request):
    """Runs the test with each decoder."""
    from reconverge.data import native

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "not native":
            native.choose("off")
        else:
            library = _native(request.param)
            patch.setattr(native, "_checked", lambda: library)
        yield
    native.choose("auto")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch, cache):
    """Each test runs in its own folder; all share one cache with digits and indexes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(cache))


def _main(script, arguments, monkeypatch):
    import importlib

    from reconverge.base import signals

    handlers = {number: signal.getsignal(number) for number in signals.CAUGHT}
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    from reconverge.base.errors import exit_code

    try:
        return int(exit_code(importlib.import_module(script).main))
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        GlobalHydra.instance().clear()
        signals._came.clear()
        signals._said.clear()
        torch.use_deterministic_algorithms(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def tiny(arguments):
    """The model of a training whose arguments name none: timm's smallest ConvNeXt. Its checkpoints have 4 MB,
    those of convnext_atto 54.
    """
    named = any(argument.startswith("model") for argument in arguments)
    return [] if named else ["model=timm", "model.timm=test_convnext"]


def trained(folder, cache, *arguments):
    """The runs that train.py makes in a folder, for a fixture that is made once; many tests start from a
    copy.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(cache))
        torch.set_num_threads(1)
        assert _main("train", [*SMALL, *arguments], patch) == 0
    return folder / "runs"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The first 12 training and 3 validation images of each of the bundled digits, as class folders."""
    import shutil

    from reconverge.config.settings import Data
    from reconverge.data.sources import open_sources

    root = tmp_path_factory.mktemp("digits")
    for split, source, count in zip(
        ("train", "val"),
        open_sources(Data("digits", "digits", cache=str(root / "all"))),
        (12, 3),
        strict=True,
    ):
        labels = source.labels(np.arange(len(source)))
        for sample in np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]):
            path = source.path(int(sample))
            (root / split / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / split / path.parent.name)
    return root


@pytest.fixture
def small(digits):
    return [*SMALL, f"data.root={digits}"]


@pytest.fixture
def train(monkeypatch, small):
    """train.py on a few digits with these arguments, in this process: its exit code."""
    return lambda *arguments: _main("train", [*small, *tiny(arguments), *arguments], monkeypatch)


@pytest.fixture
def compose():
    """The checked configuration of these arguments, in this process."""

    from reconverge.config import rules
    from reconverge.config.compose import of_training

    def compose(*arguments):
        cfg = of_training(arguments)
        rules.check(cfg)
        return cfg

    return compose


@pytest.fixture
def evaluate(monkeypatch):
    return lambda *arguments: _main("eval", arguments, monkeypatch)


@pytest.fixture
def reconverge(monkeypatch, capsys):
    """reconverge COMMAND in this process: exit code, and what it said."""
    from reconverge.commands import main

    def reconverge(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["reconverge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return reconverge


@contextmanager
def started_zygote(folder, without="", enter=()):
    """The socket of a zygote that has imported all its libraries, or all but one; `enter` is a command that
    starts it, such as nsenter.
    """
    path = folder / "socket"
    process = subprocess.Popen(
        [*enter, sys.executable, str(ROOT / "tests" / "zygote.py"), str(path), without, "." * 4000],
        stdin=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield str(path)
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    """The socket of a process that has imported torch and timm, and makes forks of itself; see zygote.py."""
    with started_zygote(tmp_path_factory.mktemp("zygote")) as path:
        yield path


@pytest.fixture
def forking(zygote, monkeypatch):
    """In this test, starting `sys.executable` makes a fork."""
    monkeypatch.setenv("RECONVERGE_ZYGOTE", zygote)
    monkeypatch.setattr(sys, "executable", FORK)


@pytest.fixture
def start(small, zygote):
    """train.py on a few digits with these arguments, as a process of its own: a fork, or a `real` one."""
    processes = []

    def start(*arguments, script="train.py", real=False, **environment):
        given = [*small, *tiny(arguments)] if script == "train.py" else []
        command = [str(ROOT / script), *given, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        if real:
            process = subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)
        else:
            process = Forked(zygote, command, environment=environment, **pipes)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def launch(digits, zygote):
    """launch(ranks, *arguments): torchrun in a session of its own, which ends with the test; `options` are
    torchrun's. It and its ranks are forks, or `real` processes.
    """
    launched = []

    def launch(ranks, *arguments, script="train.py", settings=JOB, options=(), real=False):
        root = [f"data.root={digits}"] if script == "train.py" else []
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
        command = [*torchrun, str(ROOT / script), *settings, *root, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        if real:
            own = {"env": environment, "text": True, "start_new_session": True}
            process = subprocess.Popen([sys.executable, *command], **pipes, **own)
        else:
            environment |= FORKING | {"RECONVERGE_ZYGOTE": zygote}
            own = {"environment": environment, "session": True, "executable": FORK}
            process = Forked(zygote, command, **pipes, **own)
        launched.append(process)
        return process

    yield launch
    for process in launched:
        for pid in [*workers_of(process).values(), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        process.stdout.close()


@pytest.fixture
def torchrun(launch):
    """The same, waiting for the end: (exit code, output)."""

    def torchrun(*arguments, **options):
        process = launch(*arguments, **options)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    return torchrun


def workers_of(torchrun):
    """Rank -> process number, of the workers that a torchrun has now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names = dict(entry.partition("=")[::2] for entry in (folder / "environ").read_text().split("\0"))
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if parent == torchrun.pid and "LOCAL_RANK" in names:
            found[int(names["RANK"])] = int(folder.name)
    return found


@pytest.fixture(scope="session")
def counted_once():
    """Count each model's size only once in the session; counting all takes about ten seconds."""
    from reconverge.models import table

    count, kept = table.Spec.count, {}

    def remembered(spec, settings, size):
        key = (id(spec), str(settings), size)
        if key not in kept:
            kept[key] = count(spec, settings, size)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table.Spec, "count", remembered)
        yield


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Three classes of JPEGs of odd sizes, with smooth content as photographs have; 20 to train, 4 to
    evaluate, of each.
    """
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.Generator(np.random.PCG64(7))
    for split, count in (("train", 20), ("val", 4)):
        for label in range(3):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                size = (int(random.integers(90, 500)), int(random.integers(90, 500)))
                image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
                image.save(folder / f"{number:03d}.JPEG", quality=int(random.integers(70, 96)))
    return root


@pytest.fixture(scope="session")
def shards(photographs, tmp_path_factory):
    """The photographs in shards of `reconverge prepare`: 60 for training in about five shards, 12 for
    validation.
    """
    from reconverge.prepare.make import Options, prepare

    root = tmp_path_factory.mktemp("shards") / "made"
    prepare(
        photographs,
        root,
        None,
        1,
        Options(shard_mb=0.1, hold_out=0, resize=None, quality=90, drop_unreadable=False),
    )
    return root


def weights(run, kind="model"):
    """The newest checkpoint's sha256 of a set of tensors."""
    import json

    newest = sorted((Path("runs") / run / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "MANIFEST.json").read_text())["files"]
    return files[f"{kind}.safetensors"]["sha256"]


@pytest.fixture
def golden(request):
    """golden(name, text) compares with tests/golden/name; `pytest --rewrite-golden` writes it instead."""

    def compare(name, text):
        path = ROOT / "tests" / "golden" / name
        if request.config.getoption("--rewrite-golden"):
            path.write_text(text + "\n")
        assert path.read_text() == text + "\n"

    return compare


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite-golden", action="store_true", help="rewrite tests/golden, for an intended change"
    )


def require(what, there, lacking):
    """Skip the test if this machine lacks something. Fail instead if RECONVERGE_REQUIRE names it; .ci/run
    sets this for everything that it installed.
    """
    if not there:
        (pytest.fail if what in os.environ.get("RECONVERGE_REQUIRE", "").split(",") else pytest.skip)(lacking)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, mounted for the test; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], stderr=subprocess.DEVNULL
        ).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
