"""Weights of other code in our models: the same function, a report of every key, the rules for the head,
resampled positions.
"""

import importlib.resources
import json

import official
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from reconverge.base import imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Model
from reconverge.models import create, drop_path, table
from reconverge.weights import load, names

slow = pytest.mark.slow


def classes_called(count):
    return [f"class{row}" for row in range(count)]


def small(classes=4):
    """timm's smallest ConvNeXt, with weights that all have an effect."""
    net = timm.create_model("test_convnext", num_classes=classes).eval()
    drop_path.replace(net)
    scrambled(net, classes)
    return net


def scrambled(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    return net


def save(net, path="w.safetensors", **changed):
    """Save the weights of a net, with some changed; None removes one."""
    tensors = {**net.state_dict(), **changed}
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path
    )
    return path


def stopped(*arguments, code=Exit.USAGE):
    with pytest.raises(Stop) as caught:
        load.load(*arguments)
    assert caught.value.code == code
    return str(caught.value)


def same(net, other, leave_out=()):
    theirs = other.state_dict()
    return all(
        torch.equal(tensor, theirs[name])
        for name, tensor in net.state_dict().items()
        if not name.startswith(leave_out or "-")
    )


# ---- the same function ----


@pytest.mark.parametrize(
    ("size", "classes", "pixels"),
    [
        ("t", 1000, 64),
        ("t", 21841, 32),
        ("t", 1000, 384),
        ("iso_s", 1000, 64),
        pytest.param("s", 1000, 224, marks=slow),
        pytest.param("b", 1000, 384, marks=slow),
        pytest.param("l", 1000, 32, marks=slow),
        pytest.param("xl", 21841, 32, marks=slow),
        pytest.param("iso_b", 1000, 224, marks=slow),
        pytest.param("iso_l", 1000, 32, marks=slow),
    ],
)
def test_official_weights_give_the_official_logits(size, classes, pixels):
    layer_scale = None if size in ("iso_s", "iso_b") else 1e-6
    if size in official.ISOTROPIC:
        depth, width = official.ISOTROPIC[size]
        given = official.drawn(official.isotropic_shapes(depth, width, classes, layer_scale is not None))
    else:
        depth = official.DEPTHS[size]
        given = official.drawn(official.shapes(depth, official.WIDTHS[size], classes))
    torch.save({"model": given}, "official.pth")
    with torch.device("meta"):
        net = table.MODELS[f"convnext_{size}"].build(
            Model("", size, drop_path=0.0, layer_scale=layer_scale), classes
        )
    net = net.to_empty(device="cpu").eval()  # weights that are not loaded stay undefined
    origin = load.load(net, "official.pth", True, "keep", classes_called(classes))
    images = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = net(images)
    theirs = (official.isotropic if size in official.ISOTROPIC else official.convnext)(images, given, depth)
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 2e-6
    assert (
        sum(len(origin["keys"][kind]) for kind in ("loaded", "converted", "of the head"))
        == len(given)
        == len(net.state_dict())
    )


@pytest.mark.parametrize(
    "change", ["stages.2.5.gamma", "downsample_layers.3.0.bias", "norm.weight", "stages.0.1.pwconv1.bias"]
)
def test_the_reference_feels_every_kind_of_weight(change):
    given = official.drawn(official.shapes((1, 2, 6, 1), (8, 16, 24, 32), 5))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = official.convnext(images, given, (1, 2, 6, 1))
    given[change.replace("stages.0.1", "stages.0.0")] += 0.1
    assert (official.convnext(images, given, (1, 2, 6, 1)) - before).abs().max() > 1e-4


def test_torchvision_weights_give_torchvisions_logits():
    theirs = torchvision.models.convnext_tiny(num_classes=7).eval()
    given = {name: tensor for name, tensor in official_scale(theirs).items()}
    theirs.load_state_dict(given)
    torch.save(given, "torchvision.pth")
    net = create.model(Model(name="convnext_t", size="t", drop_path=0.0), 7, 0).eval()
    origin = load.load(net, "torchvision.pth", True, "keep", classes_called(7))
    assert origin["layout"] == "torchvision's ConvNeXt"
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, ours = theirs(images), net(images)
    assert expected.std() > 0.5
    assert (ours - expected).abs().max() < 2e-6


def official_scale(net):
    """Weights for a torchvision model, of the sizes that keep activations near 1."""
    generator, given = torch.Generator().manual_seed(0), {}
    for name, tensor in net.state_dict().items():
        normal = torch.empty_like(tensor).normal_(generator=generator)
        if name.endswith("layer_scale"):
            given[name] = 0.2 + 0.03 * normal.clamp(-3, 3)
        elif tensor.ndim == 1:
            given[name] = 0.1 * normal + (1.0 if name.endswith("weight") else 0.0)
        else:
            given[name] = normal / tensor[0].numel() ** 0.5
    return given


