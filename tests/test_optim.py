import numpy as np
import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler

from reconverge.base.errors import Stop
from reconverge.config.settings import Model, Optim, Train
from reconverge.models import create, table
from reconverge.models.layers import layers
from reconverge.training import optim
from reconverge.training.clock import Clock
from reconverge.training.ema import Ema


def published_schedule(base, final, epochs, steps_per_epoch, warmup_epochs):
    """The official schedule as paper.md's trap 3 states it, in numpy, the whole list at once."""
    warmup = np.linspace(0, base, warmup_epochs * steps_per_epoch)
    rest = np.arange(epochs * steps_per_epoch - len(warmup))
    return np.concatenate([warmup, final + (base - final) * (1 + np.cos(np.pi * rest / len(rest))) / 2])


def clock(steps_per_epoch, epochs, warmup_epochs):
    cfg = Train(batch=4, microbatch=2, epochs=epochs, optim=Optim(warmup_epochs=warmup_epochs))
    return Clock.of(cfg, 4 * steps_per_epoch)


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"), [(300, 312, 20), (90, 3465, 5), (30, 2502, 0), (5, 1, 1), (4, 7, 2)]
)
def test_learning_rate_is_the_published_formula(epochs, steps, warmup):
    expected = published_schedule(4e-3, 1e-6, epochs, steps, warmup)
    settings, count = Optim(lr=4e-3, min_lr=1e-6), clock(steps, epochs, warmup)
    rates = [optim.learning_rate(settings, step, count) for step in range(epochs * steps)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=0)
    assert len(rates) == len(expected)


def test_learning_rate_at_key_steps(golden):
    settings, count = Optim(lr=4e-3, min_lr=1e-6), clock(312, 300, 20)
    steps = [0, 1, 3120, 6239, 6240, 6241, 50000, 93599]
    golden(
        "learning_rate_in1k.txt",
        "\n".join(f"{step} {optim.learning_rate(settings, step, count):.17g}" for step in steps),
    )
    assert optim.learning_rate(settings, 0, count) == 0
    assert optim.learning_rate(settings, 6239, count) == optim.learning_rate(settings, 6240, count) == 4e-3


