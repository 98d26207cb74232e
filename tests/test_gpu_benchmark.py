"""benchmarks/gpu.py, which measures a GPU in a few minutes, tried on the CPU: it ends in time whatever its
parts do, and each of them finds something.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

FAULTY = """
import subprocess, sys, time, types
sys.path.insert(0, "{root}/benchmarks")
import gpu

def crash(lab):
    lab.tell("first", "was found before the crash", True)
    raise ValueError("of this part alone")

def hang(lab):
    subprocess.Popen(["sleep", "1234567"], start_new_session=True)  # in no process group of ours
    lab.start("child", lambda: time.sleep(1000))
    time.sleep(1000)

def killed(lab):
    import os
    os.kill(os.getpid(), 11)

def answers(lab):
    lab.tell("answer", str(lab.ask("sum", lambda: sum(range(10)))), True)
    lab.ask("fails", lambda: sys.exit(3))

faulty = types.ModuleType("gpu_parts.faulty")
faulty.__dict__.update(crash=crash, hang=hang, killed=killed, answers=answers)
gpu.MODULES = ()
gpu._prepared = lambda device: "cpu"
gpu._digits = gpu._machine = lambda *_: None
gpu.PARTS = tuple(gpu.Part(name, "faulty." + name, 1, 1) for name in ("crash", "hang", "killed", "answers"))
import gpu_parts
sys.modules["gpu_parts.faulty"] = faulty
sys.exit(gpu.main())
"""


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_part_that_crashes_or_hangs_costs_no_other(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FAULTY.format(root=ROOT), "--minutes", "0.2", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - began < 14
    found = {(line["part"], line["name"]): (line["met"], line["says"]) for line in lines(tmp_path / "out")}
    assert done.returncode == 1, done.stderr
    assert found["crash", "first"] == (True, "was found before the crash")
    assert found["crash", "time"][0] is False
    assert "ValueError: of this part alone" in found["crash", "time"][1]
    assert found["hang", "time"][0] is None
    assert found["hang", "time"][1].startswith("killed after its")
    assert found["killed", "time"] == (False, "exit -11: ")
    assert found["answers", "answer"] == (True, "45")
    assert found["answers", "fails"][0] is False
    assert found["answers", "time"][1] == "0 s"
    table = (tmp_path / "out/table.md").read_text()
    assert table.splitlines()[0] == "| part | what | found | as expected |"
    assert "| crash | first | was found before the crash | yes |" in table
    assert "not as expected: | crash | time |" in done.stdout
    assert "ValueError" in (tmp_path / "out/log.txt").read_text()
    left = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [text for text in left if "1234567" in text]


@pytest.mark.slow
def test_all_parts_on_a_cpu_in_a_minute(tmp_path):
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--minutes", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert time.monotonic() - began < 70  # a minute, and the start of Python
    found = lines(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["1", "2", "2b", *map(str, range(3, 12))]
    ends = [line["part"] for line in found if line["name"] == "time"]
    assert ends == parts
    # A busy machine may leave some without time, but none is not as expected.
    measured = {
        line["part"] for line in found if line["name"] != "time" and "time was left" not in line["says"]
    }
    assert len(measured & set(parts)) >= 8
    table = (tmp_path / "out/table.md").read_text()
    assert all(f"\n| {part} | " in table for part in parts)
    said = {(line["part"], line["name"]): line for line in found}
    assert said["1", "all_reduce of one rank"]["met"]
    if "R2 convnext_t fp32" in {line["name"] for line in found}:
        assert said["2", "R2 convnext_t fp32"]["says"].startswith("equal, sha256 ")


def test_parts_that_do_not_exist_are_refused(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--out",
        str(tmp_path / "out"),
        "--parts",
        "1,12",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "out").exists()) == (2, False)
    assert "the parts are 1, 2, 2b, 3" in done.stderr
