"""ConvNeXt as functions of a dict with the official names, written from the description of the published
layout: a reference for tests.

The names and shapes are those of the published files; the operations are sections 2.2-2.6 of the paper: stem
4x4 and its norm; blocks of depthwise 7x7, norm, 1x1 to four widths, GELU, 1x1, layer scale, sum; norm and 2x2
between the stages; mean, norm, head.
"""

import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear

DEPTHS = {"t": (3, 3, 9, 3), "s": (3, 3, 27, 3), "b": (3, 3, 27, 3), "l": (3, 3, 27, 3), "xl": (3, 3, 27, 3)}
WIDTHS = {
    "t": (96, 192, 384, 768),
    "s": (96, 192, 384, 768),
    "b": (128, 256, 512, 1024),
    "l": (192, 384, 768, 1536),
    "xl": (256, 512, 1024, 2048),
}
ISOTROPIC = {"iso_s": (18, 384), "iso_b": (18, 768), "iso_l": (36, 1024)}  # depth, width


def block_shapes(prefix, width, layer_scale=True):
    shapes = {
        "dwconv.weight": (width, 1, 7, 7), "dwconv.bias": (width,), "norm.weight": (width,),
        "norm.bias": (width,),
        "pwconv1.weight": (4 * width, width), "pwconv1.bias": (4 * width,),
        "pwconv2.weight": (width, 4 * width), "pwconv2.bias": (width,),
    }  # fmt: skip
    return {
        f"{prefix}.{name}": shape
        for name, shape in (shapes | ({"gamma": (width,)} if layer_scale else {})).items()
    }


def shapes(depths, widths, classes):
    found = {"downsample_layers.0.0.weight": (widths[0], 3, 4, 4)}
    for name in ("0.0.bias", "0.1.weight", "0.1.bias"):
        found[f"downsample_layers.{name}"] = (widths[0],)
    for stage in (1, 2, 3):
        found |= {f"downsample_layers.{stage}.0.{part}": (widths[stage - 1],) for part in ("weight", "bias")}
        found[f"downsample_layers.{stage}.1.weight"] = (widths[stage], widths[stage - 1], 2, 2)
        found[f"downsample_layers.{stage}.1.bias"] = (widths[stage],)
    for stage in range(4):
        for block in range(depths[stage]):
            found |= block_shapes(f"stages.{stage}.{block}", widths[stage])
    return found | ends(widths[3], classes)


def isotropic_shapes(depth, width, classes, layer_scale):
    found = {"stem.weight": (width, 3, 16, 16), "stem.bias": (width,)}
    for block in range(depth):
        found |= block_shapes(f"blocks.{block}", width, layer_scale)
    return found | ends(width, classes)


def ends(width, classes):
    return {
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }


def drawn(shapes, seed=0):
    """Weights that keep activations near 1, with none that has no effect: std 1 / sqrt(inputs), norms near 1,
    gamma 0.1 to 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        uniform = torch.empty(shape).uniform_(-1, 1, generator=generator)
        if name.endswith("gamma"):
            weights[name] = 0.2 + 0.1 * uniform
        elif len(shape) == 1:
            weights[name] = 0.2 * uniform + (1.0 if name.endswith("weight") else 0.0)
        else:
            weights[name] = uniform * (3 / torch.Size(shape[1:]).numel()) ** 0.5
    return weights


def norm(x, w, prefix, last=False):
    """Layer norm over the channels of (N, C, H, W), or of (N, C)."""
    if last:
        return layer_norm(x, x.shape[-1:], w[f"{prefix}.weight"], w[f"{prefix}.bias"], 1e-6)
    return norm(x.permute(0, 2, 3, 1), w, prefix, last=True).permute(0, 3, 1, 2)


def conv(x, w, prefix, **settings):
    return conv2d(x, w[f"{prefix}.weight"], w[f"{prefix}.bias"], **settings)


def block(x, w, prefix):
    branch = norm(conv(x, w, f"{prefix}.dwconv", padding=3, groups=x.shape[1]), w, f"{prefix}.norm").permute(
        0, 2, 3, 1
    )
    branch = gelu(linear(branch, w[f"{prefix}.pwconv1.weight"], w[f"{prefix}.pwconv1.bias"]))
    branch = linear(branch, w[f"{prefix}.pwconv2.weight"], w[f"{prefix}.pwconv2.bias"])
    return x + (branch * w.get(f"{prefix}.gamma", 1.0)).permute(0, 3, 1, 2)


def head(x, w):
    return linear(norm(x.mean((2, 3)), w, "norm", last=True), w["head.weight"], w["head.bias"])


@torch.no_grad()
def convnext(images, w, depths):
    """(N, 3, H, W) -> logits (N, classes)"""
    x = norm(conv(images, w, "downsample_layers.0.0", stride=4), w, "downsample_layers.0.1")
    for stage in range(4):
        if stage:
            x = conv(norm(x, w, f"downsample_layers.{stage}.0"), w, f"downsample_layers.{stage}.1", stride=2)
        for number in range(depths[stage]):
            x = block(x, w, f"stages.{stage}.{number}")
    return head(x, w)


@torch.no_grad()
def isotropic(images, w, depth):
    x = conv(images, w, "stem", stride=16)
    for number in range(depth):
        x = block(x, w, f"blocks.{number}")
    return head(x, w)
