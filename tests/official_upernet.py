"""UPerNet on ConvNeXt as functions of a dict with the names of the authors' segmentation files: a reference
for tests, written from the description of the published layout, with torch's own pooling and resizing.
"""

import official
import torch
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, interpolate, relu

BINS = (1, 2, 3, 6)


def convolution(name, inputs, outputs, side):
    return {f"{name}.conv.weight": (outputs, inputs, side, side)} | {
        f"{name}.bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")
    }


def shapes(depths, widths, classes, channels):
    """Name -> shape; without num_batches_tracked, which `drawn` adds."""
    backbone = official.shapes(depths, widths, classes)
    kept = {name: shape for name, shape in backbone.items() if not name.startswith(("norm.", "head."))}
    found = {f"backbone.{name}": shape for name, shape in kept.items()}
    for level, width in enumerate(widths):
        found |= {f"backbone.norm{level}.{part}": (width,) for part in ("weight", "bias")}
    for number in range(len(BINS)):
        found |= convolution(f"decode_head.psp_modules.{number}.1", widths[3], channels, 1)
    found |= convolution("decode_head.bottleneck", widths[3] + len(BINS) * channels, channels, 3)
    for level in range(3):
        found |= convolution(f"decode_head.lateral_convs.{level}", widths[level], channels, 1)
        found |= convolution(f"decode_head.fpn_convs.{level}", channels, channels, 3)
    found |= convolution("decode_head.fpn_bottleneck", 4 * channels, channels, 3)
    found |= convolution("auxiliary_head.convs.0", widths[2], channels // 2, 3)
    for head, width in (("decode_head", channels), ("auxiliary_head", channels // 2)):
        found |= {f"{head}.conv_seg.weight": (classes, width, 1, 1), f"{head}.conv_seg.bias": (classes,)}
    return found


def drawn(shapes, seed=0):
    weights = official.drawn(shapes, seed)
    for name in [name for name in weights if name.endswith("running_var")]:
        weights[name] = weights[name].abs() + 0.5
        weights[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return weights


def in_mmseg_1(weights):
    """mmsegmentation 1 gives the layers of a block longer names."""
    longer = {
        ".dwconv.": ".depthwise_conv.",
        ".pwconv1.": ".pointwise_conv1.",
        ".pwconv2.": ".pointwise_conv2.",
    }
    renamed = {}
    for name, tensor in weights.items():
        for short, long in longer.items():
            name = name.replace(short, long)
        renamed[name] = tensor
    return renamed


def unit(x, w, name):
    """Convolution, BatchNorm in evaluation, ReLU."""
    kernel = w[f"{name}.conv.weight"]
    x = conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    mean, variance = w[f"{name}.bn.running_mean"], w[f"{name}.bn.running_var"]
    return relu(batch_norm(x, mean, variance, w[f"{name}.bn.weight"], w[f"{name}.bn.bias"], eps=1e-5))


def resized(x, like):
    return interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def upernet(images, w, depths):
    """(N, 3, H, W) -> logits (N, classes, H / 4, W / 4), and those of the auxiliary head."""
    backbone = {
        name.removeprefix("backbone."): tensor for name, tensor in w.items() if name.startswith("backbone.")
    }
    x, maps = images, []
    for stage in range(4):
        name = f"downsample_layers.{stage}"
        if stage == 0:
            x = official.norm(official.conv(x, backbone, f"{name}.0", stride=4), backbone, f"{name}.1")
        else:
            x = official.conv(official.norm(x, backbone, f"{name}.0"), backbone, f"{name}.1", stride=2)
        for number in range(depths[stage]):
            x = official.block(x, backbone, f"stages.{stage}.{number}")
        maps.append(official.norm(x, backbone, f"norm{stage}"))
    top = maps[3]
    pools = [
        resized(unit(adaptive_avg_pool2d(top, bins), w, f"decode_head.psp_modules.{number}.1"), top)
        for number, bins in enumerate(BINS)
    ]
    laterals = [unit(maps[level], w, f"decode_head.lateral_convs.{level}") for level in range(3)]
    laterals.append(unit(torch.cat([top, *pools], 1), w, "decode_head.bottleneck"))
    for level in (2, 1, 0):
        laterals[level] = laterals[level] + resized(laterals[level + 1], laterals[level])
    outs = [unit(laterals[level], w, f"decode_head.fpn_convs.{level}") for level in range(3)] + laterals[3:]
    decoded = unit(torch.cat([resized(x, outs[0]) for x in outs], 1), w, "decode_head.fpn_bottleneck")
    seen = unit(maps[2], w, "auxiliary_head.convs.0")
    return tuple(
        conv2d(x, w[f"{head}.conv_seg.weight"], w[f"{head}.conv_seg.bias"])
        for x, head in ((decoded, "decode_head"), (seen, "auxiliary_head"))
    )
