"""What CUDA and NCCL need, as far as it shows without a GPU: modes, libraries, faults, lost ranks."""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import JOB, ROOT
from zygote import Forked

from reconverge.base.errors import Exit, explain
from reconverge.distributed import libraries

# train.py on GPUs that answer questions and do nothing else. What makes a process group first prints the
# modes that it finds; making NCCL's ends the process.
PRETENDED = """
import json, os, runpy, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist

gpus = int(os.environ["GPUS"])
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: gpus
torch.cuda.set_device = lambda device: None
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"0000-{device.index}")
make = dist.init_process_group

def modes(what):
    found = {name: os.environ.get(name) for name in ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG")}
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    print(json.dumps({what: found}), flush=True)

def init_process_group(*arguments, **options):
    modes("gloo")
    make(*arguments, **options)

def new_group(**options):
    assert options["backend"] == "nccl"
    modes("nccl")
    os._exit(0)

dist.init_process_group, dist.new_group = init_process_group, new_group
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def two_ranks(zygote, program, tmp_path, digits, *arguments, **environment):
    """Two ranks of train.py, started by `program`, as forks."""
    script = tmp_path / "program.py"
    script.write_text(program)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(script), str(ROOT / "train.py"), *JOB, f"data.root={digits}", "run=a", *arguments]
    shared = {name: value for name, value in os.environ.items() if not name.startswith(("NCCL", "CUBLAS"))}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [
        Forked(zygote, command, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in "01"
    ]


def pretended(zygote, *arguments, **environment):
    """The exit codes and the outputs of two ranks with PRETENDED GPUs."""
    ranks = two_ranks(zygote, PRETENDED, *arguments, "device=cuda", **environment)
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], said


@pytest.mark.parametrize(
    ("arguments", "environment", "algorithm"),
    [
        ((), {}, "Ring"),
        ((), {"NCCL_ALGO": "Tree"}, "Tree"),
        (("deterministic=false",), {}, None),
    ],
)
def test_modes_are_set_before_any_group_is_made(zygote, tmp_path, digits, arguments, environment, algorithm):
    codes, said = pretended(zygote, tmp_path, digits, *arguments, GPUS="2", **environment)
    assert codes == [0, 0], said
    found = {}
    for line in said[0].splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    modes = {
        "NCCL_ALGO": algorithm,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "deterministic": not arguments,
    }
    assert found == {"gloo": modes, "nccl": modes}


def test_two_ranks_on_one_gpu_are_refused(zygote, tmp_path, digits):
    codes, said = pretended(zygote, tmp_path, digits, GPUS="1")
    assert codes == [2, 2], said
    assert f"ranks 0, 1 have the same GPU: GPU-0000-0 on host {socket.gethostname()}" in said[0]
    assert "given" not in said[1]  # once


def test_the_libraries_of_a_gpu_are_recorded(monkeypatch):
    """Versions as these libraries and pip give them."""
    if not torch.backends.cudnn.is_available() and not torch.version.cuda:
        pytest.skip("torch is built without CUDA")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.delenv("NCCL_PROTO", raising=False)
    found = libraries.decisive(torch.device("cuda", 0))
    assert (found["CUDA"], found["compute capability"]) == (torch.version.cuda, "9.0")
    assert (found["NCCL_ALGO"], found.get("NCCL_PROTO")) == ("Ring", None)
    listing = [sys.executable, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    packages = {package["name"]: package["version"] for package in json.loads(done.stdout)}
    for part, name in (("cudnn", "cuDNN"), ("nccl", "NCCL")):
        (package,) = [package for package in packages if package.startswith(f"nvidia-{part}-")]
        assert found[package] == packages[package]
        assert found[package].split(".")[:3] == found[name].split(".")[:3]
    assert found["triton"] == packages["triton"]
    assert any(name.startswith("nvidia-cublas") for name in found)


def test_another_cudnn_is_refused_and_named(train, capsys, tmp_path):
    """As if the run had been started with another cuDNN: 78. A record without libraries is completed."""
    assert train("run=a", "steps=1", "evaluate_every=never") == 0
    path = tmp_path / "runs" / "a" / "environment.json"
    recorded = json.loads(path.read_text())
    own = recorded["facts"].pop("libraries")
    assert own["oneDNN"] in torch.__config__.show()
    path.write_text(json.dumps(recorded))
    again = ["run=a", "evaluate_every=never"]
    assert train(*again, "steps=2") == 0
    completed = json.loads(path.read_text())
    assert (completed["facts"]["libraries"], completed["lost"]) == (own, [])
    completed["facts"]["libraries"] = own | {"cuDNN": "9.1.0"}
    path.write_text(json.dumps(completed))
    capsys.readouterr()
    assert train(*again, "steps=3") == 78
    said = capsys.readouterr().err
    assert "was started with cuDNN 9.1.0; now cuDNN (absent)" in said
    assert train(*again, "steps=3", "resume_allow=[libraries]") == 0
    assert [loss["because"] for loss in json.loads(path.read_text())["lost"]] == ["libraries"]


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ([8], "1 x 8"),
        ([4, 4], "2 x 4"),
        ([2, 2, 2, 1], "2 + 2 + 2 + 1"),
    ],
)
def test_ranks_are_recorded_with_their_hosts(hosts, text):
    from reconverge.distributed.world import World

    world = SimpleNamespace(device=torch.device("cuda", 0), size=sum(hosts))
    world.gather_objects = lambda mine: [(number, ranks) for ranks in hosts for number in range(ranks)]
    assert World.layout(world) == text
    world.device = torch.device("cpu")
    assert World.layout(world) == sum(hosts)


# Texts that torch, cuBLAS, cuDNN, NCCL and the CUDA runtime give.
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with"
    " NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function"
    " failed.\nLast error:\n"
)
FAULTS = [
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", 71),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", 71),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", 71),
    (RuntimeError, "CUDA ran out of memory outside PyTorch's allocator. If this workload uses", 71),
    (RuntimeError, "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in", 71),
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has", 71),
    (torch.distributed.DistBackendError, f"{NCCL}Cuda failure 2 'out of memory'", 71),
    (torch.distributed.DistBackendError, f"{NCCL}Failed to CUDA calloc async 608 bytes", 71),
    (torch.AcceleratorError, "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might", 69),
    (torch.AcceleratorError, "CUDA error: unspecified launch failure\nCUDA kernel errors might be", 69),
    (torch.AcceleratorError, "CUDA error: uncorrectable NVLink error detected during the execution", 69),
    (torch.AcceleratorError, "CUDA error: CUDA-capable device(s) is/are busy or unavailable", 69),
    (torch.AcceleratorError, "CUDA error: unknown error\nSearch for `cudaErrorUnknown' in", 69),
    (RuntimeError, "CUDA error: the launch timed out and was terminated", 69),
    (RuntimeError, "Unable to determine the device handle: GPU is lost", 69),
    (RuntimeError, "NVRM: Xid (PCI:0000:03:00): 79, GPU has fallen off the bus.", 69),
    (torch.distributed.DistBackendError, f"{NCCL}Cuda failure 719 'unspecified launch failure'", 69),
]


@pytest.mark.parametrize(("kind", "text", "code"), FAULTS)
def test_faults_of_a_gpu_have_their_exit_code(kind, text, code):
    stop = explain(raised(kind, text))
    assert stop.code == code
    assert text.splitlines()[-1].partition(".")[0] in stop.args[1] or text.splitlines()[0] in stop.args[1]


def raised(kind, text):
    """torch.AcceleratorError takes an error code as well."""
    return kind(text, 0) if kind is torch.AcceleratorError else kind(text)


@pytest.mark.parametrize(("kind", "text", "code"), [FAULTS[0], FAULTS[6], FAULTS[8], FAULTS[9], FAULTS[15]])
def test_a_fault_in_training_is_named_with_host_gpu_and_step(train, capsys, monkeypatch, kind, text, code):
    """Raised by the third forward pass, in the second step, of a training whose process has one GPU."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="5c1e-77"))
    passes = []

    def hook(module, inputs):
        if type(module).__name__ == "ConvNeXt" and module.training and not inputs[0].is_meta:
            passes.append(1)
            if len(passes) == 3:
                raise raised(kind, text)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        assert train("run=a", "evaluate_every=never", "log_every=1") == code
    finally:
        handle.remove()
    said = capsys.readouterr().err
    assert f"(host {socket.gethostname()}, GPU 3: GPU-5c1e-77, after step 1)" in said
    with open("runs/a/status.json") as file:
        status = json.load(file)
    assert (status["exit_code"], status["step"]) == (code, 1)
    assert "GPU-5c1e-77, after step 1" in status["summary"]


