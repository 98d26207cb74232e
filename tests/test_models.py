import dataclasses

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT
from test_commands import run
from timm.layers import DropPath

from reconverge.base import chance
from reconverge.base.errors import Stop
from reconverge.commands.models import _settings
from reconverge.config.settings import Model
from reconverge.models import create, drop_path, table
from reconverge.models.initial import truncated_normal
from reconverge.models.isotropic import Isotropic

CPU = torch.device("cpu")
ROADMAP = """
# Tables 10 and 11: GMACs and top-1 as printed; GMACs and parameters (M) as counted on the authors' code,
# where they are known.
roadmap_00_resnet50                4.09  78.82  4.089  25.56
roadmap_01_stage_ratio             4.53  79.36  4.526  28.63
roadmap_02_patchify_stem           4.42  79.51  4.418  28.62
roadmap_03_depthwise               2.35  78.28  2.350  15.72
roadmap_04_width_96                5.27  80.50  5.268  33.76
roadmap_05_inverted_bottleneck     4.64  80.64  4.644  25.85
roadmap_06_depthwise_first         4.07  79.92  4.065  25.63
roadmap_07_kernel_5                4.10  80.35  4.097  25.72
roadmap_08_kernel_7                4.15  80.57  4.146  25.86
roadmap_09_kernel_9                4.21  80.57  4.210  26.05
roadmap_10_kernel_11               4.29  80.47  4.291  26.29
roadmap_11_gelu                    4.15  80.62  4.146  25.86
roadmap_12_fewer_activations       4.15  81.27  4.146  25.86
roadmap_13_fewer_norms             4.15  81.41  4.146  25.80
roadmap_14_layer_norm              4.46  81.47  4.146  25.84
roadmap_15_downsampling            4.49  81.97  4.456  28.59
roadmap_b_00_resnet200             15.01 81.14  15.007 64.67
roadmap_b_01_stage_ratio_width_84  14.52 81.33  14.518 83.07
roadmap_b_02_patchify_stem         14.38 81.59  14.376 83.06
roadmap_b_03_depthwise             7.23  80.54  7.234  42.59
roadmap_b_04_width_128             16.76 81.85  16.764 96.53
roadmap_b_05_inverted_bottleneck   15.68 82.64  15.679 83.70
roadmap_b_06_depthwise_first       14.63 82.04  14.627 83.09
roadmap_b_07_kernel_5              14.70 82.32  -      -
roadmap_b_08_kernel_7              14.81 82.30  14.807 83.78
roadmap_b_09_kernel_9              14.95 82.27  -      -
roadmap_b_10_kernel_11             15.13 82.18  -      -
roadmap_b_11_gelu                  14.81 82.19  -      -
roadmap_b_12_fewer_activations     14.81 82.71  -      -
roadmap_b_13_fewer_norms           14.81 83.17  -      -
roadmap_b_14_layer_norm            14.81 83.35  14.807 83.71
roadmap_b_15_downsampling          15.35 83.60  15.355 88.59
"""
# Two numbers of Table 10 are misprints: "BN to LN" prints 4.46 where Figure 2 has 4.2 and Table 11 no change,
# and ConvNeXt-T 4.49.
SLIPS = {"roadmap_14_layer_norm": ("4.46", "4.15"), "roadmap_15_downsampling": ("4.49", "4.46")}

PAPER = """
# Tables 1, 2, 8 and 9: pixels, parameters (M), GMACs, top-1 trained on ImageNet-1K, top-1 pre-trained on
# ImageNet-22K; atto: timm's
convnext_atto   224 3.7  0.55  -     -
convnext_t      224 28.6 4.5   82.1  82.9
convnext_t      384 28.6 13.1  -     84.1
convnext_s      224 50   8.7   83.1  84.6
convnext_s      384 50   25.5  -     85.8
convnext_b      224 89   15.4  83.8  85.8
convnext_b      384 89   45.1  85.1  86.8
convnext_l      224 198  34.4  84.3  86.6
convnext_l      384 198  101.0 85.5  87.5
convnext_xl     224 350  60.9  -     87.0
convnext_xl     384 350  179.0 -     87.8
convnext_iso_s  224 22   4.3   79.7  -
convnext_iso_b  224 87   16.9  82.0  -
convnext_iso_l  224 306  59.7  82.6  -
resnet50        224 25.6 4.09  76.13 -
resnet200       224 -    15.01 78.20 -
deit_s          224 22   4.6   79.8  -
deit_b          224 87   17.6  81.8  -
vit_s           224 22   4.6   79.8  -
vit_b           224 87   17.6  81.8  -
vit_b           384 87   55.5  -     85.4
vit_l           224 304  61.6  82.6  -
vit_l           384 305  191.1 -     86.8
swin_t          224 28   4.5   81.3  -
swin_s          224 50   8.7   83.0  -
swin_b          224 88   15.4  83.5  85.2
swin_b_384      384 88   47.1  84.5  86.4
swin_l          224 197  34.5  -     86.3
swin_l_384      384 197  103.9 -     87.3
"""
OTHERWISE = """
# Counted otherwise: pixels, parameters and GMACs as published and as counted, top-1s
regnety_16g     224 84   16.0  83.59  15.91  82.9  -
effnet_b7       600 66   37.0  66.35  37.75  84.3  -
effnetv2_l      480 120  53.0  118.52 56.08  85.7  86.8
effnetv2_xl     480 208  94.0  208.12 82.05  -     87.3
r101x3          384 388  204.6 387.93 204.21 -     84.4
r152x4          480 937  840.5 936.53 839.25 -     85.4
"""
# Depths and widths (section 3 and Table 9)
SHAPES = {
    "convnext_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext_t": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_s": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_b": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_l": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xl": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "convnext_iso_s": ((18,), (384,)),
    "convnext_iso_b": ((18,), (768,)),
    "convnext_iso_l": ((36,), (1024,)),
}