# ---- every key is accounted for ----


def test_our_own_names_load_as_they_are():
    source, net = small(), scrambled(small(), 9)
    origin = load.load(net, save(source), True, "keep", classes_called(4))
    assert same(net, source)
    keys = {kind: set(listed) for kind, listed in origin["keys"].items()}
    head = {"head.fc.weight", "head.fc.bias"}
    nothing = {"converted": set(), "missing": set(), "unexpected": set(), "of another shape": set()}
    assert keys == nothing | {"loaded": set(source.state_dict()) - head, "of the head": head}
    json.dumps(origin)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(prefix):
    source, net = small(), scrambled(small(), 9)
    torch.save({f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}, "w.pth")
    load.load(net, "w.pth", True, "keep", classes_called(4))
    assert same(net, source)


def test_the_wrappers_do_put_these_prefixes():
    net = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(net)
    assert {names.stripped(name) for name in compiled.state_dict()} == set(net.state_dict())
    net[0] = torch.compile(net[0])
    assert {names.stripped(name) for name in nn.DataParallel(net).state_dict()} == {"0.weight", "0.bias"}
    assert names.stripped("stages.0.module.weight") == "stages.0.module.weight"


def test_a_weight_with_and_without_a_prefix_is_refused():
    source = small()
    torch.save({**source.state_dict(), "module.stem.0.weight": source.stem[0].weight.detach()}, "w.pth")
    assert "stem.0.weight more than once" in stopped(small(), "w.pth", True, "auto", classes_called(4))


def test_nothing_partial_without_being_told():
    source, net = small(), scrambled(small(), 9)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    path = save(
        source, **{"stem.0.bias": None, "stem.9.bias": torch.zeros(3), "stem.1.weight": torch.ones(5)}
    )
    said = stopped(net, path, True, "keep", classes_called(4))
    total = len(before) - 4
    assert f"{total} loaded, 0 converted, 1 missing, 1 unexpected, 1 of another shape" in said
    for line in (
        "missing          stem.0.bias",
        "unexpected       stem.9.bias",
        "of another shape stem.1.weight (5,) for (24,)",
    ):
        assert line in said
    assert f"init_strict=false to load only the {total} that fit" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    origin = load.load(net, path, False, "keep", classes_called(4))
    assert origin["keys"]["missing"] == ["stem.0.bias"]
    assert origin["keys"]["unexpected"] == ["stem.9.bias"]
    assert origin["keys"]["of another shape"] == ["stem.1.weight (5,) for (24,)"]
    assert same(net, source, ("stem.0.bias", "stem.1.weight"))
    for name in ("stem.0.bias", "stem.1.weight"):
        assert torch.equal(net.state_dict()[name], before[name])
    rows = load.table(origin)
    assert (rows["missing"], rows["unexpected"]) == ("stem.0.bias", "stem.9.bias")


def test_two_names_of_one_weight_are_not_both_taken():
    given = official.drawn(official.shapes((3, 3, 9, 3), (96, 192, 384, 768), 4))
    torch.save({"model": given | {"head.norm.weight": torch.ones(768)}}, "w.pth")
    net = create.model(Model(name="convnext_t", size="t", drop_path=0.0), 4, 0)
    assert "unexpected       head.norm.weight" in stopped(net, "w.pth", True, "auto", classes_called(4))


def test_another_architecture_is_refused_with_the_first_keys():
    torch.save(torchvision.models.resnet18().state_dict(), "resnet.pth")
    said = stopped(
        small(), "resnet.pth", False, "auto", classes_called(4)
    )  # init_strict=false does not help: nothing fits
    assert "0 loaded, 0 converted" in said
    assert "unexpected       conv1.weight, bn1.weight" in said
    assert "missing          stem.0.weight, stem.0.bias" in said
    timm.models.save_for_hf(timm.create_model("test_vit"), "vit", safe_serialization=True)
    assert "these weights are of test_vit" in stopped(small(), "vit", True, "auto", classes_called(4))
    save(small(), "convnext.safetensors")
    assert "0 loaded" in stopped(
        timm.create_model("test_vit"), "convnext.safetensors", True, "auto", classes_called(1000)
    )


def test_weights_that_are_not_finite_are_damaged():
    source = small()
    path = save(source, **{"stem.0.bias": torch.full((24,), float("nan"))})
    assert "stem.0.bias has values that are not finite" in stopped(
        small(), path, True, "auto", classes_called(4), code=Exit.DAMAGED
    )


def test_other_number_types_become_ours():
    source, net = small(), small()
    load.load(net, save(source.half()), True, "keep", classes_called(4))
    assert net.stem[0].weight.dtype == torch.float32
    assert same(net, source.float())