def test_a_rank_without_memory_is_not_taken_for_a_lost_one():
    from reconverge.distributed import group

    full = torch.distributed.DistBackendError(f"{NCCL}Cuda failure 2 'out of memory'")
    gone = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0.")
    assert [group._of_a_collective(error) for error in (full, gone)] == [False, True]
    assert explain(gone) is None
    assert explain(full).code == Exit.OUT_OF_MEMORY


# train.py whose process group, once a rank is lost, neither shuts down nor lets the profiler stop.
BLOCKING = """
import os, runpy, sys, time
import torch
import torch.distributed as dist
from reconverge.distributed import group

def wait(*arguments):
    print("blocked", flush=True)
    time.sleep(600)

dist.destroy_process_group = wait
if os.environ["BLOCKS"] == "everything":
    group.END = 4.0
    torch.profiler.profile.__exit__ = wait
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow  # it waits for the answers of ranks that are gone
@pytest.mark.parametrize("blocks", ["the group", "everything"])
def test_a_rank_ends_within_seconds_although_its_group_never_shuts_down(zygote, tmp_path, digits, blocks):
    """Rank 1 is killed. Rank 0 names it, leaves its status and its exit code, and ends with 69."""
    left = tmp_path / "exit"
    job = ["epochs=100", "steps=500", "save_every=0", "evaluate_every=never"]
    job += ["debug.profile=500"] * (blocks == "everything")
    waiting = {"BLOCKS": blocks, "RECONVERGE_EXIT_FILE": str(left)}
    ranks = two_ranks(zygote, BLOCKING, tmp_path, digits, *job, **waiting)
    try:
        for line in ranks[0].stdout:
            if line.startswith("step 2/"):
                break
        ranks[1].kill()
        killed = time.monotonic()
        said = ranks[0].communicate(timeout=60)[0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stdout.close()
    assert ranks[0].returncode == 69, said
    assert time.monotonic() - killed < 30
    assert said.count("rank 1 of 2 was lost") == 2  # with the traceback
    assert ("blocked" in said) == (blocks == "everything")
    assert left.read_text() == "69"
    with open("runs/a/status.json") as file:
        status = json.load(file)
    assert (status["reason"], status["exit_code"]) == ("failed", 69)
