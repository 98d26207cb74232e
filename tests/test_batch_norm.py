"""BatchNorm's running statistics follow microbatch 0 of each step, through the real command line."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import trained, weights
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reconverge.config.settings import Augment, Data, Model
from reconverge.config.settings import Mix as MixSettings
from reconverge.data import transforms
from reconverge.data.loader import Images
from reconverge.data.mix import Mix, Normalise
from reconverge.data.order import Order
from reconverge.data.sources import open_sources
from reconverge.models import create, drop_path
from reconverge.training.batch_norm import RunningStatistics
from reconverge.training.ema import Ema

KINDS = ("model", "ema", "optimizer")
DECAY = 0.9
RESNET = ["model=timm", "model.timm=test_resnet", "model.drop_path=0.3"]
AUGMENT = [
    "recipe.name=mine",
    "augment.scale=[0.08,1.0]",
    "augment.flip=0.5",
    "augment.auto=rand-m9-mstd0.5-inc1",
    "augment.erase=0.5",
]
EVERY = [*RESNET, *AUGMENT, "steps=4", "save_every=1", "keep=9", "evaluate_every=3", "seed=3", "log_every=1"]
MODEL = Model("test_resnet", "t", 0.3, layer_scale=None, timm="test_resnet")


def saved(run, step, kind="model"):
    return load_file(Path("runs") / run / "checkpoints" / f"step-{step:08d}" / f"{kind}.safetensors")


def statistics(tensors):
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    }


def by_hand(digits, cache, run, steps):
    """After each step: 0.9 times the old value plus 0.1 times the mean and unbiased variance of each norm's
    inputs in microbatch 0, with the weights of the checkpoint before.
    """
    training, _ = open_sources(Data("folder", "folder", root=str(digits), cache=str(cache)))
    images_of = Images(
        training, transforms.labelled(transforms.training(Augment(size=32), [0.485, 0.456, 0.406])), 3
    )
    normalise = Normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], torch.device("cpu"), False)
    mix, order = Mix(0.5, MixSettings(), 10), Order(len(training), 16, 8, 3)
    net = create.model(MODEL, 10, seed=3).train()
    running = {name: tensor.double() for name, tensor in statistics(net.state_dict()).items()}
    seen = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: seen.update({name: inputs[0].detach().double()})
            )
    for step in range(steps):
        if step:
            net.load_state_dict(saved(run, step))
        (images, (labels,), *_), _ = images_of[order.microbatch(step, 0)]
        key = (3, step, 0)
        images, _ = mix(normalise(images), labels, key)
        drop_path.Masked(net)(images, drop_path.draw(drop_path.rates(net), 8, key, torch.device("cpu")))
        for name, inputs in seen.items():
            count = inputs.numel() / inputs.shape[1]
            mean = inputs.mean((0, 2, 3))
            variance = (inputs - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) / (count - 1)
            for kind, value in (("running_mean", mean), ("running_var", variance)):
                running[f"{name}.{kind}"] = 0.9 * running[f"{name}.{kind}"] + 0.1 * value
        yield running


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_running_statistics_equal_a_count_by_hand(train, digits, cache, checkpointing):
    """Activation checkpointing repeats each forward pass in backward, which must not update the statistics
    again.
    """
    assert train(*EVERY, "run=a", f"checkpointing={checkpointing}", f"ema.decay={DECAY}") == 0
    start = create.model(MODEL, 10, seed=3).state_dict()
    ema = {name: tensor.double() for name, tensor in start.items() if "num_batches" not in name}
    for step, expected in enumerate(by_hand(digits, cache, "a", 4), start=1):
        found = saved("a", step)
        assert set(expected) == set(statistics(found))
        for name, value in expected.items():
            assert torch.allclose(found[name].double(), value, rtol=1e-4, atol=1e-5), (
                f"{name} after step {step}"
            )
        counts = {int(tensor) for name, tensor in found.items() if name.endswith("num_batches_tracked")}
        assert counts == {step}
        averaged = saved("a", step, "ema")
        ema = {name: DECAY * ema[name] + (1 - DECAY) * found[name].double() for name in ema}
        for name, value in ema.items():  # as in the published runs
            assert torch.allclose(averaged[name].double(), value, rtol=1e-5, atol=1e-7), name
        assert all(
            torch.equal(tensor, averaged[name]) for name, tensor in found.items() if "num_batches" in name
        )


@pytest.fixture(scope="module")
def four_steps(digits, tmp_path_factory, cache):
    """runs/whole: four steps with a checkpoint after each."""
    return trained(tmp_path_factory.mktemp("four_steps"), cache, f"data.root={digits}", *EVERY, "run=whole")


@pytest.fixture
def whole(four_steps):
    """The bits of that run; a copy of it is in runs/."""
    shutil.copytree(four_steps, "runs")
    return [weights("whole", kind) for kind in KINDS]


def test_the_same_bits_when_resumed_at_every_step_and_with_other_workers(train, whole):
    """R1, R2 and R3 of a model with BatchNorm."""
    for step in range(1, 4):
        kept = [f"step-{number:08d}" for number in range(1, step + 1)]
        ignore = lambda path, names, kept=kept: [  # noqa: E731
            name for name in names if name.startswith("step-") and name not in kept
        ]
        shutil.copytree("runs/whole", f"runs/from{step}", ignore=ignore)
        (Path("runs") / f"from{step}" / "status.json").unlink()
        assert train(*EVERY, f"run=from{step}", f"workers={step % 2}") == 0
        assert [weights(f"from{step}", kind) for kind in KINDS] == whole
    assert train(*EVERY, "run=again") == 0
    assert [weights("again", kind) for kind in KINDS] == whole
    assert train(*EVERY, "run=checkpointed", "checkpointing=true") == 0
    assert [weights("checkpointed", kind) for kind in KINDS] == whole


@pytest.mark.slow
def test_a_step_of_the_roadmap_keeps_the_same_bits(train):
    arguments = [
        "model=roadmap/03_depthwise",
        "batch=8",
        "microbatch=4",
        "evaluate_every=never",
        "save_every=0",
        "optim.warmup_epochs=0",
    ]
    assert train(*arguments, "steps=3", "run=whole") == 0
    assert train(*arguments, "steps=2", "run=cut") == 0
    assert train(*arguments, "steps=3", "run=cut") == 0
    assert [weights("cut", kind) for kind in KINDS] == [weights("whole", kind) for kind in KINDS]


def test_evaluating_between_steps_changes_nothing(train, whole):
    assert train(*EVERY, "evaluate_every=1", "run=evaluated") == 0
    assert [weights("evaluated", kind) for kind in KINDS] == whole


def test_a_suppressed_step_leaves_the_statistics_as_they_were(train):
    """With fp16 a gradient overflows. Then statistics and weights stay unchanged, and the step is not
    counted.
    """
    given = [
        *RESNET,
        "steps=6",
        "save_every=1",
        "keep=9",
        "evaluate_every=never",
        "precision=fp16",
        "model.head_init_scale=3e4",
    ]
    assert train(*given, "run=a", "augment.auto=none") == 0
    states = [saved("a", step) for step in range(1, 7)]
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())
    counts = [int(state["bn1.num_batches_tracked"]) for state in states]
    assert counts[0] == 0
    assert counts[-1] < 6
    for before, after in pairwise(states):
        same = all(torch.equal(before[name], after[name]) for name in statistics(before))
        assert same == (before["bn1.num_batches_tracked"] == after["bn1.num_batches_tracked"])


def test_a_suppressed_step_that_is_the_first_after_a_resume(train):
    """A huge learning rate makes a gradient overflow; the run is resumed just before that step."""
    given = [
        *RESNET,
        "save_every=1",
        "keep=9",
        "evaluate_every=0",
        "precision=fp16",
        "optim.lr=1e30",
        "augment.auto=none",
    ]
    assert train(*given, "run=whole", "steps=4") == 70  # the end is evaluated
    counts = [int(saved("whole", step)["bn1.num_batches_tracked"]) for step in (1, 2, 3)]
    suppressed = next(step for step in (2, 3) if counts[step - 1] == counts[step - 2])
    shutil.copytree("runs/whole", "runs/cut")
    for step in range(suppressed, 5):
        shutil.rmtree(f"runs/cut/checkpoints/step-{step:08d}")
    assert train(*given, "run=cut", "steps=4") == 70
    before, after, resumed = (
        statistics(saved(run, step))
        for run, step in (("whole", suppressed - 1), ("whole", suppressed), ("cut", suppressed))
    )
    assert all(
        torch.equal(before[name], after[name]) and torch.equal(before[name], resumed[name]) for name in before
    )


def test_what_is_not_finite_does_not_stay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    running = RunningStatistics(net)
    net(torch.full((2, 3, 4, 4), torch.nan))
    running.note()
    net(torch.randn(2, 3, 4, 4))
    running.settle(torch.tensor(1.0))
    assert (net[1].running_mean == 0).all()
    assert (net[1].running_var == 1).all()
    assert net[1].num_batches_tracked == 0
    net(torch.ones(2, 3, 4, 4))
    running.note()
    net(torch.full((2, 3, 4, 4), torch.nan))
    running.settle(torch.tensor(0.0))
    assert torch.allclose(net[1].running_mean, 0.1 * net[0](torch.ones(1, 3, 1, 1)).flatten())
    assert net[1].num_batches_tracked == 1


def test_models_without_running_statistics_are_left_alone():
    net = create.model(Model("convnext_atto", "atto", 0.0), 10, 0)
    running = RunningStatistics(net)
    running.note()
    running.settle(torch.tensor(0.0))
    assert running._buffers == []


class Counted(TorchDispatchMode):
    """Lists the operations that reach the device."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["test_resnet", "resnet50"])
def test_a_step_takes_a_few_operations_for_any_number_of_layers(name):
    """Two dtypes: the statistics, and the counters."""
    net = create.model(Model(name, "t", 0.0, layer_scale=None, timm=name), 10, 0)
    running, ema, skip = RunningStatistics(net), Ema(net, 0.9), torch.tensor(0.0)
    with Counted() as counted:
        running.note()
        running.settle(skip)
    assert len(counted.operations) <= 10
    with Counted() as counted:
        ema.update(skip)
    assert len(counted.operations) <= 8
