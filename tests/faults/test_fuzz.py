"""A fuzzer: folders that may come from somebody else, changed at random, are read by the commands that read
them. Nothing outside the folder is touched, nothing is run, the interpreter lives, and no changed number is
called good.

FUZZ_SECONDS is the time for each kind of folder (10), FUZZ_SEED the first case.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
import time
import zipfile
from hashlib import sha256

import numpy as np
import pytest
import yaml
from conftest import trained
from safetensors.numpy import load_file, save_file

from reconverge.base.errors import explain

SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ARGUMENTS = ["model=timm", "model.timm=test_convnext", "run=a", "ema.decay=0.9", "steps=2", "save_every=1",
    "evaluate_every=0"]  # fmt: skip

OTHERS = [None, True, -1, 0, 10**30, float("inf"), float("nan"), "", "x" * 300, "../../canary", "/", [], {}]
OTHERS += [[None], {"a": {}}, "${oc.env:HOME}", "\0", "!!python/object/apply:os.system [touch ran]", [[]] * 9]


# ---- changes -----------------------------------------------------------------------------------------------


def flipped(content, chance):
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 3, 20])):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def cut(content, chance):
    return content[: chance.randrange(len(content) + 1)]


def spliced(content, chance):
    one, two = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:one] + content[two:] if chance.random() < 0.5 else content[:two] + content[one:]


def swapped(table, chance):
    """The table with a value of another type at a random place."""
    places = []

    def walk(of):
        keys = of if isinstance(of, dict) else range(len(of))
        for key in keys:
            places.append((of, key))
            if isinstance(of[key], dict | list):
                walk(of[key])

    if not isinstance(table, dict | list) or not table:
        return chance.choice(OTHERS)
    walk(table)
    for of, key in chance.choices(places, k=chance.choice([1, 1, 2])):
        if chance.random() < 0.2 and isinstance(of, dict):
            of.pop(key, None)
        elif key in of if isinstance(of, dict) else key < len(of):
            of[key] = chance.choice(OTHERS)
    return table


def other_tensors(tensors, chance):
    name = chance.choice(sorted(tensors))
    tensor, kind = tensors[name], chance.randrange(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = tensor.reshape(-1)[: chance.randrange(tensor.size + 1)]
    elif kind == 2:
        tensors[name] = tensor.astype(chance.choice(["int8", "float64", "float16", "bool", "complex64"]))
    elif kind == 3:
        tensors[name] = np.full_like(tensor, chance.choice([0, 1]))
        if tensor.dtype.kind == "f":
            tensors[name] += chance.choice([np.nan, np.inf, -1e30])
    elif kind == 4:
        tensors[chance.choice(["another", "../../canary", "x" * 300])] = tensor.copy()
    elif kind == 5:
        tensors[name] = tensor.reshape(tensor.shape[::-1])
    else:
        tensors[name] = np.zeros((0, *tensor.shape), tensor.dtype)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def of_lines(content, chance):
    lines = content.decode().split("\n")
    at = chance.randrange(len(lines))
    try:
        lines[at] = json.dumps(swapped(json.loads(lines[at]), chance))
    except ValueError:
        lines.insert(at, str(chance.choice(OTHERS)))
    return "\n".join(lines).encode("utf-8", "replace")


def of_archive(content, chance):
    """A zip or tar with a member that was changed, doubled, renamed or added."""
    is_zip = content[:2] == b"PK"
    if is_zip:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            parts = [[name, file.read(name)] for name in file.namelist()]
    else:
        with tarfile.open(fileobj=io.BytesIO(content)) as file:
            parts = [[one.name, file.extractfile(one).read()] for one in file if one.isfile()]
    part = chance.choice(parts)
    kind = chance.randrange(5)
    if kind == 0:
        part[1] = chance.choice([flipped, cut])(part[1], chance)
    elif kind == 1:
        parts.append(list(part))
    elif kind == 2:
        part[0] = chance.choice(["../../canary", "/canary", part[0] + "x", "x"])
    elif kind == 3:
        parts.remove(part)
    elif part[0].endswith(".json"):
        part[1] = json.dumps(swapped(json.loads(part[1]), chance)).encode()
    made = io.BytesIO()
    if is_zip:
        with zipfile.ZipFile(made, "w") as file:
            for name, data in parts:
                with contextlib.suppress(UserWarning):
                    file.writestr(name, data)
    else:
        with tarfile.open(fileobj=made, mode="w") as file:
            for name, data in parts:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return made.getvalue()


def by_kind(path, content, chance):
    """A change that knows the format."""
    if path.suffix == ".json":
        return json.dumps(swapped(json.loads(content), chance)).encode()
    if path.suffix in (".yaml", ".yml"):
        return yaml.safe_dump(swapped(yaml.safe_load(content), chance)).encode()
    if path.suffix in (".jsonl", ".csv", ".txt"):
        return of_lines(content, chance)
    if path.suffix == ".safetensors":
        save_file(other_tensors(load_file(path), chance), path)
        return path.read_bytes()
    if path.suffix in (".npz", ".pt2", ".tar"):
        return of_archive(content, chance)
    return flipped(content, chance)


def change(folder, chance):
    """Change a file of the folder; the hashes that stand for it are made anew half of the time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    by_suffix = {}
    for path in files:
        by_suffix.setdefault((path.suffix, path.parent.name), []).append(path)
    path = chance.choice(by_suffix[chance.choice(sorted(by_suffix))])
    content = path.read_bytes()
    how = chance.choice([flipped, cut, spliced, by_kind, by_kind, by_kind])
    try:
        path.write_bytes(by_kind(path, content, chance) if how is by_kind else how(content, chance))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        path.write_bytes(flipped(content, chance))
    anew = chance.random() < 0.5
    if anew:
        sign(folder, path)
    return f"{path.relative_to(folder)}: {how.__name__}{', hashes made anew' * anew}"


