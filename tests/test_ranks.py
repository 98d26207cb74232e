"""Many ranks train as one rank does: real processes of torchrun, and separate tests of the sums."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import JOB, ROOT, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from reconverge.base.errors import Exit, Stop
from reconverge.base.launcher import Place, place
from reconverge.distributed import group
from reconverge.distributed.ranks import block, worlds
from reconverge.distributed.world import World
from reconverge.training.gradients import Gradients, copies, merges
from reconverge.training.passes import Passes

KINDS = ("model", "ema", "optimizer")
CONVNEXT, RESNET = (["model=timm", f"model.timm={name}"] for name in ("test_convnext", "test_resnet"))


def alone(train, *arguments):
    """The same job in this process, with one rank."""
    return train(*[setting for setting in JOB if setting not in SMALL], *arguments)


def record(run):
    return [json.loads(line) for line in (Path("runs") / run / "record.jsonl").read_text().splitlines()]


def saved(run, step):
    folder = Path("runs") / run / "checkpoints" / f"step-{step:08d}"
    return {kind: load_file(folder / f"{kind}.safetensors") for kind in KINDS}


def apart(one, other, step):
    """For each kind of tensors, the norm of the difference divided by the norm."""
    distance = {}
    for kind, tensors in saved(one, step).items():
        flat, theirs = (
            torch.cat([part[name].double().flatten() for name in sorted(tensors)])
            for part in (tensors, saved(other, step)[kind])
        )
        distance[kind] = float((flat - theirs).norm() / flat.norm())
    return distance


def hashes(run, step):
    files = json.loads(
        (Path("runs") / run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text()
    )["files"]
    return {kind: files[f"{kind}.safetensors"]["sha256"] for kind in KINDS}


def metrics(run):
    lines = [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("images_per_second", "data_wait", "save_wait")
        }
        for line in lines
    ]


# ---- R3 and R4: the whole job ------------------------------------------------------------------------------


def test_two_ranks_give_the_bits_of_one_by_tree(train, torchrun):
    """R4, and R3: weights, EMA, moments, running statistics, losses, norms, evaluation, and the images of
    each step.
    """
    given = ["steps=3", "reduce=tree", "evaluate_every=0", *RESNET]
    assert alone(train, "run=one", *given) == 0
    code, said = torchrun(2, "run=two", *given, "workers=1")
    assert code == 0, said
    assert record("two") == record("one")
    assert metrics("two") == metrics("one")
    assert hashes("two", 3) == hashes("one", 3)
    assert "2 ranks by torchrun" in said
    assert said.count("promises ") == 1  # one rank speaks
    assert "R4 any number of ranks: same bits" in said


@pytest.mark.slow
@pytest.mark.parametrize("model", [CONVNEXT, RESNET], ids=["convnext", "resnet"])
def test_worlds_of_1_2_and_4_are_bit_equal_by_tree_changed_in_mid_run_too(train, torchrun, model):
    end = ["epochs=20", "steps=20", "evaluate_every=never", "save_every=10", "keep=9", "reduce=tree", *model]
    assert alone(train, "run=one", *end) == 0
    code, said = torchrun(4, "run=four", *end, "workers=1")
    assert code == 0, said
    assert torchrun(2, "run=changed", *end, "steps=10")[0] == 0
    assert alone(train, "run=changed", *end) == 0
    assert json.loads(Path("runs/changed/environment.json").read_text())["lost"] == []  # R2 as well
    for run in ("four", "changed"):
        assert record(run) == record("one")
        assert hashes(run, 20) == hashes("one", 20)
    assert hashes("one", 10) != hashes("one", 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "steps", "bound"), [(CONVNEXT, 20, 1e-5), (RESNET, 2, 1e-6)], ids=["convnext", "resnet"]
)
def test_other_worlds_by_ddp_see_the_same_images_and_stay_close(train, torchrun, model, steps, bound):
    """Gradient norms too, with clipping: AdamW hides a wrong scale of the gradient in the weights."""
    given = ["epochs=20", f"steps={steps}", "evaluate_every=never", *model]
    assert alone(train, "run=one", *given) == 0
    assert torchrun(4, "run=changed", *given, f"steps={steps // 2}")[0] == 0
    code, said = torchrun(2, "run=changed", *given)
    assert code == 0
    assert "promise R2 is lost" in said
    assert [step["images"] for step in record("changed")] == [step["images"] for step in record("one")]
    for key in ("grad_norm", "loss"):
        assert [step[key] for step in record("changed")] == pytest.approx(
            [step[key] for step in record("one")], rel=10 * bound
        )
    assert max(apart("one", "changed", steps).values()) < bound


@pytest.mark.slow
def test_four_ranks_resume_with_the_same_bits(train, torchrun):
    """R2 with reduce=ddp, where torch's DistributedDataParallel would rebuild its buckets after the first
    step of each start.
    """
    given = ["steps=4", "save_every=2", "keep=9", "evaluate_every=never", *CONVNEXT]
    assert torchrun(4, "run=whole", *given)[0] == 0
    assert torchrun(4, "run=cut", *given, "steps=2")[0] == 0
    assert torchrun(4, "run=cut", *given)[0] == 0
    assert hashes("cut", 4) == hashes("whole", 4)
    assert record("cut") == record("whole")


@pytest.mark.slow
def test_evaluation_counts_each_image_once_on_four_ranks(train, torchrun, evaluate):
    """30 images in batches of 7: five batches for four ranks, of which one has two.

    On two and three: test_export.
    """
    assert alone(train, "run=a", "steps=2", "evaluate.batch=7", "evaluate_every=0") == 0
    how = ["checkpoint=runs/a", "batch=7", "threads=1", "workers=0"]
    assert evaluate(*how) == 0
    (path,) = Path("runs/a").glob("eval-*.json")
    one = json.loads(path.read_text())
    path.unlink()
    code, said = torchrun(4, *how, script="eval.py", settings=[])
    assert code == 0, said
    assert json.loads(path.read_text()) == one
    assert one["raw"]["images"] == 30


@pytest.mark.slow
def test_what_one_rank_cannot_read_stops_an_evaluation_with_its_name(train, torchrun, digits, tmp_path):
    """Image 10 of 30, in batches of 7, belongs to rank 1. Rank 0, which waits for it, prints this reason and
    not a closed connection.
    """
    assert alone(train, "run=a", "steps=2", "evaluate_every=never") == 0
    shutil.copytree(digits, tmp_path / "broken")
    path = sorted((tmp_path / "broken" / "val").rglob("*.png"))[9]
    path.write_bytes(b"no image")
    where = ["data=folder", f"data.root={tmp_path}/broken", "batch=7", "threads=1", "workers=0"]
    code, said = torchrun(2, "checkpoint=runs/a", *where, script="eval.py", settings=[])
    assert code != 0
    assert "reconverge stopped (exit 65)" in said
    assert "given    rank 1: " in said
    assert path.name in said


@pytest.mark.parametrize("size", [4, 16])
def test_forward_images_change_no_draw_and_weights_within_rounding(train, size):
    assert alone(train, "run=one", "steps=4", *CONVNEXT) == 0
    assert alone(train, "run=other", "steps=4", f"forward_images={size}", *CONVNEXT) == 0
    assert [step["images"] for step in record("other")] == [step["images"] for step in record("one")]
    assert [step["loss"] for step in record("other")] == pytest.approx(
        [step["loss"] for step in record("one")], rel=1e-5
    )
    assert max(apart("one", "other", 4).values()) < 1e-5


def test_forward_images_are_refused_where_they_cannot_be(train, capsys):
    for arguments, said in (
        (["forward_images=4", *RESNET], "BatchNorm averages over"),
        (["forward_images=3"], "what divides a microbatch (1, 2, 4, 8)"),
        (["forward_images=12"], "forward_images="),
        (["forward_images=24", "reduce=tree"], "divide the microbatches of a rank evenly"),
    ):
        assert alone(train, "run=a", *arguments) == 2
        assert said in capsys.readouterr().err


def test_another_forward_pass_in_mid_run_ends_r2_and_says_so(train, capsys):
    assert alone(train, "run=a", "steps=1", *CONVNEXT) == 0
    assert alone(train, "run=a", "steps=2", "forward_images=4", *CONVNEXT) == 0
    assert (
        "was started with forward_images=8; now forward_images=4: promise R2 is lost"
        in capsys.readouterr().out
    )
    assert [
        entry["because"] for entry in json.loads(Path("runs/a/environment.json").read_text())["lost"]
    ] == ["forward_images"]


@pytest.mark.slow
def test_ranks_that_do_not_fit_are_refused_once_with_those_that_do(torchrun):
    code, said = torchrun(3, "run=a")
    assert code == 1  # torchrun returns 1 for every failure
    assert said.count("3 ranks for 8 microbatches a step") == 1
    assert "1, 2, 4, 8" in said
    assert not Path("runs/a").exists()


@pytest.mark.slow
def test_a_finished_run_and_a_refused_one_end_all_ranks(train, torchrun):
    """Only rank 0 reads the folder."""
    assert alone(train, "run=a", "steps=1") == 0
    code, said = torchrun(2, "run=a", "steps=1")
    assert code == 0
    assert said.count("a is finished") == 1
    code, said = torchrun(2, "run=a", "steps=2", "seed=1")
    assert code == 1
    assert said.count("was started with seed=0; now seed=1") == 1
    assert not Path("runs/a/errors").exists()


# ---- the microbatches of each rank -------------------------------------------------------------------------


@given(st.integers(1, 64))
@settings(max_examples=64, deadline=None)
def test_every_world_shares_the_microbatches_out_once(microbatches):
    for tree in (False, True):
        for size in range(1, microbatches + 3):
            fits = microbatches % size == 0 and not (tree and bin(size).count("1") != 1)
            assert (size in worlds(microbatches, tree)) == fits
            if not fits:
                with pytest.raises(Stop) as stop:
                    block(microbatches, 0, size, tree)
                assert stop.value.code == Exit.USAGE
                continue
            blocks = [list(block(microbatches, rank, size, tree)) for rank in range(size)]
            assert [number for part in blocks for number in part] == list(range(microbatches))
            assert len({len(part) for part in blocks}) == 1


@given(st.integers(1, 6), st.sampled_from([2, 4, 8]), st.sampled_from([None, 1, 2, 4, 8, 16, 24, 80]))
@settings(max_examples=80, deadline=None)
def test_passes_hand_on_every_image_once_in_order(microbatches, microbatch, forward_images):
    if forward_images and forward_images % microbatch and microbatch % forward_images:
        return
    passes = Passes(microbatches, microbatch, forward_images)
    images = torch.arange(float(microbatches * microbatch)).view(-1, 1, 1, 1)
    for _step in range(2):
        out = [
            part
            for number in range(microbatches)
            for part in passes(
                images[number * microbatch :][:microbatch],
                images[number * microbatch :][:microbatch, :, 0, 0],
                images[number * microbatch :][:microbatch, 0, 0].expand(-1, 3),
            )
        ]
        assert len(out) == passes.count
        assert max(len(x) for x, _, _ in out) == passes.images <= max(forward_images or 0, microbatch)
        for position in range(3):
            together = torch.cat([part[position] for part in out])
            assert torch.equal(together.reshape(len(images), -1)[:, 0], images.flatten())


# ---- the tree ----------------------------------------------------------------------------------------------


def recursive(leaves):
    """The definition: tree(lo, hi) = tree(lo, mid) + tree(mid, hi), split from the top."""
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    return recursive(leaves[:middle]) + recursive(leaves[middle:])


class Loopback:
    """Replaces a World; the other ranks are computed here. `blocks` has each rank's sum at each distance."""

    device = torch.device("cpu")

    def __init__(self, rank, size, partners):
        self.rank, self.size, self._partners = rank, size, partners

    def exchange(self, mine, partner, into):
        into.copy_(self._partners.pop(0)(partner))


