"""Tests UPerNet: its parts against torch's, its logits against transformers' and a slow implementation, its
operations against torch's list of those that are not deterministic, its counts against Table 4.
"""

import math

import numpy as np
import official
import official_upernet
import pytest
import torch
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from test_commands import run
from timm.models import ConvNeXt
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, interpolate
from torch.utils._python_dispatch import TorchDispatchMode

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Model, Optim
from reconverge.models import create, drop_path, segmentation, upernet
from reconverge.models.resample import Pool, Resize
from reconverge.training import optim
from reconverge.training.batch_norm import RunningStatistics
from reconverge.training.pixel_loss import pixel_loss
from reconverge.weights import load, names

CPU = torch.device("cpu")
DEPTHS, WIDTHS = (1, 1, 4, 1), (8, 16, 24, 32)


def small(classes=5, channels=16):
    """UPerNet on a ConvNeXt of four small stages."""
    body = ConvNeXt(depths=DEPTHS, dims=WIDTHS, ls_init_value=1.0, num_classes=3)
    return upernet.UPerNet(body, "small", classes, channels)


def model(name="convnext_atto", **settings):
    return Model(name=name, size="t", **{"drop_path": 0.0, **settings})


def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(net, images, labels, batch):
    """Loss and gradients of one forward and backward pass with masks."""
    masks = upernet.draw(net.classifier.in_channels, len(images), (0, 0, 0), CPU)
    drops = drop_path.draw(drop_path.rates(net), len(images), (0, 0, 0), CPU)
    loss = pixel_loss(drop_path.Masked(net.train())(images, drops, *masks), labels, batch)
    loss.backward()
    return loss


# ---- resampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 64), (7, 5), (6, 6), (1, 3), (13, 20)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_is_adaptive_average_pooling(height, width, bins):
    """Forward and gradient, also where bins overlap because they do not divide the side."""
    x = some(2, 3, height, width, dtype=torch.float64).requires_grad_()
    weight = some(2, 3, bins, bins, seed=1, dtype=torch.float64)
    ours, theirs = Pool(bins)(x), adaptive_avg_pool2d(x, bins)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert ours.shape == theirs.shape
    pair = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", [(1, 1), (2, 2), (6, 6), (5, 9), (16, 13)])
