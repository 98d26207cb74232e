"""Standard streams that break, and signals at any moment, never end a training without a saved step."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FAULTS, ROOT, weights

WORDS = "from reconverge.base import streams; streams.secure(); import os, sys\n"
TRAIN = ["steps=60", "epochs=10", "save_every=0", "evaluate_every=never", "log_every=1"]


def shell(program, around):
    """`program` of Python in `around`, a line of bash; its exit code and what came out."""
    line = around.replace("PROGRAM", f"{shlex.quote(sys.executable)} -c {shlex.quote(WORDS + program)}")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


MUCH = "for _ in range(5000): print('x' * 99)\nsys.stdout.flush(); print('y', file=sys.stderr); sys.exit(7)"


@pytest.mark.parametrize(
    "around",
    ["PROGRAM > /dev/full", "PROGRAM 2> /dev/full > /dev/null", "PROGRAM >&- 2>&-", "PROGRAM <&- >&-"],
)
def test_a_stream_that_cannot_be_written_goes_quiet(around):
    assert shell(MUCH, around)[0] == 7


def test_a_pipe_that_nobody_reads_goes_quiet(tmp_path):
    assert shell(MUCH, f"(PROGRAM; echo $? > {tmp_path}/code) | head -1")[1].startswith("xxx")
    assert (tmp_path / "code").read_text() == "7\n"


def test_a_closed_stream_is_not_the_next_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        f"file = open({str(path)!r}, 'w'); os.write(2, b'words'); os.write(1, b'more'); file.write('data')"
    )
    for closed in ("2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        assert shell(program, f"PROGRAM {closed}")[0] == 0
        assert path.read_text() == "data"


@pytest.mark.slow
def test_ctrl_c_in_a_pipe_whose_reader_goes_first_saves_the_step(small, tmp_path):
    """`train.py ... 2>&1 | tee log` and Ctrl-C: the terminal signals both, and tee may end first."""
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *small, *TRAIN, "run=a", "steps=4000"])
    line = f"({command}; echo $? > code) 2>&1 | tee log"
    process = subprocess.Popen(["bash", "-c", line], start_new_session=True, stdout=subprocess.DEVNULL)
    while not (Path("log").exists() and "step 3/" in Path("log").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid), "tee"], check=True)
    pid = subprocess.run(
        ["pgrep", "-s", str(process.pid), "-f", "train.py.*run=a"], capture_output=True, text=True
    )
    os.kill(max(map(int, pid.stdout.split())), signal.SIGINT)
    process.wait(timeout=120)
    assert Path("code").read_text() == "75\n"
    assert list(Path("runs/a/checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("repeated", [False, True], ids=["one signal", "a signal every 100 ms"])
def test_signals_at_random_moments_lose_no_checkpoint(start, train, repeated):
    """From the first instant to the last: before the handlers stand, in a step, while a checkpoint is
    written, while it ends. Each start is 75, or was cut off by the signal before it began, or is done.
    """
    assert train(*TRAIN, "run=whole") == 0
    moments = random.Random(repeated)
    for number in range(FAULTS):
        name = moments.choice([signal.SIGTERM, signal.SIGINT])
        before = sorted(Path("runs/a/checkpoints").glob("step-*"))
        process = start(*TRAIN, "run=a", "copy_ahead=false")
        time.sleep(moments.uniform(0, 1.5))
        while process.poll() is None:
            process.send_signal(signal.SIGTERM if repeated else name)
            if not repeated:
                break
            time.sleep(0.1)
        said = process.communicate(timeout=120)[0]
        assert process.returncode in (0, 75, -signal.SIGTERM, -signal.SIGINT, 128 + name), (number, said)
        assert "Traceback" not in said or process.returncode < 0, said
        after = sorted(Path("runs/a/checkpoints").glob("step-*"))
        assert not before or after[-1] >= before[-1]
    assert train(*TRAIN, "run=a", "copy_ahead=false") == 0
    for kind in ("model", "ema", "optimizer"):
        assert weights("a", kind) == weights("whole", kind)
