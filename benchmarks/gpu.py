"""Measures what a GPU can show and a CPU cannot: does it run, are the bits equal, how fast is it?

    python benchmarks/gpu.py --minutes 8 --out FOLDER

Each part runs in a process of its own and within its own share of the time, in this order:

    1   reconverge selftest                      6   inference, beside the published figures
    2   R1 and R2 in each precision and layout   7   the data loader, and data-wait of a training
    2b  ConvNeXt's depthwise convolution         8   memory, beside reconverge plan
    3   forward_images                           9   saving checkpoints
    4   hidden waits of the training step        10  the demo, and a training on photographs
    5   speed of a step beside a bare loop       11  a trace

FOLDER gets results.jsonl (a line for each measurement, written at once), table.md, trace.json.gz, and log.txt
with what the processes printed. A part that fails or takes too long is ended, and the next one begins; time
that a part leaves over goes to the later ones. Exit code: 0, or 1 if something is not as expected.
`--device cpu --minutes 1` tries all of it with small models; its figures mean nothing.
"""

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpu_parts.lab import Lab

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "benchmarks")]
# Imported once: every part is a fork of this process. Imports are most of the time of a short training.
MODULES = (
    "hydra", "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.Image", "sklearn.datasets",
    "torch", "torch._dynamo", "torchvision", "safetensors.torch", "rich.progress",
    "torchmetrics.functional.classification", "timm", "timm.data", "gpu_parts.bits", "gpu_parts.speed",
    "gpu_parts.loop", "gpu_parts.resources",
)  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36


class Part(NamedTuple):
    name: str
    function: str  # module and function in gpu_parts/
    gpu: float  # its share of the time, on a GPU and on a CPU
    cpu: float


PARTS = (
    Part("1", "bits.selftest", 18, 3),
    Part("2", "bits.same_bits", 27, 13),
    Part("2b", "speed.depthwise", 4, 2),
    Part("3", "bits.forward_images", 5, 8),
    Part("4", "loop.hidden_waits", 3, 5),
    Part("5", "speed.step", 17, 5),
    Part("6", "speed.inference", 8, 3),
    Part("7", "resources.feed", 9, 7),
    Part("8", "resources.memory", 5, 4),
    Part("9", "loop.saving", 4, 4),
    Part("10", "loop.training", 8, 6),
    Part("11", "loop.trace", 4, 4),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time of all parts together (default: 8)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--parts", metavar="N,N", help="only these, for example 1,2b,5")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER",
        help="photographs in train/CLASS/ and val/CLASS/, for parts 7 and 10; default: JPEGs are made",
    )  # fmt: skip
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    chosen = [part for part in PARTS if part.name in (arguments.parts or part.name).split(",")]
    if arguments.parts and len(chosen) != len(arguments.parts.split(",")):
        parser.error(f"--parts {arguments.parts}: the parts are {', '.join(part.name for part in PARTS)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").write_text("")
    device = _prepared(arguments.device)
    from gpu_parts.lab import Lab

    print(f"results in {out}; {device}, {len(chosen)} parts", flush=True)
    # Whatever these processes start becomes a child of this one when its parent dies, so none is left behind.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="reconverge-gpu-", ignore_cleanup_errors=True) as scratch:
        _digits(Path(scratch))
        _machine(Lab("0", device, Path(scratch), out, time.monotonic() + 30, None))
        for number, part in enumerate(chosen):
            shares = [one.gpu if device == "cuda" else one.cpu for one in chosen[number:]]
            _run(
                part,
                max(0.0, end - time.monotonic() - 2) * shares[0] / sum(shares),
                device,
                scratch,
                arguments,
            )
        _keep_logs(Path(scratch), out / "log.txt")
    return _table(out)