@pytest.mark.parametrize("to", [(16, 16), (11, 7), (64, 52), (5, 9)])
def test_resizing_is_bilinear_interpolation(side, to):
    x = some(2, 3, *side, dtype=torch.float64).requires_grad_()
    weight = some(2, 3, *to, seed=1, dtype=torch.float64)
    ours, theirs = Resize()(x, to), interpolate(x, to, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    pair = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def test_resampling_keeps_the_dtype_under_autocast():
    x = some(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert Resize()(x, (8, 8)).dtype == Pool(2)(x).dtype == torch.float32
        assert Resize()(x.bfloat16(), (8, 8)).dtype == torch.bfloat16
    torch.testing.assert_close(Resize()(x, (8, 8)), interpolate(x, (8, 8), mode="bilinear"))


# Operations of the two lists in torch's documentation of use_deterministic_algorithms that could occur in a
# segmenter, by their names below autograd. Of convolutions torch chooses deterministic ones. NLLLoss is
# refused for maps only, which is nll_loss2d.
NOT_DETERMINISTIC = {
    "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "adaptive_avg_pool3d",
    "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward",
    "max_pool3d_with_indices_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward",
    "max_unpool2d", "max_unpool3d",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward",
    "upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward",
    "replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "_embedding_bag_dense_backward",
    "embedding_dense_backward", "put_", "put", "histc", "bincount", "median", "grid_sampler_2d_backward",
    "grid_sampler_3d_backward", "cumsum", "index_put", "index_put_", "_index_put_impl_", "scatter_add",
    "scatter_add_", "gather", "index_add", "index_add_", "index_select", "repeat_interleave", "index_copy",
    "index_copy_", "scatter", "scatter_", "scatter_reduce", "scatter_reduce_", "index_reduce", "kthvalue",
}  # fmt: skip


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.met = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.met.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet50"])
def test_no_operation_is_on_torchs_list_of_those_that_are_not_deterministic(backbone):
    net = segmentation.build(model(backbone, layer_scale=None, drop_path=0.1), 5, 0, channels=16)
    with Operations() as operations:
        trained(net, some(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8), 2)
    assert {"convolution_backward", "bmm", "nll_loss_backward"} <= operations.met
    assert operations.met & NOT_DETERMINISTIC == set()


def test_smps_own_forward_pass_and_a_loss_of_maps_would_be_found():
    """So the list above has the names that operations really have."""
    decoder = UPerNetDecoder((3, 0, *WIDTHS), decoder_channels=5)
    maps = [some(2, width, side, side) for width, side in zip(WIDTHS, (16, 8, 4, 2), strict=True)]
    with Operations() as operations:
        logits = interpolate(decoder([None, None, *maps]), scale_factor=4.0, mode="bilinear")
        cross_entropy(logits, torch.zeros(2, 64, 64, dtype=torch.long)).backward()
    assert operations.met & NOT_DETERMINISTIC == {
        "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward",
        "nll_loss2d_forward", "nll_loss2d_backward",
    }  # fmt: skip


# ---- the same numbers as other code ------------------------------------------------------------------------


def from_transformers(state):
    """Names of transformers' UperNet on ConvNeXt -> those of the authors' files."""
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if name.startswith("backbone.embeddings"):
            name = f"backbone.downsample_layers.0.{['patch_embeddings', 'layernorm'].index(parts[2])}"
            name += f".{parts[3]}"
        elif "downsampling_layer" in name:
            name = f"backbone.downsample_layers.{parts[3]}.{parts[5]}.{parts[6]}"
        elif name.startswith("backbone.encoder"):
            name = ".".join(["backbone", "stages", parts[3], parts[5], *parts[6:]])
            name = name.replace("layer_scale_parameter", "gamma").replace("layernorm", "norm")
        elif "hidden_states_norms" in name:
            name = f"backbone.norm{int(parts[2].removeprefix('stage')) - 1}.{parts[3]}"
        found[name.replace("batch_norm", "bn").replace("classifier", "conv_seg")] = tensor
    return found


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.ConvNextConfig(depths=[*DEPTHS], hidden_sizes=[*WIDTHS], out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=5, hidden_size=16, auxiliary_in_channels=WIDTHS[2],
        auxiliary_channels=8, auxiliary_num_convs=1,
    )  # fmt: skip
    theirs = transformers.UperNetForSemanticSegmentation(config).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    weights = official_upernet.drawn({name: shape for name, shape in shapes.items() if shape})
    theirs.load_state_dict(weights | {name: torch.tensor(0) for name, shape in shapes.items() if not shape})
    layout, entries = names.converted(from_transformers(theirs.state_dict()))
    net = small().eval()
    net.load_state_dict({entry.name: entry.tensor for entry in entries})
    images = some(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(images).logits
        auxiliary = theirs.auxiliary_head(theirs.backbone(images).feature_maps)
        logits = Resize()(net(images), (64, 96))
        ours = net.auxiliary_classifier(net.auxiliary(net.features(images)[2]))
    assert layout == "mmsegmentation's UPerNet"
    assert expected.abs().mean() > 0.1  # not all zeros
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    torch.testing.assert_close(ours, auxiliary, rtol=0, atol=2e-5 * float(auxiliary.abs().max()))


@pytest.mark.parametrize("naming", ["authors", "mmseg 1"])
def test_published_files_load_and_give_the_published_logits(tmp_path, naming):
    """A file with random weights in the published layout: every tensor is used, and the logits are those of
    an implementation of the layout.
    """
    weights = official_upernet.drawn(official_upernet.shapes(DEPTHS, WIDTHS, 5, 16))
    stored = weights if naming == "authors" else official_upernet.in_mmseg_1(weights)
    torch.save({"meta": {"PALETTE": [[1, 2, 3]]}, "state_dict": stored}, tmp_path / "upernet.pth")
    net = small().eval()
    found = load.load(net, str(tmp_path / "upernet.pth"), True, "keep", list("abcde"))
    assert (len(found["keys"]["converted"]), len(found["keys"]["of the head"])) == (len(weights) - 4, 4)
    assert {kind: found["keys"][kind] for kind in ("missing", "unexpected")} == {
        "missing": [],
        "unexpected": [],
    }
    images = some(2, 3, 64, 96)
    expected = official_upernet.upernet(images, weights, DEPTHS)
    with torch.no_grad():
        ours = net(images), net.auxiliary_classifier(net.auxiliary(net.features(images)[2]))
    for mine, theirs in zip(ours, expected, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_the_norms_and_drop_paths_of_larger_models_load_too(tmp_path):
    """All names of T and of a deeper model, on the meta device."""
    for size, backbone in (("t", "convnext_t"), ("b", "convnext_b")):
        shapes = official_upernet.shapes(official.DEPTHS[size], official.WIDTHS[size], 150, 512)
        net = segmentation.on_meta(model(backbone, layer_scale=1.0), 150)
        given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        _, entries = names.converted(given)
        own = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        own = {name: shape for name, shape in own.items() if not name.endswith("num_batches_tracked")}
        assert {entry.name: tuple(entry.tensor.shape) for entry in entries} == own


def test_a_classifier_loads_as_the_backbone(tmp_path):
    """In the layouts of init=. Its own head and norm have no use; the heads of the segmenter keep their
    initial weights.
    """
    shapes = official.shapes(DEPTHS, WIDTHS, 1000)
    weights = official.drawn(shapes)
    torch.save({"model": weights}, tmp_path / "convnext.pth")
    net = small()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = load.load(net, str(tmp_path / "convnext.pth"), True, "auto", list("abcde"))
    keys = found["keys"]
    assert keys["without use"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert len(keys["converted"]) == len(shapes) - 4
    assert keys["missing"] == keys["unexpected"] == []
    assert set(keys["initial"]) == {name for name in before if not name.startswith("body.")}
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in keys["initial"])
    assert torch.equal(net.body.stages[2].blocks[3].mlp.fc2.weight, weights["stages.2.3.pwconv2.weight"])
    other = ConvNeXt(depths=DEPTHS, dims=WIDTHS, ls_init_value=1.0, num_classes=3)
    torch.save(other.state_dict(), tmp_path / "timm.pth")
    load.load(net, str(tmp_path / "timm.pth"), True, "auto", list("abcde"))
    assert torch.equal(net.body.stages[1].downsample[1].weight, other.stages[1].downsample[1].weight)
    shallower = ConvNeXt(depths=(1, 1, 2, 1), dims=WIDTHS, ls_init_value=1.0, num_classes=3)
    torch.save(shallower.state_dict(), tmp_path / "shallower.pth")
    with pytest.raises(Stop, match=r"18 missing(.|\n)*body.stages.2.blocks.2.gamma"):
        load.load(net, str(tmp_path / "shallower.pth"), True, "auto", list("abcde"))


def test_a_segmenters_own_weights_load_with_its_heads_by_class(tmp_path):
    parent, net = small(), small(classes=3)
    torch.save(parent.state_dict(), tmp_path / "parent.pth")
    found = load.load(net, str(tmp_path / "parent.pth"), True, "fresh", list("abc"))
    assert (found["layout"], len(found["keys"]["of the head"])) == (None, 4)
    assert torch.equal(net.decoder.fusion_block[0].weight, parent.decoder.fusion_block[0].weight)
    with pytest.raises(Stop, match="5"):
        load.load(net, str(tmp_path / "parent.pth"), True, "keep", list("abc"))


# ---- the pyramid -------------------------------------------------------------------------------------------

FAMILIES = {
    "convnext_atto": ({"layer_scale": 1e-6}, (40, 80, 160, 320)),
    "swin_t": ({"layer_scale": None, "image_size": 64}, (96, 192, 384, 768)),
    "resnet50": ({"layer_scale": None}, (256, 512, 1024, 2048)),
    "regnety_002": ({"layer_scale": None, "timm": "regnety_002"}, (24, 56, 152, 368)),
    "tf_efficientnetv2_b0": ({"layer_scale": None, "timm": "tf_efficientnetv2_b0"}, (32, 48, 112, 192)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_model_with_four_stages_becomes_a_pyramid(name):
    settings, widths = FAMILIES[name]
    net = segmentation.build(model(name, **settings), 5, seed=3, channels=16)
    classifier = create.model(model(name, **settings), 1, seed=3)
    maps = net.eval().features(some(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (width, side, side) for width, side in zip(widths, (16, 8, 4, 2), strict=True)
    ]
    for x in maps:  # behind fresh norms: mean 0 over channels at each position
        assert x.mean(1).abs().max() < 1e-5
    # The names and values of the classifier's weights, without its last norm and head.
    own = classifier.state_dict()
    body = net.body.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in body.items())
    assert {f"body.{key}" for key in own.keys() - body.keys()} == net.dropped
    trained(net, some(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8), 2)
    assert [key for key, parameter in net.named_parameters() if parameter.grad is None] == []


def test_the_norms_are_over_channels_with_the_published_epsilon():
    net = small().eval()
    with torch.no_grad():
        for level in range(4):
            norm = net.get_submodule(f"norm{level}")
            norm.weight.copy_(some(WIDTHS[level], seed=level))
            norm.bias.copy_(some(WIDTHS[level], seed=9 + level))
        maps = net.features(some(1, 3, 64, 64) * 1e-3)
        raw = net.body.forward_intermediates(some(1, 3, 64, 64) * 1e-3, intermediates_only=True)
    for level, (x, y) in enumerate(zip(raw, maps, strict=True)):
        norm = net.get_submodule(f"norm{level}")
        mean, spread = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        expected = (x - mean) / (spread + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "convnext_iso_s", "layer_scale": None}, r"convnext_iso_s as the backbone(.|\n)*no stages"),
        ({"name": "vit_s", "layer_scale": None, "image_size": 64}, r"vit_s (.|\n)*strides 16, 16, 16, 16"),
        ({"name": "roadmap_00_resnet50", "layer_scale": None}, r"roadmap_00_resnet50(.|\n)*model=convnext_t"),
    ],
)
def test_models_without_four_stages_are_refused_by_name(settings, said):
    with pytest.raises(Stop, match=said) as refusal:
        segmentation.build(model(**settings), 5, 0)
    assert refusal.value.code == Exit.USAGE


def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for enable in (False, True):
        net = segmentation.build(model("convnext_atto", drop_path=0.5), 5, 0, channels=16)
        net.set_grad_checkpointing(enable)
        trained(net, some(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.uint8), 2)
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- dropout, initial weights, BatchNorm -------------------------------------------------------------------


def test_dropout_masks_are_a_function_of_the_key():
    torch.manual_seed(1)
    decoder, auxiliary = upernet.draw(512, 400, (0, 7, 3), CPU)
    torch.manual_seed(2)
    again = upernet.draw(512, 400, (0, 7, 3), CPU)
    assert torch.equal(decoder, again[0])
    assert torch.equal(auxiliary, again[1])
    assert (decoder.shape, auxiliary.shape) == ((400, 512), (400, 256))
    for mask in (decoder, auxiliary):
        assert set(mask.unique().tolist()) == {0.0, np.float32(1 / 0.9)}
        sigma = math.sqrt(0.1 * 0.9 / mask.numel())
        assert abs(float((mask == 0).float().mean()) - 0.1) < 4 * sigma
    for key in ((1, 7, 3), (0, 8, 3), (0, 7, 4)):
        assert not torch.equal(decoder, upernet.draw(512, 400, key, CPU)[0])
    assert not torch.equal(decoder[:, :256], auxiliary)


def test_dropout_removes_whole_channels_before_the_classifiers():
    """Compared with the evaluation pass, whose BatchNorm is made to give the same numbers."""
    net = small().train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = some(2, 3, 64, 64)
    masks = upernet.draw(16, 2, (5, 0, 0), CPU)
    assert (masks[0] == 0).any()
    with torch.no_grad():
        logits, auxiliary = net(images, *masks)
        maps = net.features(images)
        decoded, seen = net.decoder(maps), net.auxiliary(maps[2])
        for image in range(2):
            for x, mask, head, out in (
                (decoded, masks[0], net.classifier, logits),
                (seen, masks[1], net.auxiliary_classifier, auxiliary),
            ):  # fmt: skip
                kept = x[image].clone()
                for channel in range(len(kept)):
                    kept[channel] = kept[channel] / 0.9 if mask[image, channel] else 0.0
                torch.testing.assert_close(head(kept[None])[0], out[image], rtol=1e-5, atol=1e-6)
        net.eval()
        torch.testing.assert_close(net(images), net.classifier(decoded))  # none in evaluation


def test_initial_weights():
    torch.manual_seed(1)
    net = segmentation.build(model("convnext_t", layer_scale=1.0), 150, seed=3, channels=64)
    torch.manual_seed(2)
    again = segmentation.build(model("convnext_t", layer_scale=1.0), 150, seed=3, channels=64)
    other = segmentation.build(model("convnext_t", layer_scale=1.0), 150, seed=4, channels=64)
    state = net.state_dict()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    drawn = set()
    for name, parameter in net.requires_grad_(False).named_parameters():
        if name.startswith("body."):
            continue
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        # mmsegmentation: classifiers normal 0.01; other convolutions sqrt(2 / (outputs x kernel))
        outputs = parameter.shape[0] * parameter[0, 0].numel()
        std = 0.01 if "classifier" in name else math.sqrt(2 / outputs)
        assert abs(float(parameter.std()) / std - 1) < 5 / math.sqrt(2 * parameter.numel()), name
        assert abs(float(parameter.mean())) < 5 * std / math.sqrt(parameter.numel()), name
        assert not torch.equal(parameter, other.get_parameter(name))
        drawn.add(name)
    assert len(drawn) == 4 + 1 + 3 + 3 + 1 + 1 + 2


def test_running_statistics_follow_microbatch_0():
    """Of two microbatches, BatchNorm's statistics keep the first; a skipped step keeps none."""
    net = segmentation.build(model(drop_path=0.1), 5, 0, channels=16)
    statistics = RunningStatistics(net.train())
    norm = net.decoder.fusion_block[1]
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    for microbatch in range(2):
        trained(net, some(2, 3, 64, 64, seed=microbatch), labels, 4)
        if microbatch == 0:
            statistics.note()
    statistics.settle(torch.tensor(0.0))
    first = seen[0].transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * first.mean(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * first.var(1), rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == 1
    kept = [buffer.clone() for buffer in net.buffers()]
    trained(net, some(2, 3, 64, 64, seed=2), labels, 4)
    statistics.note()
    statistics.settle(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(kept, net.buffers(), strict=True))


# ---- loss --------------------------------------------------------------------------------------------------


def slow_loss(outputs, labels, batch):
    """Pixel by pixel, in Python."""
    total = 0.0
    for weight, logits in zip((1.0, 0.4), outputs, strict=True):
        large = interpolate(logits.double(), labels.shape[1:], mode="bilinear", align_corners=False)
        for image, row, column in np.ndindex(*labels.shape):
            truth = int(labels[image, row, column])
            if truth != 255:
                scores = large[image, :, row, column].tolist()
                total += weight * (math.log(sum(math.exp(score) for score in scores)) - scores[truth])
    return total / (batch * labels.shape[1] * labels.shape[2])


def test_the_loss_is_that_of_a_slow_loop():
    outputs = some(3, 5, 4, 6), some(3, 5, 2, 3, seed=1)
    labels = torch.randint(0, 5, (3, 16, 24), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    labels[:, 3:9, :7] = 255
    labels[1] = 255  # a whole image without labels
    assert float(pixel_loss(outputs, labels, 3)) == pytest.approx(slow_loss(outputs, labels, 3), rel=1e-6)
    # The shares of the microbatches of a step add up to the loss of the whole.
    shares = [pixel_loss(tuple(x[at : at + 1] for x in outputs), labels[at : at + 1], 3) for at in range(3)]
    assert float(sum(shares)) == pytest.approx(slow_loss(outputs, labels, 3), rel=1e-6)
    assert float(shares[1]) == 0


def test_ignored_pixels_have_no_gradient():
    outputs = tuple(x.requires_grad_() for x in (some(1, 5, 8, 8), some(1, 5, 2, 2)))
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[:, :, 16:] = 255
    pixel_loss(outputs, labels, 1).backward()
    assert (outputs[0].grad[..., 5:] == 0).all()
    assert (outputs[0].grad[..., :4] != 0).all()


# ---- layer groups ------------------------------------------------------------------------------------------


def published_scale(name, depth, rule, decay):
    """The learning rate of a parameter of the authors' segmentation code, relative to that of the heads. A
    table of the published groups, written out: name in the authors' layout -> number of layers below the top.
    """
    layers = {9: 6, 27: 12}[depth]  # num_layers of the published configurations
    part = name.split(".")
    if part[0] != "backbone" or part[1].startswith("norm"):
        return 1.0  # heads and the four norms
    stage = int(part[2])
    if rule == "stage_wise":
        below = {"downsample_layers": layers + 1, "stages": layers - stage}[part[1]]
    elif part[1] == "downsample_layers":
        below = layers + 1 - [0, 2, 3, layers][stage]
    else:
        below = layers + 1 - [1, 2, 3 + int(part[3]) // 3, layers][stage]
    return decay**below


@pytest.mark.parametrize("rule", ["stage_wise", "stages", "auto"])
@pytest.mark.parametrize(("backbone", "size"), [("convnext_t", "t"), ("convnext_b", "b")])
def test_layers_and_their_rates_are_the_published_groups(backbone, size, rule):
    net = segmentation.on_meta(model(backbone, layer_scale=1.0), 150)
    shapes = official_upernet.shapes(official.DEPTHS[size], official.WIDTHS[size], 150, 512)
    given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    theirs = {entry.name: entry.given for entry in names.converted(given)[1]}
    depth = official.DEPTHS[size][2]
    groups = optim.parameter_groups(net, Optim(layer_decay=0.9, layer_groups=rule, weight_decay=0.05))
    met = set()
    for group in groups:
        for name in group["names"]:
            met.add(name)
            scale = published_scale(theirs[name], depth, "stage_wise" if rule == "stage_wise" else "", 0.9)
            assert group["lr_scale"] == pytest.approx(scale, rel=1e-12), name
            one = len(shapes[theirs[name]]) == 1 or theirs[name].endswith(".bias")
            assert group["weight_decay"] == (0.0 if one else 0.05), name
    assert met == {name for name, _ in net.named_parameters()}


def test_the_published_rates_by_hand():
    """stage_wise with 0.9: powers for the heads, stages 3 to 0, and the stem with the downsampling layers."""
    for backbone, powers in (("convnext_t", [0, 3, 4, 5, 6, 7]), ("convnext_l", [0, 9, 10, 11, 12, 13])):
        net = segmentation.on_meta(model(backbone, layer_scale=1.0), 150)
        groups = optim.parameter_groups(net, Optim(layer_decay=0.9, layer_groups="stage_wise"))
        found = {name: group["lr_scale"] for group in groups for name in group["names"]}
        some_of_each = (
            ["decoder.fusion_block.0.weight", "norm0.weight", "auxiliary_classifier.bias"],
            ["body.stages.3.blocks.2.gamma"], ["body.stages.2.blocks.8.conv_dw.bias"],
            ["body.stages.1.blocks.0.mlp.fc1.weight"], ["body.stages.0.blocks.1.norm.weight"],
            ["body.stem.0.weight", "body.stages.1.downsample.0.weight", "body.stages.3.downsample.1.weight"],
        )  # fmt: skip
        for power, members in zip(powers, some_of_each, strict=True):
            for name in members:
                assert found[name] == pytest.approx(0.9**power), name
        assert len(set(found.values())) == 6


@pytest.mark.parametrize("backbone", ["swin_t", "resnet50"])
def test_other_backbones_have_a_layer_for_each_block_below_the_heads(backbone):
    settings, _ = FAMILIES[backbone]
    net = segmentation.on_meta(model(backbone, **settings), 5)
    optimizer_groups = optim.parameter_groups(net, Optim(layer_decay=0.5))
    scales = {name: group["lr_scale"] for group in optimizer_groups for name in group["names"]}
    assert {scales[name] for name in scales if not name.startswith("body.")} == {1.0}
    assert len(scales) == len(list(net.parameters()))
    assert max(scales[name] for name in scales if name.startswith("body.")) == 0.5
    with pytest.raises(Stop, match=r"layer_groups=stage_wise(.|\n)*layer_groups=blocks"):
        optim.parameter_groups(net, Optim(layer_decay=0.5, layer_groups="stage_wise"))


# ---- Table 4 -----------------------------------------------------------------------------------------------

# Table 4 (arXiv 2201.03545): backbone, pre-training, crop, mIoU multi-scale, parameters in millions, GFLOPs;
# mIoU single-scale is from Table 7.
TABLE_4 = """
convnext_t  in1k  512 46.7 60  939  46.0
convnext_s  in1k  512 49.6 82  1027 48.7
convnext_b  in1k  512 49.9 122 1170 49.1
convnext_b  in22k 640 53.1 122 1828 52.6
convnext_l  in22k 640 53.7 235 2458 53.2
convnext_xl in22k 640 54.0 391 3335 53.6
"""


def test_parameters_and_multiply_adds_are_those_of_table_4():
    """To within one unit of the last printed digit."""
    rows = [line.split() for line in TABLE_4.strip().splitlines()]
    assert len(rows) == len(segmentation.published())
    for row, paper in zip(rows, segmentation.published(), strict=True):
        backbone, pretrained, crop, *numbers = row
        assert (paper.backbone, paper.pretrained, paper.crop) == (backbone, pretrained, int(crop))
        multi, parameters, macs, single = map(float, numbers)
        assert paper[3:7] == (parameters, macs, multi, single)
        counted = segmentation.count(model(backbone, layer_scale=1.0), int(crop))
        assert round(counted[0]) == parameters
        assert abs(counted[1] - macs) < 1


def test_the_command_prints_table_4_beside_the_counts(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "models", "--task", "segment", "convnext_b", "convnext_t")
    assert code == 0
    assert [line.split() for line in said.out.splitlines()[-3:]] == [
        ["convnext_t", "in1k", "512", "60.24", "60", "938.5", "939", "46.7", "46.0", "46.62", "46.11"],
        ["convnext_b", "in1k", "512", "122.10", "122", "1169.3", "1170", "49.9", "49.1", "49.54", "48.71"],
        ["convnext_b", "in22k", "640", "122.10", "122", "1827.1", "1828", "53.1", "52.6", "52.66", "52.13"],
    ]
    code, said = run(monkeypatch, capsys, "models", "--task", "segment", "resnet50")
    assert code == Exit.USAGE
    assert "convnext_xl" in said.err