def sign(folder, path):
    for name in ("MANIFEST.json", "export.json"):
        table = path.parent / name
        with contextlib.suppress(Exception):
            about = json.loads(table.read_text())
            if path.name in about["files"]:
                data = path.read_bytes()
                digest = sha256(data).hexdigest()
                manifest = name == "MANIFEST.json"
                about["files"][path.name] = {"bytes": len(data), "sha256": digest} if manifest else digest
                if not manifest:
                    del about["sha256"]
                    rest = json.dumps(about, sort_keys=True).encode()
                    about["sha256"] = sha256(rest).hexdigest()
                table.write_text(json.dumps(about))


# ---- the watch ---------------------------------------------------------------------------------------------

RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "os.fork"}
RUNNING |= {"socket.connect", "socket.bind", "socket.getaddrinfo", "os.startfile", "webbrowser.open"}
CHANGING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink"}
CHANGING |= {"os.truncate", "shutil.rmtree", "shutil.move"}
OPENED = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """An audit hook, which stays for the rest of the process, and sees something only while `allowed`."""

    def __init__(self):
        self.allowed = None  # folders in which files may be written
        self.seen = []
        sys.addaudithook(self._hook)

    def _hook(self, event, given):
        if self.allowed is None:
            return
        if event in RUNNING:
            self.seen.append((event, str(given)[:200]))
        elif event == "import":
            if given[1] is not None and any(str(given[1]).startswith(one) for one in self.allowed):
                self.seen.append((event, given[0]))
        elif event == "open":
            if isinstance(given[0], str | bytes) and (given[2] or 0) & OPENED:
                self._outside(event, given[0])
        elif event in CHANGING:
            self._outside(event, given[1] if event == "os.rename" else given[0])

    def _outside(self, event, path):
        if isinstance(path, int):
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith((*self.allowed, "/dev/null", "/proc/self")):
            self.seen.append((event, path))


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture
def fuzzed(watch, tmp_path, cache):
    """Copy `folder` to ./NAME, change it, and call `read` on it, again and again until the time is over.

    `read` returns "good" if nothing refuses what it has read; `restored` then holds what was read against
    the whole folder.
    """

    def fuzzed(kind, folder, read, restored=None):
        began, number, outcomes = time.time(), SEED, {}
        canary = tmp_path / "canary"
        canary.write_text("of somebody")
        while time.time() - began < SECONDS:
            chance = random.Random(f"{kind} {number}")
            copy = tmp_path / "given"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            done = change(copy, chance)
            words = io.StringIO()
            watch.seen.clear()
            try:
                with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
                    watch.allowed = (str(copy), str(cache), str(tmp_path / "out"), "/tmp/torch")
                    outcome = read(copy)
            except Exception as error:
                outcome = "Stop" if explain(error) else type(error).__name__
            finally:
                watch.allowed = None
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            assert not watch.seen, (number, done, watch.seen)
            assert canary.read_text() == "of somebody", (number, done)
            left = {path.name for path in tmp_path.iterdir()} - {"canary", "given", "out"}
            assert not left, (number, done, left)
            if restored:
                restored(copy, outcome, (number, done, words.getvalue()[-500:]))
            number += 1
        print(f"{kind}: {number - SEED} cases, {outcomes}")
        assert number - SEED >= 5
        assert outcomes.keys() & {"Stop"}

    return fuzzed


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, cache):
    runs = trained(tmp_path_factory.mktemp("fuzzed"), cache, *ARGUMENTS, f"data.root={digits}")
    return runs / "a"


