"""launch/slurm.sbatch on a real Slurm cluster of two nodes on this machine; each node is a slurmd with its
own host name.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, require

pytestmark = pytest.mark.slow

CONFIGURATION = """
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0,\
preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high PriorityTier=9 PreemptMode=OFF
"""
GPUS = "AutoDetect=off\nName=gpu File={root}/dev/gpu[0-1]\n"
JOB = [
    *SMALL,
    "batch=32",
    "microbatch=8",
    "device=cpu",
    "model=timm",
    "model.timm=test_resnet",
    "save_every=0",
    "evaluate_every=never",
    "log_every=1",
    "optim.warmup_epochs=0",
    "mix.mixup=0.8",
]
SCRIPT = str(ROOT / "launch" / "slurm.sbatch")


class Cluster:
    """Two nodes n1, n2 with four cores and two fake GPUs each; partition `high` preempts
    `low`.
    """

    def __init__(self, root):
        self.root = root
        sockets = [socket.socket() for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        for folder in ("state", "spool/n1", "spool/n2", "dev", "mine"):
            (root / folder).mkdir(parents=True)
        for number in range(2):
            os.mknod(root / "dev" / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (root / "slurm.conf").write_text(
            CONFIGURATION.format(root=root, ports=ports, host=socket.gethostname())
        )
        (root / "gres.conf").write_text(GPUS.format(root=root))
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd wants systemd
        (root / "hosts").write_text("127.0.0.1 localhost n1 n2\n")
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }
        self.ask("slurmctld")
        for node in ("n1", "n2"):
            own = f"mount -t tmpfs tmpfs {root}/mine; " if node == "n2" else ""
            own += f"mount --bind {root}/hosts /etc/hosts; hostname {node}; exec slurmd -N {node}"
            self.ask("unshare", "-m", "-u", "sh", "-c", own)
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%D%t") == "2idle", 30)

    def ask(self, *command, code=0, **others):
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            **others,
        )
        assert code is None or done.returncode == code, done.stdout
        return done.stdout.strip()

    def until(self, true, seconds, say=lambda: ""):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, say()
            time.sleep(0.2)

    def submit(self, *arguments, script=SCRIPT, options=()):
        return re.search(
            r"job (\d+)", self.ask("sbatch", *options, *([script] if script else []), *arguments)
        ).group(1)

    def state(self, job, key="JobState"):
        return re.search(rf"\b{key}=(\S+)", self.ask("scontrol", "-o", "show", "job", job)).group(1)

    def said(self, job):
        return Path(f"slurm-{job}.out").read_text() if Path(f"slurm-{job}.out").exists() else ""

    def wait_for(self, job, text, seconds=120):
        self.until(lambda: text in self.said(job), seconds, lambda: self.said(job))

    def at_once(self, job):
        """Slurm starts a requeued job only after two minutes; this starts it when its nodes are free."""
        if self.state(job) == "PENDING" and self.state(job, "Restarts") != "0":
            # In the same second, nodes would confuse it with the job that just ended.
            time.sleep(2)
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now", code=None)

    def ends(self, job, seconds=150):
        """Its exit code."""

        def over():
            self.at_once(job)
            return self.state(job) in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

        self.until(over, seconds, lambda: self.state(job) + self.said(job))
        return int(self.state(job, "ExitCode").partition(":")[0])

    def runs_again(self, job, restarts):
        def running():
            self.at_once(job)
            return (self.state(job), self.state(job, "Restarts")) == ("RUNNING", str(restarts))

        self.until(running, 60, lambda: self.state(job) + self.said(job))

    def end(self):
        self.ask("scancel", "-u", "root", code=None)
        self.until(lambda: not self.ask("squeue", "-h"), 30)
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld"):
            os.kill(int((self.root / f"{name}.pid").read_text()), signal.SIGTERM)
        self.until(lambda: not list(self.root.glob("*.pid")), 20)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    require(
        "slurm",
        shutil.which("slurmctld") and os.getuid() == 0,
        "slurmctld (apt-get install slurm-wlm) and root are needed",
    )
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def job(cluster, digits):
    """Arguments for a training of 50 steps that saves when it is stopped, and at its end."""
    return [*JOB, "epochs=40", "steps=50", f"data.root={digits}"]


def hashes(folder):
    files = json.loads((Path(folder) / "checkpoints" / "step-00000050" / "MANIFEST.json").read_text())[
        "files"
    ]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


NODES = ["--nodes=2", "--gpus-per-node=0"]


@pytest.fixture(scope="module")
def whole(cluster, job, tmp_path_factory):
    """Hashes of the files of the job, started by srun with one task per node, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    srun = ["srun", *NODES, "--ntasks-per-node=1", sys.executable, str(ROOT / "train.py"), *job, "run=whole"]
    assert "2 ranks by srun" in cluster.ask(*srun, cwd=folder)
    return hashes(folder / "runs" / "whole")