def _prepared(device: str | None) -> str:
    """Import what all parts need, without a CUDA context: a process that has one cannot fork another."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    sys.modules["wandb"] = None  # type: ignore[assignment]  # timm imports it where it is installed
    for module in MODULES:
        importlib.import_module(module)
    del sys.modules["wandb"]
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _machine(lab: "Lab") -> None:
    """The card and the versions."""

    def ask() -> dict[str, str]:
        import torch

        from reconverge.base import environment

        found = {**environment.versions(), "torch": torch.__version__, "hardware": environment.processor()}
        if lab.cuda:
            found["hardware"], found["cuda"] = torch.cuda.get_device_name(), str(torch.version.cuda)
            found["cudnn"] = str(torch.backends.cudnn.version())
        return found

    if found := lab.ask("machine", ask):
        keys = [key for key in ("hardware", "torch", "cuda", "cudnn", "timm", "python") if key in found]
        lab.tell("machine", ", ".join(f"{key} {found[key]}" for key in keys), None, **found)
    _show(lab.out, 0)


def _digits(scratch: Path) -> None:
    """The bundled digits as files, once for all parts."""
    from reconverge.config.settings import Data
    from reconverge.data.sources import open_sources

    open_sources(Data("digits", "digits", cache=str(scratch / "cache")))


def _run(part: Part, seconds: float, device: str, scratch: str, arguments: argparse.Namespace) -> None:
    """One part in a fork. It ends on its own, or is killed with everything that it started."""
    from gpu_parts.lab import Child, Lab, in_child, write_line

    out, folder = arguments.out.resolve(), Path(scratch) / part.name
    folder.mkdir()
    began, log = time.monotonic(), folder / "part.txt"
    images = arguments.images.resolve() if arguments.images else None
    lab = Lab(part.name, device, folder, out, began + seconds - 0.5, images)
    pid = os.fork()
    if pid == 0:
        module, function = part.function.split(".")
        in_child(lambda: getattr(importlib.import_module(f"gpu_parts.{module}"), function)(lab), log, folder)
    child, shown = Child(pid, log, folder / "none"), len(_lines(out))
    while child.poll() is None and time.monotonic() < began + seconds:
        time.sleep(0.1)
        shown = _show(out, shown)
    code = child.poll()
    _end_all()
    spent = time.monotonic() - began
    says = f"killed after its {seconds:.0f} s" if code is None else f"exit {code}: {child.words()}"
    ended = {"part": part.name, "name": "time", "says": f"{spent:.0f} s", "met": None, "seconds": spent}
    if code != 0:
        ended |= {"says": says, "met": None if code is None else False}
    write_line(out, ended)
    _show(out, shown)


def _end_all() -> None:
    """Kill every descendant of this process, and wait for them."""
    while alive := _descendants(os.getpid()):
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        time.sleep(0.02)


def _descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found, ahead = [], [pid]
    while ahead:
        children = parents.get(ahead.pop(), [])
        found += children
        ahead += children
    return found


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if line[-1:] == "}"]


def _show(out: Path, shown: int) -> int:
    """Print the lines after the first `shown`; how many there are now."""
    lines = _lines(out)
    for line in lines[shown:]:
        print(_row(line), flush=True)
    return len(lines)


def _row(line: dict) -> str:
    verdict = {True: "yes", False: "NO", None: ""}[line["met"]]
    return "| " + " | ".join([line["part"], line["name"], line["says"].replace("|", "/"), verdict]) + " |"


def _table(out: Path) -> int:
    lines = _lines(out)
    wrong = [line for line in lines if line["met"] is False]
    head = ["| part | what | found | as expected |", "|---|---|---|---|"]
    when = datetime.now(timezone.utc).isoformat(timespec="minutes")
    met = sum(line["met"] is True for line in lines)
    last = f"{when}: {met} as expected, {len(wrong)} not, of {len(lines)} lines"
    (out / "table.md").write_text("\n".join([*head, *map(_row, lines), "", last, ""]))
    print(f"{last}; {out / 'table.md'}", flush=True)
    for line in wrong:
        print(f"not as expected: {_row(line)}")
    return 1 if wrong else 0


def _keep_logs(scratch: Path, log: Path) -> None:
    """The last 20,000 characters that each process printed."""
    with open(log, "w") as file:
        for path in sorted(scratch.glob("*/*.txt"), key=lambda path: path.stat().st_mtime):
            file.write(f"==== {path.relative_to(scratch)}\n{path.read_text(errors='replace')[-20000:]}\n")


if __name__ == "__main__":
    sys.exit(main())