def rows(table, macs=None):
    """Split lines. With the column of GMACs, models that take long to count are marked slow."""
    found = [line.split() for line in table.strip().splitlines() if not line.startswith("#")]
    return (
        found
        if macs is None
        else [row if float(row[macs]) < 6 else pytest.param(*row, marks=pytest.mark.slow) for row in found]
    )


def model(name="convnext_atto", **settings):
    return Model(name=name, size="t", **{"drop_path": 0.0, **settings})


def in_conf(name):
    """The settings of conf/model."""
    return {given.name: given for given in _settings(ROOT / "conf" / "model").values()}[name]


def published(name, size):
    (row,) = [row for row in table.MODELS[name].published if row.size == int(size)]
    return row


def number(text):
    return None if text == "-" else float(text)


def rounded(value, like):
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_the_typed_tables_hold_every_model_at_every_size():
    typed = [(name, 224) for name, *_ in rows(ROADMAP)] + [
        (name, int(size)) for name, size, *_ in rows(PAPER) + rows(OTHERWISE)
    ]
    assert sorted(typed) == sorted(
        (name, row.size) for name, spec in table.MODELS.items() for row in spec.published
    )


@pytest.mark.parametrize(("name", "size", "parameters", "macs", "top1", "top1_22k"), rows(PAPER, macs=3))
def test_parameters_and_macs_are_the_published_ones(
    counted_once, name, size, parameters, macs, top1, top1_22k
):
    row = published(name, size)
    assert row[1:5] == tuple(map(number, (parameters, macs, top1, top1_22k)))
    assert row.counted is None
    counted = table.MODELS[name].count(in_conf(name), int(size))
    assert parameters == "-" or rounded(counted[0], parameters) == parameters
    assert rounded(counted[1], macs) == macs


@pytest.mark.parametrize(
    ("name", "size", "parameters", "macs", "counted_parameters", "counted_macs", "top1", "top1_22k"),
    rows(OTHERWISE, macs=3),
)
def test_models_that_others_counted_otherwise(
    counted_once, name, size, parameters, macs, counted_parameters, counted_macs, top1, top1_22k
):
    """Both numbers are tested, and the table has a note that explains the difference."""
    row = published(name, size)
    assert row[1:5] == tuple(map(number, (parameters, macs, top1, top1_22k)))
    assert row.counted == (float(counted_parameters), float(counted_macs))
    counted = table.MODELS[name].count(in_conf(name), int(size))
    assert tuple(map(rounded, counted, (counted_parameters, counted_macs))) == (
        counted_parameters,
        counted_macs,
    )
    assert "published" in row.note or "paper does not say" in row.note


@pytest.mark.parametrize(("name", "macs", "top1", "measured", "parameters"), rows(ROADMAP, macs=1))
def test_the_roadmap_counts_as_tables_10_and_11(counted_once, name, macs, top1, measured, parameters):
    row = published(name, 224)
    assert (row.parameters, row.macs, row.top1) == tuple(map(number, (parameters, macs, top1)))
    counted = table.MODELS[name].count(in_conf(name), 224)
    assert measured == "-" or rounded(counted[1], measured) == measured
    assert parameters == "-" or rounded(counted[0], parameters) == parameters
    if name in SLIPS:
        assert (macs, rounded(counted[1], macs)) == SLIPS[name]
        assert row.counted == (float(parameters), float(SLIPS[name][1]))
    else:
        assert rounded(counted[1], macs) == macs
        assert row.counted is None