@pytest.fixture(scope="module", params=["timm", "safetensors", "pt2", "onnx"])
def exported(request, run, tmp_path_factory):
    from reconverge.evaluation import export
    from reconverge.run.reader import opened

    of, folder = opened(run), tmp_path_factory.mktemp("exported") / request.param
    export.export(of, export.choose(run, of, None, False, 1), request.param, folder, "other")
    return request.param, folder


# ---- the folders -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run(run, fuzzed):
    """Its checkpoints, as eval.py, export and init= read them."""
    from reconverge.evaluation import export, model
    from reconverge.run import checkpoint
    from reconverge.run.reader import opened
    from reconverge.weights.read import read as weights_of

    whole = {path.name: checkpoint.load(path)[0] for path in (run / "checkpoints").iterdir()}

    def loaded(folder):
        of = opened(folder)
        loaded.last = model.of_run(of, folder)
        export.choose(folder, of, None, False, 2)
        weights_of(f"{folder}:ema")
        return "good"

    def right(copy, outcome, about):
        """Weights that are called good have the model's names, types and finite numbers."""
        if outcome != "good":
            return
        found = loaded.last
        expected = whole[f"step-{found.step:08d}"]
        for name, net in found.nets.items():
            for key, tensor in net.state_dict().items():
                wanted = expected[{"raw": "model"}.get(name, name)][key]
                assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype), about
                assert bool(tensor.isfinite().all()), about
                if "anew" not in about[1]:
                    assert tensor.equal(wanted), about

    fuzzed("run", run, loaded, right)


@pytest.mark.slow
def test_a_record(run, fuzzed):
    """The rest of a run's folder, as the report reads it."""
    from reconverge.report import numbers, page

    fuzzed("record", run, lambda folder: page.html(numbers.read([folder])) and "good")


@pytest.mark.slow
def test_an_export(exported, fuzzed):
    """`export --check`: what it calls good computes the example, or is unchanged."""
    from reconverge.evaluation.export import check

    form, whole = exported

    def right(copy, outcome, about):
        """What has other hashes is refused; spaces between the values of a JSON file may differ."""
        if outcome == "Stop" or "hashes made anew" in about[1]:
            return
        for path in whole.iterdir():
            there = (copy / path.name).read_bytes()
            same = there == path.read_bytes()
            assert same or (path.suffix == ".json" and json.loads(there) == json.loads(path.read_bytes())), (
                about
            )

    fuzzed(f"export {form}", whole, lambda folder: check(folder) and "good", right)


@pytest.mark.slow
def test_a_timm_folder(exported, fuzzed):
    """As eval.py and init= read it: weights that are loaded are finite."""
    from reconverge.evaluation.model import of_timm
    from reconverge.weights.read import read

    form, whole = exported
    if form != "timm":
        pytest.skip("the other forms are no timm folders")

    def load(folder):
        read(str(folder))
        found = of_timm(str(folder))
        assert all(bool(tensor.isfinite().all()) for tensor in found.nets["weights"].state_dict().values())
        return "good"

    fuzzed("timm", whole, load)


@pytest.mark.slow
def test_a_prepared_set(shards, fuzzed):
    """Images and labels that are read are those that were prepared, or the set is refused."""
    from reconverge.config.settings import Data
    from reconverge.data.sources import open_sources

    def read_all(folder):
        train, validation = open_sources(Data("shards", "shards", root=str(folder), dataset="folder"))
        found = [
            (source.labels(np.array([sample])).tolist(), source.read(sample))
            for source in (train, validation)
            for sample in range(len(source))
        ]
        return found, train.classes

    whole = read_all(shards)

    def load(folder):
        load.found = read_all(folder)
        return "good"

    def right(copy, outcome, about):
        if outcome == "good":
            assert load.found[0] == whole[0], about

    fuzzed("shards", shards, load, right)
