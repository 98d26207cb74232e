"""Ranks on two hosts, which are network namespaces of this machine with their own addresses and names; the
link can be cut.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import FORK, ROOT, SMALL, require, started_zygote
from zygote import Forked

pytestmark = pytest.mark.slow
JOB = [
    *SMALL,
    "batch=32",
    "device=cpu",
    "model=timm",
    "model.timm=test_resnet",
    "save_every=5",
    "keep=99",
    "evaluate_every=never",
    "log_every=1",
    "optim.warmup_epochs=0",
    "epochs=40",
    "steps=40",
]
ENTER = 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"'


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Two hosts, 10.77.0.1 and 10.77.0.2."""
    tools = shutil.which("ip") and shutil.which("nsenter") and os.getuid() == 0
    require(
        "netns",
        tools and subprocess.run(["unshare", "-n", "true"]).returncode == 0,
        "network namespaces need root and iproute2",
    )
    names = [f"w{number}-{os.getpid()}" for number in (1, 2)]
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "veth", "netns", names[0], "type", "veth", "peer", "name", "veth", "netns", names[1])
    for number, name in enumerate(names, 1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "veth")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "veth", "up")
    yield names
    for name in names:
        ip("netns", "delete", name)


@pytest.fixture
def zygotes(names, tmp_path):
    """The sockets of a zygote on each host."""
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "127.0.0.1 localhost\n"
        + "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(names, 1))
    )
    with ExitStack() as stack:
        sockets = []
        for name in names:
            (tmp_path / name).mkdir()
            enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "-m", "-u", "sh", "-c", ENTER, "-"]
            enter += [str(hosts), name]
            sockets.append(stack.enter_context(started_zygote(tmp_path / name, enter=enter)))
        yield sockets


@pytest.fixture
def on_both(zygotes, digits):
    """Start a command on each host as a fork, with {number} for 0 and 1: their processes, whose output goes
    to the files out-0 and out-1.
    """
    processes = []

    def on_both(*launcher, train=(), **environment):
        for number, zygote in enumerate(zygotes):
            own = {key: value.format(number=number) for key, value in environment.items()}
            own |= {"GLOO_SOCKET_IFNAME": "veth", "OMP_NUM_THREADS": "1", "RECONVERGE_ZYGOTE": zygote}
            with open(f"out-{number}", "w") as out:
                process = Forked(
                    zygote,
                    [*launcher, str(ROOT / "train.py"), *train, *JOB, f"data.root={digits}"],
                    environment=os.environ | own,
                    executable=FORK,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        return processes[-2:]

    yield on_both
    for process in processes:
        if process.poll() is None:
            for pid in [*children(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(process):
    return [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
    ]


# What torchrun would give them; without it, exit codes are their own.
RANKS = {
    "RANK": "{number}",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "10.77.0.1",
    "MASTER_PORT": "29571",
}


def said(number=0):
    return Path(f"out-{number}").read_text()


def wait_for(text, seconds=120):
    """On any of the hosts, because with a c10d rendezvous rank 0 may be on the second one."""
    end = time.monotonic() + seconds
    while text not in said() + said(1):
        assert time.monotonic() < end, said() + said(1)
        time.sleep(0.1)


def ended(processes, seconds=150):
    return [process.wait(timeout=seconds) for process in processes]


def hashes(run):
    files = json.loads((Path("runs") / run / "checkpoints" / "step-00000040" / "MANIFEST.json").read_text())[
        "files"
    ]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def link(names, state):
    ip("-n", names[0], "link", "set", "veth", state)


def test_hosts_train_together_through_a_short_cut_a_long_one_and_a_killed_rank(names, on_both):
    """Each of three runs has a fault, and all end with the same bits."""
    # A cut of three seconds is survived without a restart.
    both = on_both(train=["run=short"], **RANKS)
    wait_for("\nstep 4/")
    link(names, "down")
    time.sleep(3)
    seen = said().count("\nstep ")
    link(names, "up")
    assert 0 < seen < 40, "it ended before the cut"
    assert ended(both) == [0, 0], said() + said(1)
    assert "2 ranks by torchrun" in said()

    # A cut longer than world_timeout ends both ranks, and each names the other.
    both = on_both(train=["run=long", "world_timeout=0.1"], **RANKS)
    wait_for("\nstep 12/")
    link(names, "down")
    assert ended(both, 60) == [69, 69], said() + said(1)
    link(names, "up")
    assert "rank 1 of 2 was lost" in said(0)
    assert "the rank that serves the store, or the network to it, was lost" in said(1)
    status = json.loads(Path("runs/long/status.json").read_text())
    assert (status["reason"], status["exit_code"]) == ("failed", 69)
    assert "rank 1 of 2 was lost" in status["summary"]
    assert "was lost" in Path("runs/long/errors/rank-1.txt").read_text()
    assert ended(on_both(train=["run=long"], **RANKS)) == [0, 0], said()
    assert "resumed after step" in said()

    # torchrun starts all ranks again when one is killed.
    c10d = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.77.0.1:29572",
        "--rdzv-id=killed",
    ]
    forking = {"PET_RDZV_BACKEND": "c10d"}  # the ranks, whose parent is the zygote, cannot read torchrun's
    torchrun = ["-m", "torch.distributed.run", *c10d, "--max-restarts=1"]
    both = on_both(*torchrun, train=["run=killed"], **forking)
    wait_for("\nstep 12/")
    (victim,) = children(both[1])
    os.kill(victim, signal.SIGKILL)
    assert ended(both) == [0, 0], said() + said(1)
    assert "resumed after step" in said() + said(1)
    assert hashes("killed") == hashes("long") == hashes("short")