@pytest.mark.slow
def test_the_page_of_models_is_what_the_command_prints(monkeypatch, capsys, counted_once):
    """Stale? reconverge models --markdown > docs/models.md"""
    code, said = run(monkeypatch, capsys, "models", "--markdown")
    assert code == 0
    assert (ROOT / "docs" / "models.md").read_text() == said.out


def test_every_model_has_its_file_and_every_file_its_model():
    folder = ROOT / "conf" / "model"
    named = {
        str(path.relative_to(folder).with_suffix("")): yaml.safe_load(path.read_text())["name"]
        for path in folder.rglob("*.yaml")
    }
    assert named.pop("timm") == "${model.timm}"
    assert {file.replace("/", "_") for file in named} == set(named.values()) == set(table.MODELS)
    assert all(file.replace("/", "_") == name for file, name in named.items())
    for name in table.MODELS:
        given = yaml.safe_load(
            next(folder / f"{file}.yaml" for file in named if named[file] == name).read_text()
        )
        assert ("image_size" in given) == bool(table.MODELS[name].fixed_size)


@pytest.mark.parametrize("name", SHAPES)
def test_depths_and_widths(name):
    with torch.device("meta"):
        net = table.find(model(name)).build(model(name), 1000)
    stages = [stage.blocks for stage in net.stages] if hasattr(net, "stages") else [net.blocks]
    assert (tuple(map(len, stages)), tuple(blocks[0].conv_dw.weight.shape[0] for blocks in stages)) == SHAPES[
        name
    ]


@pytest.mark.parametrize("name", ["deit_s", "resnet50", "swin_t"])
def test_other_models_start_as_timm_draws_them(name):
    timm_name = {
        "deit_s": "deit_small_patch16_224",
        "resnet50": "resnet50",
        "swin_t": "swin_tiny_patch4_window7_224",
    }[name]
    size = {} if name == "resnet50" else {"image_size": 224}
    net = create.model(model(name, layer_scale=None, **size), 10, seed=3)
    with chance.scope(3, "init"):
        reference = timm.create_model(timm_name, num_classes=10)
    assert all(torch.equal(tensor, reference.state_dict()[key]) for key, tensor in net.state_dict().items())
    torch.manual_seed(99)
    other = create.model(model(name, layer_scale=None, **size), 10, seed=4)
    assert not all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_drop_rates_of_other_models_are_masks_too():
    for name, blocks in (("swin_t", 12), ("resnet50", 16)):
        net = create.model(
            model(name, layer_scale=None, drop_path=0.2, image_size=32 if name == "swin_t" else None), 10, 0
        )
        assert not [module for module in net.modules() if isinstance(module, DropPath)]
        rates = drop_path.rates(net)
        linear = [0.2 * block / (blocks - 1) for block in range(1, blocks)]
        assert rates == pytest.approx([rate for rate in linear for _ in range(2 if name == "swin_t" else 1)])


@pytest.mark.parametrize("name", ["vit_s", "swin_t"])
def test_models_of_one_size_are_built_for_the_images(name):
    net = create.model(model(name, layer_scale=None, image_size=64), 10, 0).eval()
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    with pytest.raises(AssertionError, match="64"):
        net(torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "vit_b", "image_size": 225}, r"225 px(.|\n)*patch size, 16 px(.|\n)*augment.size=224"),
        ({"name": "vit_b"}, r"vit_b without model.image_size(.|\n)*model.image_size=224"),
        ({"name": "swin_l_384"}, r"model.image_size=384"),
        ({"name": "resnet50", "image_size": 224}, r"any size(.|\n)*model.image_size=null"),
        ({"name": "convnext_t", "image_size": 224}, r"any size(.|\n)*model.image_size=null"),
        ({"name": "resnet50", "layer_scale": 1e-6}, r"model.layer_scale=1e-06(.|\n)*model.layer_scale=null"),
        ({"name": "x", "timm": "resnet5"}, r"model.timm=resnet5(.|\n)*timm.list_models(.|\n)*resnet50"),
        ({"name": "x", "timm": "nosuch"}, r"timm.list_models\(\)\n  change   another name$"),
        (
            {"name": "vit_base_patch16_224", "timm": "vit_base_patch16_224"},
            r"model.image_size=224 augment.size=224 evaluate.size=224, the size of its pre-trained weights",
        ),
        ({"name": "x", "timm": "vgg11", "drop_path": 0.1}, r"drop_path_rate=0.1(.|\n)*model.drop_path=0"),
        ({"name": "x", "timm": "rexnet_100"}, r"rexnet_100, which has dropout with rate 0.2"),
        ({"name": "x", "timm": "ghostnet_100"}, r"ghostnet_100, which has dropout with rate 0.2"),
    ],
)
def test_what_a_model_cannot_take_is_refused(settings, said):
    with pytest.raises(Stop, match=said):
        create.model(model(**{"layer_scale": None, **settings}), 10, 0)