def timm_rates(count, epochs, lr, low, start, by_epoch):
    """timm's scheduler, stepped as DeiT's main.py (after each epoch) and Swin's (after each step) step it:
    the rate of every step.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    unit = count.steps_per_epoch if by_epoch else 1
    total, warmup = count.total // unit, count.warmup // unit
    scheduler = CosineLRScheduler(
        optimizer, t_initial=total if by_epoch else total - warmup, lr_min=low, warmup_t=warmup,
        warmup_lr_init=start,
        warmup_prefix=not by_epoch, t_in_epochs=by_epoch, cycle_limit=1,
    )  # fmt: skip
    rates = []
    for epoch in range(epochs):
        for index in range(count.steps_per_epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            if not by_epoch:
                scheduler.step_update(epoch * count.steps_per_epoch + index)
        if by_epoch:
            scheduler.step(epoch)
    return rates


@pytest.mark.parametrize(("schedule", "epochs", "steps", "warmup", "lr", "low", "start"), [
        ("deit", 300, 5, 5, 1e-3, 1e-5, 1e-6), ("deit", 4, 3, 0, 1e-3, 1e-5, 1e-6),
        ("swin", 300, 7, 20, 1e-3, 1e-5, 1e-6), ("swin", 30, 40, 5, 4e-5, 4e-7, 4e-8),
        ("swin", 2, 5, 0, 1e-3, 1e-5, 1e-6),
    ])  # fmt: skip
def test_schedules_of_deit_and_swin_are_timms(schedule, epochs, steps, warmup, lr, low, start):
    count = clock(steps, epochs, warmup)
    settings = Optim(lr=lr, min_lr=low, warmup_lr=start, warmup_epochs=warmup, schedule=schedule)
    rates = [optim.learning_rate(settings, step, count) for step in range(count.total)]
    assert rates == pytest.approx(
        timm_rates(count, epochs, lr, low, start, schedule == "deit"), rel=1e-12, abs=0
    )


def test_the_forms_of_the_schedule_at_steps_worked_out_by_hand():
    """10 epochs of 2 steps, 5 of them warm-up from 1 to 11, down to 0."""
    count = clock(2, 10, 5)

    def rates(schedule):
        settings = Optim(lr=11.0, min_lr=0.0, warmup_lr=1.0, warmup_epochs=5, schedule=schedule)
        return [optim.learning_rate(settings, step, count) for step in range(20)]

    assert rates("convnext")[:11] == pytest.approx([1 + 10 * i / 9 for i in range(10)] + [11])
    assert rates("swin")[:12] == pytest.approx([1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert rates("deit")[:12] == pytest.approx([1, 1, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9])
    assert rates("deit")[12] == pytest.approx(5.5)  # half way down at epoch 5 of 10, one epoch late
    assert rates("swin")[16] == pytest.approx(5.5)  # 5 of 10 steps after the warm-up, one step late


def test_the_linear_rule_multiplies_the_whole_schedule():
    cfg = Train(
        batch=128,
        microbatch=64,
        epochs=4,
        optim=Optim(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=1, lr_batch=512),
    )
    count, plain = Clock.of(cfg, 1280), clock(10, 4, 1)
    for step in range(40):
        assert optim.learning_rate(cfg.optim, step, count) == optim.learning_rate(cfg.optim, step, plain) / 4


def test_weight_decay_falls_on_the_right_parameters(golden):
    net = create.model(Model("convnext_t", "t", 0.1), 1000, 0)
    groups = optim.parameter_groups(net, Optim(weight_decay=0.05))
    decayed = {name for group in groups if group["weight_decay"] == 0.05 for name in group["names"]}
    plain = {name for group in groups if group["weight_decay"] == 0.0 for name in group["names"]}
    # 18 blocks of one depthwise and two pointwise weights, stem, three downsampling convolutions, head.
    assert len(decayed) == 18 * 3 + 1 + 3 + 1
    assert all(
        name.endswith(
            (
                "conv_dw.weight",
                "fc1.weight",
                "fc2.weight",
                "downsample.1.weight",
                "stem.0.weight",
                "head.fc.weight",
            )
        )
        for name in decayed
    )
    assert all(
        name.endswith((".bias", "gamma", "norm.weight", "stem.1.weight", "downsample.0.weight"))
        for name in plain
    )
    assert decayed | plain == {name for name, _ in net.named_parameters()}
    assert not decayed & plain
    golden("no_weight_decay_convnext_t.txt", "\n".join(sorted(plain)))


# The published rule (official code for S, B, L, XL; the authors' downstream code for T), every prefix typed
# out, by timm's names.
TWELVE = {
    "stem": 0, "stages.0": 1, "stages.1": 2, "stages.2.downsample": 3,
    **{f"stages.2.blocks.{block}": layer for layer, blocks in {
            3: (0, 1, 2), 4: (3, 4, 5), 5: (6, 7, 8), 6: (9, 10, 11), 7: (12, 13, 14), 8: (15, 16, 17),
            9: (18, 19, 20), 10: (21, 22, 23), 11: (24, 25, 26)}.items() for block in blocks},
    "stages.3": 12, "head": 13,
}  # fmt: skip
SIX = {
    "stem": 0, "stages.0": 1, "stages.1": 2, "stages.2.downsample": 3,
    **{f"stages.2.blocks.{block}": layer for layer,
        blocks in {3: (0, 1, 2), 4: (3, 4, 5), 5: (6, 7, 8)}.items() for block in blocks},
    "stages.3": 6, "head": 7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "published", "head"),
    [
        ("tiny", SIX, 7),
        ("small", TWELVE, 13),
        ("base", TWELVE, 13),
        ("large", TWELVE, 13),
        ("xlarge", TWELVE, 13),
    ],
)
def test_layers_and_their_rates_are_the_published_groups(size, published, head):
    with torch.device("meta"):
        net = timm.create_model(f"convnext_{size}")
    seen = {}
    for group in optim.parameter_groups(net, Optim(layer_decay=0.8, weight_decay=1e-8)):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            prefix = max((prefix for prefix in published if name.startswith(f"{prefix}.")), key=len)
            assert group["layer"] == published[prefix], name
            assert group["lr_scale"] == pytest.approx(0.8 ** (head - published[prefix]), rel=1e-12), name
            assert group["weight_decay"] == (0.0 if parameter.ndim == 1 else 1e-8), name
            seen[name] = parameter
    parameters = dict(net.named_parameters())
    assert seen.keys() == parameters.keys()
    assert all(seen[name] is parameters[name] for name in seen)
    assert {group["layer"] for group in optim.parameter_groups(net, Optim(layer_decay=0.8))} == set(
        range(head + 1)
    )


@pytest.mark.parametrize(("name", "head", "some"), [
        ("deit_small_patch16_224", 13, {"pos_embed": 0, "patch_embed.proj.weight": 0,
                "blocks.0.norm1.weight": 1, "blocks.11.mlp.fc2.bias": 12, "head.weight": 13}),
        ("swin_tiny_patch4_window7_224", 13, {"patch_embed.proj.bias": 0, "layers.0.blocks.1.norm1.weight": 2,
                "layers.1.blocks.0.norm1.weight": 3, "layers.3.blocks.1.mlp.fc2.bias": 12,
                "head.fc.bias": 13}),
        ("resnet50", 17, {"conv1.weight": 0, "layer1.0.conv1.weight": 1, "layer2.0.bn1.bias": 4,
                "layer4.2.conv3.weight": 16, "fc.weight": 17}),
        ("convnext_iso_s", 19, {"stem.weight": 0, "blocks.0.conv_dw.weight": 1, "blocks.17.mlp.fc2.bias": 18,
                "norm.weight": 19, "head.bias": 19}),
    ])  # fmt: skip
def test_other_families_have_a_layer_for_each_block(name, head, some):
    with torch.device("meta"):
        net = (
            table.MODELS[name].build(Model(name, "", 0.0, None), 10)
            if name in table.MODELS
            else timm.create_model(name)
        )
    found = layers(net, "auto")
    assert found.keys() == dict(net.named_parameters()).keys()
    assert set(found.values()) == set(range(head + 1))
    assert {key: found[key] for key in some} == some


def test_the_rule_can_be_named_and_is_refused_where_it_has_no_meaning():
    with torch.device("meta"):
        net, other = timm.create_model("convnext_tiny"), timm.create_model("deit_tiny_patch16_224")
    assert max(layers(net, "stages").values()) == 7
    assert max(layers(net, "blocks").values()) == 19  # 18 blocks, stem and head
    with pytest.raises(Stop, match="layer_groups=blocks"):
        layers(other, "stages")
    with pytest.raises(Stop, match="group_matcher"):
        layers(torch.nn.Linear(2, 2), "auto")


def test_layer_decay_moves_each_weight_by_its_own_rate():
    """With AdamW's first step every weight moves by its learning rate, whatever its gradient."""
    net = create.model(Model("convnext_atto", "atto", 0.0), 10, 0)
    optimizer = optim.adamw(net, Optim(lr=1.0, layer_decay=0.5, weight_decay=0.0, eps=0.0), fused=True)
    optim.set_learning_rate(optimizer, 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.update(optimizer, torch.tensor(0.0))
    moved = {
        name: float((before[name] - parameter.detach()).abs().mean())
        for name, parameter in net.named_parameters()
    }
    # atto: 2, 2, 6, 2 blocks; the third stage's six are two layers: 0 | 1 | 2 | 3 4 | 5 | 6
    expected = {
        "stem.0.weight": 2**-6,
        "stages.1.blocks.1.norm.bias": 2**-4,
        "stages.2.blocks.3.mlp.fc1.weight": 2**-2,
        "stages.3.downsample.1.weight": 2**-1,
        "head.fc.weight": 1,
    }
    for name, scale in expected.items():
        assert moved[name] == pytest.approx(1e-3 * scale, rel=1e-3), name


def test_a_models_own_exceptions_are_not_decayed():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 4))
            self.weight = torch.nn.Parameter(torch.zeros(4, 4))

        def no_weight_decay(self):
            return {"pos_embed"}

    names = {
        group["weight_decay"]: group["names"]
        for group in optim.parameter_groups(Net(), Optim(weight_decay=0.05))
    }
    assert names == {0.05: ["weight"], 0.0: ["pos_embed"]}
    assert [group["names"] for group in optim.parameter_groups(Net(), Optim(weight_decay=0.0))] == [
        ["pos_embed", "weight"]
    ]


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_published_formula(fused):
    """Loshchilov and Hutter, algorithm 2, in float64, on its own."""
    net = torch.nn.Linear(3, 2)
    settings = Optim(lr=0.1, weight_decay=0.3, betas=[0.8, 0.95], eps=1e-3)
    optimizer = optim.adamw(net, settings, fused)
    weight, first, second = (
        net.weight.detach().double(),
        torch.zeros(2, 3).double(),
        torch.zeros(2, 3).double(),
    )
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
        optimizer.zero_grad()
    before = [
        tensor.clone() for tensor in (*net.state_dict().values(), *optim.state_tensors(optimizer).values())
    ]
    (net(torch.ones(1, 3)).sum() * float("nan")).backward()
    optim.update(optimizer, torch.tensor(1.0))
    after = [*net.state_dict().values(), *optim.state_tensors(optimizer).values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


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
            optimizer.zero_grad()
        return {name: tensor.clone() for name, tensor in net.state_dict().items()}, {
            name: tensor.clone() for name, tensor in optim.state_tensors(optimizer).items()
        }

    whole, halves = trained(6), trained(3, trained(3))
    for a, b in zip(whole, halves, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_ema_is_the_published_arithmetic():
    net = torch.nn.BatchNorm1d(3)
    net.register_buffer("table", torch.tensor([-torch.inf, 0.0]), persistent=False)  # as attention masks are
    ema = Ema(net, 0.9)
    expected = {name: tensor.detach().double().clone() for name, tensor in net.state_dict().items()}
    for step in range(50):
        with torch.no_grad():
            net.weight.add_(torch.arange(3.0) * 0.1 + step * 0.01)
            net.running_mean.fill_(step)
            net.running_var.fill_(step**0.5)
            net.num_batches_tracked.fill_(step + 1)
        ema.update(torch.tensor(0.0))
        for name, tensor in net.state_dict().items():  # ModelEma of timm 0.3.2, in float64
            expected[name] = 0.9 * expected[name] + 0.1 * tensor.detach().double()
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.allclose(ema.model.state_dict()[name].double(), expected[name], rtol=1e-6), name
    assert ema.model.num_batches_tracked == 50  # steps; that ModelEma rounds down its average of them
    assert torch.equal(ema.model.table, net.table)
    assert not ema.model.training
    before = {name: tensor.clone() for name, tensor in ema.model.state_dict().items()}
    net.weight.data.fill_(100)
    net.running_mean.fill_(100)
    ema.update(torch.tensor(1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.model.state_dict().items())
    assert ema.model.weight.grad_fn is None


def test_the_ema_does_not_shrink_as_the_published_form_does():
    """decay * ema + (1 - decay) * raw in float32 loses 1.7e-8 a step, because the two factors add up to less
    than 1.
    """
    factors = torch.tensor(0.9999).double() + torch.tensor(1 - 0.9999).double()
    assert float(1 - factors) == pytest.approx(1.7e-8, rel=0.05)
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 10_000, bias=False)
    net.weight.data.uniform_(-1, 1)
    weights = net.weight.detach().clone()
    ema, official, exact = Ema(net, 0.9999), weights.clone(), weights.double()
    for _ in range(1000):
        net.weight.data.copy_(weights + 0.01 * torch.randn_like(weights))
        raw = net.weight.detach()
        ema.update(torch.tensor(0.0))
        official = official * 0.9999 + (1.0 - 0.9999) * raw
        exact = exact * 0.9999 + (1 - 0.9999) * raw.double()

    def grown(values):
        return float(((values.double() - exact) * exact.sign()).sum() / exact.abs().sum())

    assert grown(official) == pytest.approx(-1.6e-5, rel=0.2)
    assert abs(grown(ema.model.weight)) < 1e-6