@given(st.integers(1, 12), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_the_streaming_tree_is_the_recursive_one_on_every_rank(each, size):
    """Compared with the definition, with float32 numbers of mixed size, whose sum differs for any other
    order.
    """
    random = np.random.Generator(np.random.PCG64(each * 100 + size))
    leaves = [
        torch.from_numpy((random.standard_normal(64) * 10.0 ** random.integers(-3, 4, 64)).astype(np.float32))
        for _ in range(each * size)
    ]
    expected = recursive(leaves)
    for rank in range(size):
        partners = [
            lambda partner, d=2**level: recursive(leaves[partner // d * d * each :][: d * each])
            for level in range(size.bit_length() - 1)
        ]
        net = nn.Linear(64, 1, bias=False)
        gradients = Gradients(net, Loopback(rank, size, partners), Passes(each, 2, None, tree=True))
        held = 1
        for leaf in leaves[rank * each :][:each]:
            net.weight.grad += leaf
            gradients.add()
            held = max(held, 1 + len(gradients._sums))
        gradients.reduce()
        assert torch.equal(net.weight.grad[0], expected)
        assert held <= copies(each)
        assert not gradients._sums
    if each * size >= 6:
        assert not torch.equal(sum(leaves[1:], leaves[0]), expected)


def test_merges_by_hand():
    assert [merges(leaves) for leaves in (1, 2, 3, 4)] == [[0], [0, 1], [0, 0, 2], [0, 1, 0, 2]]
    assert [copies(leaves) for leaves in (1, 2, 3, 4, 5, 8)] == [1, 2, 3, 3, 4, 4]


def test_gradients_are_views_in_the_weights_memory_format_and_sums_of_passes():
    """A convolution in channels_last, several buckets, twice: equal to autograd's own accumulation."""
    torch.manual_seed(0)
    from reconverge.training import gradients as module

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)).to(
        memory_format=torch.channels_last
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKET", 100)
        gradients = Gradients(net, World("cpu", "fp32", deterministic=False), Passes(2, 4, None))
    assert len(gradients._buckets) == 2
    assert net[0].weight.grad.stride() == net[0].weight.stride()
    for _step in range(2):
        images = torch.randn(2, 4, 3, 8, 8).contiguous()
        for part in images:
            net(part).square().sum().backward()
            gradients.add()
        gradients.reduce()
        expected = torch.autograd.grad(net(images.flatten(0, 1)).square().sum(), list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
        gradients.clear()
        assert all((parameter.grad == 0).all() for parameter in net.parameters())


@pytest.mark.parametrize("classes", [10, 21841])
def test_each_gradient_begins_at_a_multiple_of_256_bytes(classes):
    """As tensors of their own would. The head comes first: it is finished first."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, classes))
    gradients = Gradients(net, World("cpu", "fp32", deterministic=False), Passes(1, 4, None))
    assert gradients._flat.numel() == sum(len(bucket) for bucket in gradients._buckets)
    begins = [parameter.grad.data_ptr() - gradients._flat.data_ptr() for parameter in net.parameters()]
    assert [begin % 256 for begin in begins] == [0] * len(begins)
    sizes = [parameter.numel() for parameter in net.parameters()]
    assert any(4 * size % 256 for size in sizes)
    for number, parameter in enumerate(net.parameters()):  # none lies in another
        parameter.grad.fill_(number + 1)
    assert all(
        bool((parameter.grad == number + 1).all()) for number, parameter in enumerate(net.parameters())
    )


# ---- the launchers' variables ------------------------------------------------------------------------------


def test_who_started_this_process():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    step = {
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    }
    assert place({}) == Place(0, 1, 0, 1, "")
    assert place(torchrun) == Place(5, 8, 1, 4, "torchrun")
    assert place(step) == Place(6, 7, 0, 1, "srun")
    assert place(step | torchrun) == Place(5, 8, 1, 4, "torchrun")
    # The script of a job, and a shell in a step of one task: a process alone, whatever the job has been
    # given.
    assert place({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == Place()
    assert place(step | {"SLURM_STEP_NUM_TASKS": "1"}) == Place()


def test_restarts_need_a_rendezvous_that_finds_together_again(digits, forking):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master-addr=127.0.0.1",
        "--master-port=29731",
        "--nproc-per-node=2",
        "--max-restarts=1",
    ]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *JOB, f"data.root={digits}", "run=a", "steps=1"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "a c10d rendezvous" in done.stderr
    assert "--standalone" in done.stderr


def test_ranks_that_start_again_meet_only_each_other(monkeypatch):
    """In one store, as torchrun keeps it over restarts. A rank that restarts early waits, in spite of values
    of an earlier start.
    """
    store = torch.distributed.HashStore()
    names = []
    for _start in range(3):
        with ThreadPoolExecutor() as pool:
            early = pool.submit(group._met, store, 1, 2, 30)
            with pytest.raises(TimeoutError):
                early.result(timeout=0.3)
            assert group._met(store, 0, 2, 30) == early.result(timeout=10)
            names.append(early.result())
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="an earlier start"):
        group._met(store, 0, 2, 0.3)
    monkeypatch.setattr(group, "told_to_stop", lambda: True)
    with pytest.raises(Stop, match="before all ranks had started"):
        group._met(store, 0, 2, 0.3)