def test_any_model_of_timms():
    """It is counted and marked as not in the paper."""
    net = create.model(
        model("test_vit", timm="test_vit", layer_scale=None, image_size=64, drop_path=0.1), 10, 0
    )
    assert net.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    spec = table.find(model("test_resnet", timm="test_resnet"))
    assert (spec.source, spec.published[0].parameters, spec.published[0].macs) == (
        "not in the paper",
        None,
        None,
    )
    scaled = create.model(
        model("test_resnet", timm="test_resnet", layer_scale=None, head_init_scale=0.0), 10, 0
    )
    assert not scaled.fc.weight.any()


def test_initial_weights():
    net = create.model(model("convnext_t"), 1000, seed=0)
    for name, parameter in net.named_parameters():
        if name.endswith("gamma"):
            assert (parameter == 1e-6).all()
        elif parameter.ndim == 1:
            expected = (
                1.0
                if "norm" in name or name in ("stem.1.weight", "head.norm.weight") or ".downsample.0." in name
                else 0.0
            )
            assert (parameter == (0.0 if name.endswith("bias") else expected)).all(), name
        else:
            # Normal with std 0.02, without timm's outliers at 100 times the std. The probability of a value
            # beyond 6.5 times the std is 1e-3.
            assert parameter.abs().max() < 6.5 * 0.02, name
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(float(parameter.detach().mean())) < 0.02 * 5 / parameter.numel() ** 0.5, name


def test_initial_weights_are_a_function_of_the_seed_alone():
    first = create.model(model(), 10, seed=0).state_dict()
    torch.manual_seed(99)
    second = create.model(model(), 10, seed=0).state_dict()
    other = create.model(model(), 10, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])
    assert not torch.equal(
        first["stages.0.blocks.0.mlp.fc1.weight"], first["stages.0.blocks.1.mlp.fc1.weight"]
    )


def test_head_init_scale_and_layer_scale():
    plain, scaled = (
        create.model(model(), 10, 0),
        create.model(model(head_init_scale=0.001, layer_scale=0.5), 10, 0),
    )
    assert torch.equal(scaled.head.fc.weight, plain.head.fc.weight * 0.001)
    assert (scaled.stages[0].blocks[0].gamma == 0.5).all()
    assert create.model(model(layer_scale=None), 10, 0).stages[0].blocks[0].gamma is None


@pytest.mark.parametrize(
    ("name", "rate", "blocks"),
    [
        ("convnext_t", 0.1, 18),
        ("convnext_s", 0.4, 36),
        ("convnext_b", 0.5, 36),
        ("convnext_l", 0.5, 36),
        ("convnext_iso_s", 0.1, 18),
        ("convnext_iso_l", 0.5, 36),
    ],
)
def test_drop_rates_are_linear_over_all_blocks(name, rate, blocks):
    with torch.device("meta"):
        net = table.MODELS[name].build(model(name, drop_path=rate), 10)
    drop_path.replace(net)
    assert not [module for module in net.modules() if isinstance(module, DropPath)]
    # torch.linspace in the official code; the first block's rate is 0, and it has no mask.
    assert drop_path.rates(net) == pytest.approx(
        [rate * block / (blocks - 1) for block in range(1, blocks)], rel=1e-6
    )


def test_isotropic_is_the_published_function():
    """Section 3.3 written as plain functions: patches, then blocks of depthwise 7x7, norm, 1x1 to 4 widths,
    GELU, 1x1; mean, norm, head.
    """
    from torch.nn.functional import conv2d, gelu, layer_norm, linear

    for layer_scale in (None, 0.5):
        net = Isotropic(24, 3, 7, 0.0, layer_scale).eval()
        weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in net.state_dict().items()}
        net.load_state_dict(weights)
        images = torch.randn(2, 3, 64, 64)
        x = conv2d(images, weights["stem.weight"], weights["stem.bias"], stride=16)
        for block in range(3):
            prefix = f"blocks.{block}."
            w = {
                name.removeprefix(prefix): tensor
                for name, tensor in weights.items()
                if name.startswith(prefix)
            }
            y = conv2d(x, w["conv_dw.weight"], w["conv_dw.bias"], padding=3, groups=24).permute(0, 2, 3, 1)
            y = layer_norm(y, (24,), w["norm.weight"], w["norm.bias"], 1e-6)
            y = linear(
                gelu(linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])),
                w["mlp.fc2.weight"],
                w["mlp.fc2.bias"],
            )
            x = x + (y if layer_scale is None else y * w["gamma"]).permute(0, 3, 1, 2)
        x = layer_norm(x.mean((2, 3)), (24,), weights["norm.weight"], weights["norm.bias"], 1e-6)
        expected = linear(x, weights["head.weight"], weights["head.bias"])
        with torch.no_grad():
            assert torch.allclose(net(images), expected, rtol=1e-4, atol=1e-4)