def test_batch_norms_counter_may_be_absent():
    """torch's own loader takes files without num_batches_tracked; it is no weight."""
    source, net = (
        timm.create_model("test_resnet", num_classes=4),
        timm.create_model("test_resnet", num_classes=4),
    )
    counters = {name: None for name in source.state_dict() if name.endswith("num_batches_tracked")}
    origin = load.load(net, save(source, **counters), True, "keep", classes_called(4))
    assert sorted(origin["keys"]["recomputed"]) == sorted(counters)
    assert same(net, source)


# ---- the head ----


def test_a_head_for_other_classes_keeps_its_initial_weights():
    source, net = small(6), scrambled(small(4), 9)
    fresh = net.head.fc.weight.detach().clone()
    origin = load.load(net, save(source), True, "auto", classes_called(4))
    assert torch.equal(net.head.fc.weight, fresh)
    assert same(net, source, ("head.fc",))
    assert origin["head"].startswith("fresh, 4 classes; the 6 classes of the file are different ones")


def test_a_head_for_as_many_other_classes_keeps_its_initial_weights_and_is_reported():
    source, net = small(4), scrambled(small(4), 9)
    fresh = net.head.fc.weight.detach().clone()
    origin = load.load(net, save(source), True, "auto", classes_called(4))
    assert torch.equal(net.head.fc.weight, fresh)
    assert (
        "the file does not name its 4 classes; init_head=keep would load them by position" in origin["head"]
    )
    load.load(net, "w.safetensors", True, "keep", classes_called(4))
    assert same(net, source)


def test_a_head_for_the_same_classes_is_kept():
    """A file with 1000 rows is assumed to be ImageNet's; a timm folder names its classes."""
    source, net = small(1000), scrambled(small(1000), 9)
    synsets = (
        importlib.resources.files("timm.data._info").joinpath("imagenet_synsets.txt").read_text().split()
    )
    origin = load.load(net, save(source), True, "auto", synsets)
    assert same(net, source)
    assert origin["head"] == "kept, 1000 classes; assumed to be ImageNet's 1000 synsets, from their number"
    net = scrambled(small(1000), 9)
    load.load(net, "w.safetensors", True, "auto", synsets[::-1])
    assert not torch.equal(net.head.fc.weight, source.head.fc.weight)
    timm.models.save_for_hf(
        small(3), "folder", model_config={"label_names": ["cat", "cow", "dog"]}, safe_serialization=True
    )
    net = scrambled(small(3), 9)
    assert load.load(net, "folder", True, "auto", ["cat", "cow", "dog"])["head"] == "kept, 3 classes"
    assert same(net, small(3))


def test_a_head_that_fits_by_number_only_is_a_notice():
    """Officially it is kept by position. Here folders that are named otherwise give it new weights."""
    path = save(small(1000))
    synsets = imagenet.imagenet1k()
    numbers = [f"{number:04d}" for number in range(1000)]
    for classes, says in (
        (numbers, "0 of the 1000 names match"),
        ([*synsets[:300], *numbers[300:]], "300 of the 1000 names match"),
        (synsets[::-1], "1000 of the 1000 names match, in another order"),
    ):
        (notice,) = load.load(small(1000), path, True, "auto", classes)["notices"]
        assert says in notice
        assert "init_head=keep loads" in notice
        assert f"({', '.join(classes[:3])}, ...)" in notice
        assert ("init_head=mapped" in notice) == ("0 of" not in says[:4])
    for head, classes in (("auto", synsets), ("fresh", numbers), ("keep", numbers)):
        assert load.load(small(1000), path, True, head, classes)["notices"] == []
    assert load.load(small(10), path, True, "auto", numbers[:10])["notices"] == []
    (notice,) = load.load(small(4), save(small(4)), True, "auto", classes_called(4))["notices"]
    assert "does not name its 4 classes" in notice


@pytest.mark.parametrize("reverse", [False, True])
def test_a_22k_head_is_mapped_by_synset(reverse):
    """Not by position: if the data have another order of classes, each class still gets its own row.

    IN-22K has no n04399382.
    """
    source, net = small(21841), scrambled(small(1000), 9)
    rows = torch.arange(21841.0)
    with torch.no_grad():
        source.head.fc.weight.copy_(rows[:, None].expand(-1, source.head.fc.weight.shape[1]))
        source.head.fc.bias.copy_(-rows)
    fresh = net.head.fc.weight.detach().clone(), net.head.fc.bias.detach().clone()
    files = importlib.resources.files("timm.data._info")
    classes = files.joinpath("imagenet_synsets.txt").read_text().split()
    large = files.joinpath("imagenet22k_synsets.txt").read_text().split()
    classes = classes[::-1] if reverse else classes
    origin = load.load(net, save(source), True, "mapped", classes)
    for row, label in enumerate(classes):
        if label == "n04399382":
            assert torch.equal(net.head.fc.weight[row], fresh[0][row])
            assert torch.equal(net.head.fc.bias[row], fresh[1][row])
        else:
            assert (net.head.fc.weight[row] == large.index(label)).all()
            assert net.head.fc.bias[row] == -large.index(label)
    assert (
        origin["head"]
        == "mapped by name, 999 of 1000 classes from 21841; initial weights for n04399382; assumed to be"
        " ImageNet's 21841 synsets, from their number"
    )


