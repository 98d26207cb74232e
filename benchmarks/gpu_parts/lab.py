"""What every part of benchmarks/gpu.py uses: its time, its folders, processes of its own, and its results."""

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SMALL = "test_convnext"  # timm's; what a CPU trains in place of every model


class Child:
    """A forked process. It must be forked before this process uses the GPU."""

    def __init__(self, pid: int, log: Path, answer: Path):
        self.pid, self._log, self._answer = pid, log, answer
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 9)
        while self.poll() is None:
            time.sleep(0.01)

    def wait(self, seconds: float) -> int | None:
        """As poll() after at most so many seconds; then it is killed and None is returned."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                return None
            time.sleep(0.02)
        return self.poll()

    def answer(self) -> Any:
        """What its function returned; None if it did not end well."""
        return json.loads(self._answer.read_text()) if self._answer.exists() else None

    def text(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def words(self) -> str:
        """The end of that, on one line."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-300:]


class Lab(NamedTuple):
    part: str
    device: str  # cuda or cpu
    scratch: Path  # for this part alone
    out: Path
    until: float  # of time.monotonic(): the part is killed then
    images: Path | None  # class folders with photographs; None: JPEGs are made

    @property
    def cache(self) -> Path:
        """data.cache= of every training here."""
        return self.scratch.parent / "cache"

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds that this part still has."""
        return self.until - time.monotonic()

    def tell(self, name: str, says: str, met: bool | None = None, **figures: Any) -> None:
        """One measurement, into results.jsonl at once. `met`: as expected, or not; None if nothing is."""
        line = {"part": self.part, "name": name, "says": says, "met": met, **figures}
        write_line(self.out, line)

    def start(self, name: str, job: Callable[[], Any]) -> Child:
        """Run a function in a process of its own, in the folder `scratch`; what it prints goes to a file."""
        name = "".join(c if c.isalnum() else "-" for c in name)
        log, answer = self.scratch / f"{name}.txt", self.scratch / f"{name}.json"
        answer.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            in_child(lambda: answer.write_text(json.dumps(job())), log, self.scratch)
        return Child(pid, log, answer)

    def ask(self, name: str, job: Callable[[], Any]) -> Any:
        """The answer of a function in a process of its own; None, and a line that says why, if it failed."""
        child = self.start(name, job)
        return child.answer() if self.well(name, child) else None

    def well(self, name: str, child: Child) -> bool:
        """Wait for a process, at most until the end of this part. If it failed, a line says so."""
        code = child.wait(self.left())
        if code != 0:
            ended = "killed at the end of its time" if code is None else f"exit {code}: {child.words()}"
            self.tell(name, ended, None if code is None else False)
        return code == 0

    def model(self, name: str) -> list[str]:
        """The arguments that choose a model."""
        return [f"model={name}"] if self.cuda else ["model=timm", f"model.timm={SMALL}"]

    def arguments(self, model: str, run: str, steps: int, *more: str) -> list[str]:
        """Of a train.py that trains `steps` steps on the bundled digits, with the recipe of ImageNet-1K at
        224 px. A step is two microbatches of 128 images. On a CPU all of it is small.
        """
        size, batch = (224, 256) if self.cuda else (32, 4)
        return [
            *self.model(model), "recipe=in1k", "data=digits", f"run={run}", f"data.cache={self.cache}",
            f"device={self.device}", f"steps={steps}",
            f"augment.size={size}", f"evaluate.size={size}", f"batch={batch}", f"microbatch={batch // 2}",
            "model.drop_path=0.1", "evaluate_every=never", "save_every=0", "keep=99", "log_every=1",
            "threads=1", f"workers={4 if self.cuda else 0}", *more,
        ]  # fmt: skip

    def run(self, name: str) -> Path:
        """The folder of a run that was trained here."""
        return self.scratch / "runs" / name


def train(arguments: list[str]) -> None:
    """train.py in this process, which must do nothing else. Ends the process if it fails."""
    sys.argv = [str(ROOT / "train.py"), *arguments]
    import train as script
    from reconverge.base.errors import exit_code

    if code := exit_code(script.main):
        raise SystemExit(int(code))


def command(arguments: list[str]) -> None:
    """`reconverge ...` in this process. Ends the process if it fails."""
    from reconverge import commands

    sys.argv = ["reconverge", *arguments]
    try:
        commands.main()
    except SystemExit as ended:
        if ended.code:
            raise


def in_child(job: Callable[[], Any], log: Path, folder: Path) -> None:
    """The rest of a process that was forked: run the job with its output in `log`, and end."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        job()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write_line(out: Path, line: dict[str, Any]) -> None:
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