def test_masks_are_keyed_scaled_and_independent():
    rates = [0.1, 0.5]
    masks = torch.stack([drop_path.draw(rates, 64, (0, step, 1), CPU) for step in range(200)])  # (200, 64, 2)
    for row, rate in enumerate(rates):
        values = masks[:, :, row].unique()
        assert values.tolist() == pytest.approx([0.0, 1 / (1 - rate)])
        assert float((masks[:, :, row] == 0).float().mean()) == pytest.approx(rate, abs=0.02)
    assert abs(np.corrcoef(masks[:, :, 0].flatten(), masks[:, :, 1].flatten())[0, 1]) < 0.03
    assert torch.equal(drop_path.draw(rates, 64, (0, 3, 1), CPU), masks[3])
    for key in ((1, 3, 1), (0, 4, 1), (0, 3, 0)):
        assert not torch.equal(drop_path.draw(rates, 64, key, CPU), masks[3])


def test_masks_act_like_timms_drop_path_and_not_in_evaluation():
    net = create.model(model(drop_path=0.5, layer_scale=1.0), 10, 0)
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
    reference = table.MODELS["convnext_atto"].build(model(drop_path=0.5, layer_scale=1.0), 10)
    reference.load_state_dict(net.state_dict())
    rows = iter(masks.T)
    for stage in reference.stages:
        for block in stage.blocks:
            if isinstance(block.drop_path, DropPath):
                block.drop_path = Given(next(rows))
    assert torch.equal(ours, reference(images))
    net.eval()
    assert torch.equal(net(images), reference_without_drops(net, images))
    net.train()
    halves = torch.cat([masked(images[:3], masks[:3]), masked(images[3:], masks[3:])])
    assert torch.allclose(ours, halves, atol=1e-6)  # splitting a forward pass keeps every image's masks


def isotropic():
    net = Isotropic(24, 3, 10, 0.5, 1.0)
    drop_path.replace(net)
    truncated_normal(net, 0)
    return net


def reference_without_drops(net, images):
    plain = table.MODELS["convnext_atto"].build(model(layer_scale=1.0), 10).eval()
    plain.load_state_dict(net.state_dict())
    return plain(images)


@pytest.mark.parametrize(
    "build", [lambda: create.model(model(drop_path=0.5, layer_scale=1.0), 10, 0), lambda: isotropic()]
)
def test_activation_checkpointing_and_channels_last_keep_the_masks(build):
    def gradients(prepare):
        net = build().train()
        prepare(net)
        images = torch.from_numpy(chance.uniform((4, 3, 32, 32), 1)).float()
        drop_path.Masked(net)(
            images, drop_path.draw(drop_path.rates(net), 4, (0, 0, 0), CPU)
        ).square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    plain = gradients(lambda net: None)
    assert torch.equal(plain, gradients(lambda net: net.set_grad_checkpointing()))
    assert torch.allclose(
        plain, gradients(lambda net: net.to(memory_format=torch.channels_last)), rtol=1e-3, atol=1e-4
    )


def test_a_model_that_cannot_be_built_on_the_meta_device_is_counted_too():
    """With timm before 1.0.30 that is RegNet, and before 1.0.23 ConvNeXt."""
    spec = table.MODELS["convnext_atto"]

    def build(settings, classes):
        torch.linspace(0, 1, 3).tolist()
        return spec.build(settings, classes)

    given = Model("convnext_atto", "atto", 0.1)
    before = torch.default_generator.get_state()
    old = dataclasses.replace(spec, build=build)
    assert old.count(given, 224) == spec.count(given, 224)
    assert all(parameter.is_meta for parameter in old.on_meta(given, 10).parameters())
    assert torch.equal(torch.default_generator.get_state(), before)


def test_an_unknown_name_is_refused():
    with pytest.raises(Stop, match=r"model.name=resnet(.|\n)*convnext_atto, convnext_t"):
        create.model(model("resnet"), 10, 0)
