import numpy as np
import pytest
import torch
from timm.layers import DropPath

from reconverge import chance, models
from reconverge.errors import Stop
from reconverge.models import drop_path
from reconverge.models.isotropic import Isotropic
from reconverge.settings import Model

CPU = torch.device("cpu")
# Table 1 and Table 9, typed from the paper; atto from timm's model card.
PAPER = {
    "convnext_atto": (3.7, 0.5, (2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext_t": (28.6, 4.5, (3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_s": (50, 8.7, (3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_b": (89, 15.4, (3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_l": (198, 34.4, (3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xl": (350, 60.9, (3, 3, 27, 3), (256, 512, 1024, 2048)),
    # Table 2, and section 3.3 for depth and width
    "convnext_iso_s": (22, 4.3, (18,), (384,)),
    "convnext_iso_b": (87, 16.9, (18,), (768,)),
    "convnext_iso_l": (306, 59.7, (36,), (1024,)),
}


def model(name="convnext_atto", **settings):
    return Model(name=name, size="t", **{"drop_path": 0.0, **settings})


@pytest.mark.parametrize("name", models.MODELS)
def test_parameters_and_macs_are_the_published_ones(name):
    spec = models.MODELS[name]
    parameters, macs, depths, widths = PAPER[name]
    counted, operations = spec.count(model(name))
    assert round(counted, len(str(parameters).partition(".")[2])) == parameters
    assert round(operations, 1) == macs
    with torch.device("meta"):
        net = spec.build(model(name), 1000)
    assert spec.parameters == pytest.approx(parameters, abs=0.05)
    assert spec.macs == pytest.approx(macs, abs=0.06)
    stages = [stage.blocks for stage in net.stages] if hasattr(net, "stages") else [net.blocks]
    assert tuple(map(len, stages)) == depths
    assert tuple(blocks[0].conv_dw.weight.shape[0] for blocks in stages) == widths


def test_initial_weights():
    net = models.build(model("convnext_t"), 1000, seed=0)
    for name, parameter in net.named_parameters():
        if name.endswith("gamma"):
            assert (parameter == 1e-6).all()
        elif parameter.ndim == 1:
            expected = 1.0 if "norm" in name or name in ("stem.1.weight", "head.norm.weight") or ".downsample.0." in name else 0.0
            assert (parameter == (0.0 if name.endswith("bias") else expected)).all(), name
        else:
            # A normal of deviation 0.02 and none of timm's outliers at 100 deviations: the chance of one beyond 6.5 is 1e-3.
            assert parameter.abs().max() < 6.5 * 0.02, name
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(float(parameter.detach().mean())) < 0.02 * 5 / parameter.numel() ** 0.5, name


def test_initial_weights_are_a_function_of_the_seed_alone():
    first = models.build(model(), 10, seed=0).state_dict()
    torch.manual_seed(99)
    second = models.build(model(), 10, seed=0).state_dict()
    other = models.build(model(), 10, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])
    assert not torch.equal(first["stages.0.blocks.0.mlp.fc1.weight"], first["stages.0.blocks.1.mlp.fc1.weight"])


def test_head_init_scale_and_layer_scale():
    plain, scaled = models.build(model(), 10, 0), models.build(model(head_init_scale=0.001, layer_scale=0.5), 10, 0)
    assert torch.equal(scaled.head.fc.weight, plain.head.fc.weight * 0.001)
    assert (scaled.stages[0].blocks[0].gamma == 0.5).all()
    assert models.build(model(layer_scale=None), 10, 0).stages[0].blocks[0].gamma is None


@pytest.mark.parametrize(("name", "rate", "blocks"), [("convnext_t", 0.1, 18), ("convnext_s", 0.4, 36), ("convnext_b", 0.5, 36), ("convnext_l", 0.5, 36), ("convnext_iso_s", 0.1, 18), ("convnext_iso_l", 0.5, 36)])  # fmt: skip
def test_drop_rates_are_linear_over_all_blocks(name, rate, blocks):
    with torch.device("meta"):
        net = models.MODELS[name].build(model(name, drop_path=rate), 10)
    drop_path.replace(net)
    assert not [module for module in net.modules() if isinstance(module, DropPath)]
    # torch.linspace in the official code; the first block's rate is 0, and it has no mask.
    assert drop_path.rates(net) == pytest.approx([rate * block / (blocks - 1) for block in range(1, blocks)], rel=1e-6)


def test_isotropic_is_the_published_function():
    """Section 3.3 written as plain functions: patches, then blocks of depthwise 7x7, norm, 1x1 to 4 widths, GELU, 1x1; mean, norm, head."""
    from torch.nn.functional import conv2d, gelu, layer_norm, linear

    for layer_scale in (None, 0.5):
        net = Isotropic(24, 3, 7, 0.0, layer_scale).eval()
        weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in net.state_dict().items()}
        net.load_state_dict(weights)
        images = torch.randn(2, 3, 64, 64)
        x = conv2d(images, weights["stem.weight"], weights["stem.bias"], stride=16)
        for block in range(3):
            prefix = f"blocks.{block}."
            w = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            y = conv2d(x, w["conv_dw.weight"], w["conv_dw.bias"], padding=3, groups=24).permute(0, 2, 3, 1)
            y = layer_norm(y, (24,), w["norm.weight"], w["norm.bias"], 1e-6)
            y = linear(gelu(linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])), w["mlp.fc2.weight"], w["mlp.fc2.bias"])
            x = x + (y if layer_scale is None else y * w["gamma"]).permute(0, 3, 1, 2)
        x = layer_norm(x.mean((2, 3)), (24,), weights["norm.weight"], weights["norm.bias"], 1e-6)
        expected = linear(x, weights["head.weight"], weights["head.bias"])
        with torch.no_grad():
            assert torch.allclose(net(images), expected, rtol=1e-4, atol=1e-4)


def test_masks_are_keyed_scaled_and_independent():
    rates = [0.1, 0.5]
    masks = torch.stack([drop_path.draw(rates, 64, (0, step, 1), CPU) for step in range(200)])  # (200, 2, 64)
    for row, rate in enumerate(rates):
        values = masks[:, row].unique()
        assert values.tolist() == pytest.approx([0.0, 1 / (1 - rate)])
        assert float((masks[:, row] == 0).float().mean()) == pytest.approx(rate, abs=0.02)
    assert abs(np.corrcoef(masks[:, 0].flatten(), masks[:, 1].flatten())[0, 1]) < 0.03
    assert torch.equal(drop_path.draw(rates, 64, (0, 3, 1), CPU), masks[3])
    for key in ((1, 3, 1), (0, 4, 1), (0, 3, 0)):
        assert not torch.equal(drop_path.draw(rates, 64, key, CPU), masks[3])


def test_masks_act_like_timms_drop_path_and_not_in_evaluation():
    net = models.build(model(drop_path=0.5, layer_scale=1.0), 10, 0)
    masked = drop_path.Masked(net)
    images = torch.randn(6, 3, 32, 32)
    masks = drop_path.draw(drop_path.rates(net), 6, (0, 0, 0), CPU)

    class Given(torch.nn.Module):  # a reference: timm's formula with the same draws, written on its own
        def __init__(self, mask):
            super().__init__()
            self.mask = mask

        def forward(self, x):
            return x * self.mask.reshape(-1, 1, 1, 1)

    net.train()
    ours = masked(images, masks)
    reference = models.MODELS["convnext_atto"].build(model(drop_path=0.5, layer_scale=1.0), 10)
    reference.load_state_dict(net.state_dict())
    rows = iter(masks)
    for stage in reference.stages:
        for block in stage.blocks:
            if isinstance(block.drop_path, DropPath):
                block.drop_path = Given(next(rows))
    assert torch.equal(ours, reference(images))
    net.eval()
    assert torch.equal(net(images), reference_without_drops(net, images))
    net.train()
    halves = torch.cat([masked(images[:3], masks[:, :3]), masked(images[3:], masks[:, 3:])])
    assert torch.allclose(ours, halves, atol=1e-6)  # splitting a forward pass keeps every image's masks


def isotropic():
    net = Isotropic(24, 3, 10, 0.5, 1.0)
    drop_path.replace(net)
    models.truncated_normal(net, 0)
    return net


def reference_without_drops(net, images):
    plain = models.MODELS["convnext_atto"].build(model(layer_scale=1.0), 10).eval()
    plain.load_state_dict(net.state_dict())
    return plain(images)


@pytest.mark.parametrize("build", [lambda: models.build(model(drop_path=0.5, layer_scale=1.0), 10, 0), lambda: isotropic()])
def test_activation_checkpointing_and_channels_last_keep_the_masks(build):
    def gradients(prepare):
        net = build().train()
        prepare(net)
        images = torch.from_numpy(chance.uniform((4, 3, 32, 32), 1)).float()
        drop_path.Masked(net)(images, drop_path.draw(drop_path.rates(net), 4, (0, 0, 0), CPU)).square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    plain = gradients(lambda net: None)
    assert torch.equal(plain, gradients(lambda net: net.set_grad_checkpointing()))
    assert torch.allclose(plain, gradients(lambda net: net.to(memory_format=torch.channels_last)), rtol=1e-3, atol=1e-4)


def test_an_unknown_name_is_refused():
    with pytest.raises(Stop, match=r"model.name=resnet(.|\n)*convnext_atto, convnext_t"):
        models.build(model("resnet"), 10, 0)
