import numpy as np
import pytest
import torch

from reconverge import models, optim
from reconverge.ema import Ema
from reconverge.settings import Model, Optim


def published_schedule(base, final, epochs, steps_per_epoch, warmup_epochs):
    """The official schedule as paper.md's trap 3 states it, in numpy, the whole list at once."""
    warmup = np.linspace(0, base, warmup_epochs * steps_per_epoch)
    rest = np.arange(epochs * steps_per_epoch - len(warmup))
    return np.concatenate([warmup, final + (base - final) * (1 + np.cos(np.pi * rest / len(rest))) / 2])


@pytest.mark.parametrize(("epochs", "steps", "warmup"), [(300, 312, 20), (90, 3465, 5), (30, 2502, 0), (5, 1, 1), (4, 7, 2)])
def test_learning_rate_is_the_published_formula(epochs, steps, warmup):
    expected = published_schedule(4e-3, 1e-6, epochs, steps, warmup)
    settings = Optim(lr=4e-3, min_lr=1e-6)
    rates = [optim.learning_rate(settings, step, epochs * steps, warmup * steps) for step in range(epochs * steps)]
    assert rates == pytest.approx(expected.tolist(), rel=1e-12, abs=0)
    assert len(rates) == len(expected)


def test_learning_rate_at_key_steps(golden):
    settings = Optim(lr=4e-3, min_lr=1e-6)
    steps = [0, 1, 3120, 6239, 6240, 6241, 50000, 93599]
    golden("learning_rate_in1k.txt", "\n".join(f"{step} {optim.learning_rate(settings, step, 93600, 6240):.17g}" for step in steps))
    assert optim.learning_rate(settings, 0, 93600, 6240) == 0
    assert optim.learning_rate(settings, 6239, 93600, 6240) == optim.learning_rate(settings, 6240, 93600, 6240) == 4e-3


def test_weight_decay_falls_on_the_right_parameters(golden):
    net = models.build(Model("convnext_t", "t", 0.1), 1000, 0)
    groups = optim.parameter_groups(net, 0.05)
    decayed = {name for group in groups if group["weight_decay"] == 0.05 for name in group["names"]}
    plain = {name for group in groups if group["weight_decay"] == 0.0 for name in group["names"]}
    # 18 blocks of one depthwise and two pointwise weights, stem, three downsampling convolutions, head.
    assert len(decayed) == 18 * 3 + 1 + 3 + 1
    assert all(name.endswith(("conv_dw.weight", "fc1.weight", "fc2.weight", "downsample.1.weight", "stem.0.weight", "head.fc.weight")) for name in decayed)  # fmt: skip
    assert all(name.endswith((".bias", "gamma", "norm.weight", "stem.1.weight", "downsample.0.weight")) for name in plain)
    assert decayed | plain == {name for name, _ in net.named_parameters()}
    assert not decayed & plain
    golden("no_weight_decay_convnext_t.txt", "\n".join(sorted(plain)))


def test_a_models_own_exceptions_are_not_decayed():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 4))
            self.weight = torch.nn.Parameter(torch.zeros(4, 4))

        def no_weight_decay(self):
            return {"pos_embed"}

    names = {group["weight_decay"]: group["names"] for group in optim.parameter_groups(Net(), 0.05)}
    assert names == {0.05: ["weight"], 0.0: ["pos_embed"]}
    assert [group["names"] for group in optim.parameter_groups(Net(), 0.0)] == [["pos_embed", "weight"]]


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_published_formula(fused):
    """Loshchilov and Hutter, algorithm 2, in float64, on its own."""
    net = torch.nn.Linear(3, 2)
    settings = Optim(lr=0.1, weight_decay=0.3, betas=[0.8, 0.95], eps=1e-3)
    optimizer = optim.adamw(net, settings, fused)
    weight, first, second = net.weight.detach().double(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    bias = net.bias.detach().double()
    for step in range(1, 6):
        gradient = torch.full((2, 3), 0.1 * step).double()
        net.weight.grad, net.bias.grad = gradient.float(), torch.zeros(2)
        optim.set_learning_rate(optimizer, 0.1 / step)
        optim.update(optimizer, torch.tensor(0.0))
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        weight = weight - 0.1 / step * 0.3 * weight
        weight = weight - 0.1 / step * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-3)
        assert torch.allclose(net.weight.double(), weight, atol=1e-6)
        assert torch.allclose(net.bias.double(), bias, atol=1e-7)  # not decayed


@pytest.mark.parametrize("fused", [True, False])
def test_a_suppressed_step_changes_nothing(fused):
    net = torch.nn.Linear(3, 2)
    optimizer = optim.adamw(net, Optim(lr=0.1), fused)
    for _ in range(2):
        net(torch.ones(1, 3)).sum().backward()
        optim.update(optimizer, torch.tensor(0.0))
    before = [tensor.clone() for tensor in (*net.state_dict().values(), *optim.state_tensors(optimizer).values())]
    (net(torch.ones(1, 3)).sum() * float("nan")).backward()
    optim.update(optimizer, torch.tensor(1.0))
    after = [*net.state_dict().values(), *optim.state_tensors(optimizer).values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert net.weight.grad is None


def test_optimizer_state_goes_through_a_checkpoint():
    def trained(steps, state=None):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        optimizer = optim.adamw(net, Optim(lr=0.1), fused=True)
        if state:
            net.load_state_dict(state[0])
            optim.load_state_tensors(optimizer, state[1])
        for _ in range(steps):
            net(torch.ones(1, 3)).square().sum().backward()
            optim.update(optimizer, torch.tensor(0.0))
        return {name: tensor.clone() for name, tensor in net.state_dict().items()}, {name: tensor.clone() for name, tensor in optim.state_tensors(optimizer).items()}  # fmt: skip

    whole, halves = trained(6), trained(3, trained(3))
    for a, b in zip(whole, halves, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_ema_is_the_published_arithmetic():
    net = torch.nn.BatchNorm1d(3)
    ema = Ema(net, 0.9)
    expected = net.weight.detach().double().clone()
    for step in range(50):
        with torch.no_grad():
            net.weight.add_(torch.arange(3.0) * 0.1 + step * 0.01)
            net.running_mean.fill_(step)
        ema.update(net, torch.tensor(0.0))
        expected = 0.9 * expected + 0.1 * net.weight.detach().double()  # timm's ModelEma, in float64
    assert torch.allclose(ema.model.weight.double(), expected, rtol=1e-6)
    assert (ema.model.running_mean == 49).all()
    assert not ema.model.training
    before = ema.model.weight.clone()
    net.weight.data.fill_(100)
    ema.update(net, torch.tensor(1.0))
    assert torch.equal(ema.model.weight, before)
    assert ema.model.weight.grad_fn is None