def read(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def test_a_job_survives_signals_and_preemption_with_the_bits_of_srun_alone(cluster, job, whole):
    """Stopped in three ways: a signal to its tasks, a signal to all its processes, and preemption by another
    job.
    """
    script = cluster.submit(*job, "run=cut", options=NODES)
    cluster.wait_for(script, "\nstep 5/")
    cluster.ask("scancel", "--signal=USR1", script)
    cluster.wait_for(script, "queued again")
    cluster.runs_again(script, 1)
    cluster.wait_for(script, "\nstep 12/")
    cluster.ask("scancel", "--full", "--signal=USR1", script)
    cluster.runs_again(script, 2)
    cluster.wait_for(script, "\nstep 20/")
    sooner = cluster.submit(
        options=["--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1"], script=None
    )
    cluster.until(lambda: cluster.state(script) != "RUNNING", 60, lambda: cluster.said(script))
    assert cluster.ends(sooner) == 0
    assert cluster.ends(script) == 0
    said = cluster.said(script)
    assert cluster.state(script, "Restarts") == "3"
    stops = re.findall(r"(\w+): step \d+ is saved in runs/cut", said)
    assert stops[:2] == ["SIGUSR1", "SIGUSR1"]
    assert len(stops) == 3, said
    assert (
        "exit 75 after USR1: the job is queued again" in said
    )  # --full and the preemption signal the script too
    assert hashes("runs/cut") == whole
    starts = json.loads(Path("runs/cut/environment.json").read_text())["starts"]
    assert [start["after_step"] > 0 for start in starts] == [False, True, True, True]
    assert {start["job"] for start in starts} == {script}


def test_a_killed_rank_is_started_again_in_the_job(cluster, job, whole):
    script = cluster.submit(*job, "save_every=10", "keep=9", "run=killed", options=NODES)
    cluster.wait_for(script, "\nstep 12/")
    environments = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/environ")}
    mine = [f"SLURM_JOB_ID={script}\0".encode(), f"SLURM_CONF={cluster.root}".encode(), b"SLURM_PROCID=1\0"]
    (victim,) = [pid for pid, path in environments.items() if all(word in read(path) for word in mine)]
    os.kill(victim, signal.SIGKILL)
    assert cluster.ends(script) == 0
    said = cluster.said(script)
    assert "rank 1 of 2 was lost" in said
    assert "all ranks restart from the last checkpoint" in said
    assert cluster.state(script, "Restarts") == "0"
    assert hashes("runs/killed") == whole


def test_what_no_repetition_mends_is_not_repeated(cluster, job):
    """A job that was requeued too often, a cancelled job, and a run that was started with other settings."""
    cluster.environment["RECONVERGE_MAX_REQUEUES"] = "0"
    script = cluster.submit(*job, "run=often", options=NODES)
    del cluster.environment["RECONVERGE_MAX_REQUEUES"]
    cluster.wait_for(script, "\nstep 2/")
    cluster.ask("scancel", "--batch", "--signal=USR1", script)  # the script alone, as near the time limit
    assert cluster.ends(script) == 75
    assert "queued again 0 times already" in cluster.said(script)
    script = cluster.submit(*job, "run=often", options=NODES)
    cluster.wait_for(script, "\nstep 2")
    cluster.ask("scancel", script)
    cluster.ends(script)
    cluster.until(lambda: not cluster.ask("squeue", "-h"), 30)
    assert cluster.state(script) == "CANCELLED"
    assert cluster.state(script, "Restarts") == "0"
    script = cluster.submit(*job, "run=often", "seed=1", options=NODES)
    assert cluster.ends(script) == 78


@pytest.mark.parametrize(
    ("arguments", "options", "code", "said"),
    [
        (["epohcs=3"], NODES, 2, "change   epochs"),
        ([], NODES, 2, "Slurm gave this job no GPU"),
    ],
)
def test_what_is_wrong_is_said_before_ranks_start(cluster, arguments, options, code, said):
    job = cluster.submit(*arguments, options=options)
    assert cluster.ends(job) == code
    assert said in cluster.said(job)
    assert not Path("runs").exists()


def test_a_folder_that_is_not_shared_is_named(cluster, monkeypatch):
    monkeypatch.chdir(cluster.root / "mine")  # the second node has one of its own there
    job = cluster.submit("device=cpu", options=NODES)
    assert cluster.ends(job) == 66
    assert f"n2: {cluster.root}/mine is not the same folder as on the first node" in cluster.said(job)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--nodes=1"], 0),
        (["--nodes=2", "--gpus-per-node=1"], 0),
        (["--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"], 0),
        (["--time=5", "--signal=B:USR1@60", "--array=0-2"], 0),
        (["--nodes=3"], 1),
        (["--gpus-per-node=3"], 1),
        (["--nodes=two"], 255),
    ],
)
def test_odd_shapes_of_jobs(cluster, options, code):
    cluster.ask("sbatch", "--test-only", *options, SCRIPT, "model=convnext_t", code=code)