def test_what_a_head_cannot_do_is_refused():
    path = save(small(6))
    assert "init_head=keep, but the head has 6 classes and the data 4" in stopped(
        small(4), path, True, "keep", classes_called(4)
    )
    assert "whose names are unknown" in stopped(small(4), path, True, "mapped", classes_called(4))
    path = save(small(1000))
    assert "none of which has the name" in stopped(small(4), path, True, "mapped", classes_called(4))
    path = save(small(4), **{"head.fc.weight": None, "head.fc.bias": None})
    assert "no head of the model's width" in stopped(small(4), path, True, "keep", classes_called(4))
    assert (
        load.load(small(4), path, True, "auto", classes_called(4))["head"]
        == "fresh, 4 classes; the file has no complete head"
    )
    path = save(small(4), **{"head.fc.bias": None})
    assert "1 missing" in stopped(small(4), path, True, "auto", classes_called(4))


def test_a_head_that_is_a_convolution():
    """BiT's head is a 1x1 convolution."""
    source, net = (
        timm.create_model("resnetv2_50x1_bit", num_classes=6),
        timm.create_model("resnetv2_50x1_bit", num_classes=4),
    )
    timm.models.save_for_hf(
        source, "folder", model_config={"label_names": list("abcdef")}, safe_serialization=True
    )
    load.load(net, "folder", True, "mapped", ["f", "a", "b", "z"])
    assert torch.equal(net.head.fc.weight[:3], source.head.fc.weight[[5, 0, 1]])


# ---- position tables ----


def test_vit_positions_are_resampled():
    """deit_tiny from 224 to 160 px: the class token's row stays, the 14 x 14 grid becomes 10 x 10 by
    antialiased bicubic interpolation.
    """
    source = timm.create_model("deit_tiny_patch16_224", num_classes=4)
    net = timm.create_model("deit_tiny_patch16_224", num_classes=4, img_size=160)
    with torch.no_grad():
        source.pos_embed.normal_()
    origin = load.load(net, save(source), True, "keep", classes_called(4))
    grid = source.pos_embed[:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(10, 10), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([source.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 100, 192)], 1)
    assert torch.allclose(net.pos_embed, expected, atol=1e-6)
    assert same(net, source, ("pos_embed",))
    assert origin["keys"]["resampled"] == ["pos_embed (1, 197, 192) to (1, 101, 192)"]
    assert origin["keys"]["converted"] == ["pos_embed"]
    assert load.table(origin)["resampled"] == "pos_embed (1, 197, 192) to (1, 101, 192)"


def test_swin_positions_are_resampled():
    """Windows of 7 to windows of 8: each table of 13 x 13 relative positions becomes 15 x 15, as timm loads
    it; a constant stays one.
    """
    source = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4)
    net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, img_size=256, window_size=8)
    tables = [name for name in source.state_dict() if name.endswith("relative_position_bias_table")]
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name in tables:
                parameter.normal_() if name != tables[0] else parameter.fill_(0.7)
    origin = load.load(net, save(source), True, "keep", classes_called(4))
    assert set(origin["keys"]["converted"]) == set(tables)
    timms = {"pretrained": True, "pretrained_cfg_overlay": {"file": "w.safetensors", "num_classes": 4}}
    reference = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=4, img_size=256, window_size=8, **timms
    )
    assert same(net, reference)
    assert torch.allclose(net.state_dict()[tables[0]], torch.tensor(0.7), atol=1e-6)
    assert net.state_dict()[tables[0]].shape == (225, 3)


def test_swins_published_layout():
    """Its files keep buffers that the model computes, and downsample at the end of a stage instead of the
    beginning.
    """
    source, net = (
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=4),
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=4),
    )
    published = {}
    for name, tensor in source.state_dict().items():
        for stage in (1, 2, 3):
            if name.startswith(f"layers.{stage}.downsample"):
                name = name.replace(f"layers.{stage}", f"layers.{stage - 1}")
                break
        published[name.replace("head.fc.", "head.")] = tensor
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    published["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": published}, "swin.pth")
    origin = load.load(net, "swin.pth", True, "keep", classes_called(4))
    assert same(net, source)
    assert len(origin["keys"]["recomputed"]) == 2
    assert set(origin["keys"]["converted"]) == {name for name in published if "downsample" in name}
