"""Every step of the roadmap against tables typed from the paper and from the definition of its steps."""

import re

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from reconverge.base import chance
from reconverge.config.settings import Model
from reconverge.models import create, table

# Blocks of each stage and width of the first, after each step.
SIZES = {
    "00_resnet50": ("3 4 6 3", 64), "01_stage_ratio": ("3 3 9 3", 64), "02_patchify_stem": ("3 3 9 3", 64),
    "03_depthwise": ("3 3 9 3", 64),
    **dict.fromkeys(["04_width_96", "05_inverted_bottleneck", "06_depthwise_first", "07_kernel_5",
            "08_kernel_7", "09_kernel_9", "10_kernel_11"], ("3 3 9 3", 96)),
    **dict.fromkeys(["11_gelu", "12_fewer_activations", "13_fewer_norms", "14_layer_norm", "15_downsampling"],
        ("3 3 9 3", 96)),
    "b_00_resnet200": ("3 24 36 3", 64), "b_01_stage_ratio_width_84": ("3 3 27 3", 84),
    "b_02_patchify_stem": ("3 3 27 3", 84), "b_03_depthwise": ("3 3 27 3", 84),
    **dict.fromkeys(["b_04_width_128", "b_05_inverted_bottleneck", "b_06_depthwise_first", "b_07_kernel_5",
            "b_08_kernel_7", "b_09_kernel_9", "b_10_kernel_11"], ("3 3 27 3", 128)),
    **dict.fromkeys(["b_11_gelu", "b_12_fewer_activations", "b_13_fewer_norms", "b_14_layer_norm",
            "b_15_downsampling"], ("3 3 27 3", 128)),
}  # fmt: skip

RESNET_STEM, PATCHES = "7x7/2 3>w BN ReLU max3/2", "4x4/4 p0 3>w b"
BOTTLENECK = "1x1 i>w BN ReLU 3x3/s w>w BN ReLU 1x1 w>4w BN"
DEPTHWISE = "1x1 i>w BN ReLU 3x3/s w>w gw BN ReLU 1x1 w>4w BN"
INVERTED = "1x1 i>4w BN ReLU 3x3/s 4w>4w g4w BN ReLU 1x1 4w>w BN"
FIRST = "{0}x{0}/s i>i gi BN ReLU 1x1 i>4w BN ReLU 1x1 4w>w BN"

# By number: stem; a block's branch; its shortcut, where there is a projection, and the stages whose first
# block has one; what follows the sum; what stands before stages 2 to 4; head. w: width of the stage, i:
# channels before the block, s: stride, g: groups, b: bias.
STEPS = {
    0: (RESNET_STEM, BOTTLENECK, "1x1/s i>4w BN", "1234", "ReLU", "", "fc 32W"),
    1: (RESNET_STEM, BOTTLENECK, "1x1/s i>4w BN", "1234", "ReLU", "", "fc 32W"),
    2: (PATCHES, BOTTLENECK, "1x1/s i>4w BN", "1234", "ReLU", "", "fc 32W"),
    3: (PATCHES, DEPTHWISE, "1x1/s i>4w BN", "1234", "ReLU", "", "fc 32W"),
    4: (PATCHES, DEPTHWISE, "1x1/s i>4w BN", "1234", "ReLU", "", "fc 32W"),
    5: (PATCHES, INVERTED, "1x1/s i>w BN", "234", "ReLU", "", "fc 8W"),
    6: (PATCHES, FIRST.format(3), "1x1/s i>w BN", "234", "ReLU", "", "fc 8W"),
    7: (PATCHES, FIRST.format(5), "1x1/s i>w BN", "234", "ReLU", "", "fc 8W"),
    8: (PATCHES, FIRST.format(7), "1x1/s i>w BN", "234", "ReLU", "", "fc 8W"),
    9: (PATCHES, FIRST.format(9), "1x1/s i>w BN", "234", "ReLU", "", "fc 8W"),
    10: (PATCHES, FIRST.format(11), "1x1/s i>w BN", "234", "ReLU", "", "fc 8W"),
    11: (
        PATCHES,
        "7x7/s i>i gi BN GELU 1x1 i>4w BN GELU 1x1 4w>w BN",
        "1x1/s i>w BN",
        "234",
        "GELU",
        "",
        "fc 8W",
    ),
    12: (PATCHES, "7x7/s i>i gi BN 1x1 i>4w BN GELU 1x1 4w>w BN", "1x1/s i>w BN", "234", "", "", "fc 8W"),
    13: (PATCHES, "7x7/s i>i gi BN 1x1 i>4w GELU 1x1 4w>w", "1x1/s i>w BN", "234", "", "", "fc 8W"),
    14: (PATCHES, "7x7/s i>i gi b LN 1x1 i>4w b GELU 1x1 4w>w b", "1x1/s i>w LN", "234", "", "", "fc 8W"),
    15: (
        PATCHES + " LN",
        "7x7 i>i gi b LN 1x1 i>4w b GELU 1x1 4w>w b",
        "",
        "",
        "",
        "LN 2x2/2 p0 i>w b",
        "LN fc 8W",
    ),
}
# Output channels of a block: four times the width for bottlenecks, and the width for inverted ones.
LEAVING = {step: 4 if step < 5 else 1 for step in STEPS}