@pytest.mark.parametrize(
    ("options", "each"),
    [
        (["--nodes=2"], "0,1 2"),  # tasks, GPUs that each sees, cores of each
        (["--nodes=2", "--gpus-per-node=1"], "0 4"),
        (["--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"], None),
    ],
)
def test_ranks_have_their_gpus_whether_each_sees_one_or_all(cluster, tmp_path, monkeypatch, options, each):
    """A script instead of python prints what each rank gets, because this cluster's GPUs are fake."""
    said = tmp_path / "python"
    said.write_text(
        '#!/bin/sh\n[ "$2" = model=x ] && echo "$SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'
        ' $SLURM_CPUS_PER_TASK"\nexit 0\n'
    )
    said.chmod(0o755)
    monkeypatch.setitem(cluster.environment, "PYTHON", str(said))
    job = cluster.submit("model=x", options=options)
    assert cluster.ends(job) == 0
    tasks = range(1 if each == "0 4" else 2)
    lines = [
        line for line in cluster.said(job).splitlines() if not line.startswith("srun:")
    ]  # which waits for the end of the step before
    assert sorted(lines) == [f"n{node} {task} {each or f'{task} 2'}" for node in (1, 2) for task in tasks]


def test_seeds_are_an_array_of_jobs(cluster, tmp_path, monkeypatch):
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\nshift; [ "$1" = run=x-s\\${seed} ] && echo "$@"\nexit 0\n')
    said.chmod(0o755)
    monkeypatch.setitem(cluster.environment, "PYTHON", str(said))
    seeds = [str(ROOT / "launch" / "seeds.sh"), "--sbatch", "--nodes=1", "4", "7", "--"]
    submitted = cluster.ask(*seeds, "run=x-s${seed}")
    array = re.search(r"job (\d+)", submitted).group(1)
    for seed in (4, 7):
        path = Path(f"slurm-{array}_{seed}.out")
        cluster.until(lambda path=path: path.exists() and "seed" in path.read_text(), 30)
        # srun says so if both jobs of the array ask for the nodes at once.
        lines = [line for line in path.read_text().splitlines() if not line.startswith("srun: ")]
        assert lines == [f"run=x-s${{seed}} seed={seed}"] * 2
    assert "the same folder for all seeds" in cluster.ask(*seeds, "run=x", code=2)