def expected(name):
    """The lines of the tables above, written out for every block."""
    depths, first = SIZES[name]
    step = int(re.search(r"\d\d", name).group())
    stem, branch, projection, projected, after, between, head = STEPS[step]

    def write(text, before, width, stride):
        numbers = {"4w": 4 * width, "w": width, "i": before}
        text = text.replace("/s", f"/{stride}" if stride > 1 else "")
        return re.sub(r"\b(g?)(4w|w|i)\b", lambda found: found[1] + str(numbers[found[2]]), text)

    lines, before = ["stem: " + write(stem, 3, first, 1)], first
    for stage, depth in enumerate(map(int, depths.split()), start=1):
        width = first * 2 ** (stage - 1)
        if between and stage > 1:
            lines.append(f"before stage {stage}: " + write(between, before, width, 1))
            before = width
        for block in range(depth):
            stride = 2 if stage > 1 and block == 0 and not between else 1
            parts = [write(branch, before, width, stride)]
            if block == 0 and str(stage) in projected:
                parts.append(write(projection, before, width, stride))
            lines.append(f"stage {stage} block {block}: " + " | ".join(parts + [after] * bool(after)))
            before = LEAVING[step] * width
    return [*lines, "head: " + re.sub(r"(\d+)W", lambda found: str(int(found[1]) * first), head)]


def described(module):
    if isinstance(module, nn.Conv2d):
        (kernel, _), (stride, _), (padding, _) = module.kernel_size, module.stride, module.padding
        text = (
            f"{kernel}x{kernel}"
            + (f"/{stride}" if stride > 1 else "")
            + (f" p{padding}" if padding != kernel // 2 else "")
        )
        groups = f" g{module.groups}" if module.groups > 1 else ""
        return f"{text} {module.in_channels}>{module.out_channels}{groups}" + (
            " b" if module.bias is not None else ""
        )
    if isinstance(module, nn.LayerNorm):
        assert module.eps == 1e-6
        assert isinstance(module, LayerNorm2d) or type(module) is nn.LayerNorm
        return "LN"
    if isinstance(module, nn.GELU):
        assert module.approximate == "none"
    if isinstance(module, nn.Linear):
        return f"fc {module.in_features}"
    return {nn.BatchNorm2d: "BN", nn.ReLU: "ReLU", nn.GELU: "GELU", nn.MaxPool2d: "max3/2"}[type(module)]


def structure(net):
    """The operations of a forward pass in order, one line for each block."""
    calls = []
    for name, module in net.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(
                lambda module, *_, name=name: calls.append((name, described(module)))
            )
    net(torch.empty(1, 3, 64, 64, device="meta"))
    lines = []
    for name, text in calls:
        stage, kind, block, part = re.fullmatch(
            r"(?:stages\.(\d)\.)?(\w+)(?:\.(\d+))?(?:\.(\w+))?.*", name
        ).groups()
        title = {
            "stem": "stem",
            "norm": "head",
            "head": "head",
            "downsample": f"before stage {int(stage or 0) + 1}",
            "blocks": f"stage {int(stage or 0) + 1} block {block}",
        }[kind]
        if lines and lines[-1][0] == title:
            lines[-1][1] += f" {'| ' * (kind == 'blocks' and lines[-1][2] != part)}{text}"
            lines[-1][2] = part
        else:
            lines.append([title, text, part])
    return [f"{title}: {text}" for title, text, _ in lines]


def settings(name, **given):
    return Model("roadmap_" + name, "t", **{"drop_path": 0.0, "layer_scale": None, **given})


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def test_the_steps_are_those_of_tables_10_and_11():
    assert ["roadmap_" + name for name in SIZES] == [
        name for name in table.MODELS if name.startswith("roadmap")
    ]


@pytest.mark.parametrize("name", SIZES)
def test_structure_is_the_typed_one(name):
    with torch.device("meta"):
        net = table.find(settings(name)).build(settings(name), 1000)
    assert structure(net.eval()) == expected(name)


@pytest.mark.parametrize(
    ("name", "timm_name"), [("15_downsampling", "convnext_tiny"), slow("b_15_downsampling", "convnext_base")]
)
def test_the_last_step_is_convnext(name, timm_name):
    """The same function as timm's: weights mapped by hand, logits of two images at 64 px."""
    import timm

    ours = create.model(settings(name, layer_scale=0.3), 1000, 0).eval()
    theirs = timm.create_model(timm_name, ls_init_value=0.3).eval()
    weights = ours.state_dict()
    for key, tensor in weights.items():
        weights[key] = (
            torch.from_numpy(chance.uniform(tuple(tensor.shape), "last", key))
            .to(tensor.dtype)
            .sub_(0.5)
            .mul_(0.2)
            + tensor
        )
    ours.load_state_dict(weights)
    mapped = {}
    for key, tensor in weights.items():
        for mine, its in (
            ("branch.0.", "conv_dw."),
            ("branch.1.", "norm."),
            ("branch.2.", "mlp.fc1."),
            ("branch.4.", "mlp.fc2."),
        ):
            key = key.replace(mine, its)
        key = re.sub("^norm", "head.norm", re.sub("^head", "head.fc", key))
        mapped[key] = tensor.flatten(1) if ".mlp." in key and key.endswith("weight") else tensor
    theirs.load_state_dict(mapped)
    images = torch.from_numpy(chance.uniform((2, 3, 64, 64), "images")).float()
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), rtol=0, atol=1e-5)
        assert ours(images).std() > 0.1


@pytest.mark.parametrize("name", ["15_downsampling", slow("b_15_downsampling")])
def test_the_last_step_starts_as_convnext(name):
    last = create.model(settings(name, layer_scale=1e-6), 1000, 0)
    for path, module in last.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1), path
            assert (module.bias == 0).all(), path
    assert all((block.gamma == 1e-6).all() for stage in last.stages for block in stage["blocks"])


def test_earlier_steps_start_as_the_authors_code():
    net = create.model(settings("12_fewer_activations"), 1000, 0)
    torch.manual_seed(99)
    again, other = (
        create.model(settings("12_fewer_activations"), 1000, 0),
        create.model(settings("12_fewer_activations"), 1000, 1),
    )
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not torch.equal(net.stem[0].weight, other.stem[0].weight)
    assert float(net.head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert (net.head.bias == 0).all()
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):  # PyTorch's: uniform within 1 / sqrt(inputs of a weight)
            bound = module.weight[0].numel() ** -0.5
            assert float(module.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1), path
            assert module.weight.abs().max() <= bound, path
            assert list(module.parameters())[1:] == [] or path == "stem.0"


def test_stochastic_depth_and_layer_scale_stand_in_every_block():
    net = create.model(settings("03_depthwise", drop_path=0.17, layer_scale=0.25), 10, 0)
    blocks = [block for stage in net.stages for block in stage["blocks"]]
    assert [getattr(block.drop_path, "rate", 0.0) for block in blocks] == pytest.approx(
        [0.17 * b / 17 for b in range(18)]
    )
    x = torch.randn(2, 64, 8, 8)
    block = blocks[0].eval()
    with torch.no_grad():
        assert torch.allclose(block(x), (block.shortcut(x) + 0.25 * block.branch(x)).relu())


def fit(name):
    """Cross-entropy of four small images before and after 20 steps of AdamW on them."""
    net = create.model(settings(name, layer_scale=1e-6 if "15" in name else None), 10, 0).train()
    side = (
        32 if "00" in name or "15" in name else 16
    )  # after the strides, 16 pixels are too few for ResNet-200 and ConvNeXt
    images = torch.from_numpy(chance.uniform((4, 3, side, side), "fit")).float().sub_(0.5).mul_(4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    losses = []
    for step in range(21):
        loss = nn.functional.cross_entropy(net(images), torch.arange(4))
        losses.append(float(loss.detach()))
        if step < 20:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


@pytest.mark.parametrize("name", [name if name == "03_depthwise" else slow(name) for name in SIZES])
def test_every_step_learns(name):
    losses = fit(name)
    assert losses[-1] <= 0.8 * losses[0]
