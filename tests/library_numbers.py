"""What recipes take from the installed timm, torchvision, torch, Pillow, numpy and Python, as text.

test_libraries.py compares each function of TEXTS with tests/golden/library_NAME.txt. As a script it prints
them: `python tests/library_numbers.py NAME ...`.
"""

import dataclasses
import io
import re
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from reconverge.base import chance
from reconverge.base.errors import Stop
from reconverge.config.settings import Augment, Mix, Model, Optim
from reconverge.data import transforms
from reconverge.data.mix import Mixup, Noise, erase
from reconverge.models import create, drop_path
from reconverge.training import optim

ROOT = Path(__file__).parents[1]
MEAN = [0.485, 0.456, 0.406]
# One of each kind that recipes train.
NETS = ["convnext_t", "convnext_b", "convnext_iso_s", "roadmap_00_resnet50", "roadmap_15_downsampling",
    "resnet50", "deit_s", "vit_b", "swin_t", "swin_b_384", "regnety_16g", "effnet_b7", "effnetv2_l",
    "r101x3"]  # fmt: skip


def photograph(side=96):
    """An image with many colours and smooth parts."""
    random = np.random.Generator(np.random.PCG64(1))
    coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((side, side + 20), Image.Resampling.BICUBIC)


def fingerprint(image):
    return sha256(np.asarray(image).tobytes()).hexdigest()[:16]


def mixing():
    """Shares and boxes of mixing, and the boxes of erasing, of the first microbatches of a run."""
    lines = []
    for name, mix in (("in1k", Mix()), ("CutMix only", Mix(mixup=0)), ("rarely", Mix(probability=0.3))):
        for step in range(8):
            with chance.scope(0, "mix", step, 0):
                share, box = Mixup(mix, 1000).draw(224, 224)
            where = "" if box is None else " " + " ".join(f"{cut.start}-{cut.stop}" for cut in box)
            lines.append(f"{name} step {step}: {share!r}{where}")
    for step in range(4):
        images = torch.zeros(16, 3, 64, 64)
        with chance.scope(0, "erase", step, 0):
            erase(images, Noise.drawn(0.25, *images.shape))
        for number in images.flatten(1).any(1).nonzero().flatten().tolist():
            rows, columns = (images[number, 0] != 0).nonzero().T
            box = f"{rows.min()}-{rows.max() + 1} {columns.min()}-{columns.max() + 1}"
            lines.append(f"erase step {step} image {number}: {box} {images[number].std():.4f}")
    return lines


def augmentation():
    """What each policy draws for some images, and the pixels that come out."""
    lines = []
    for name, augment in (
        ("in1k", Augment()),
        ("demo", Augment(auto="rand-m3-mstd0.5-inc1", flip=0.0, scale=[0.8, 1.0], size=32)),
        ("not increasing", Augment(auto="rand-m9-mstd0.5")),
        ("inc0", Augment(auto="rand-m9-mstd0.5-inc0")),
        ("random", Augment(auto="none", interpolation="random")),
    ):
        made = transforms.training(augment, MEAN)
        buffer = io.BytesIO()
        photograph(256).save(buffer, "PNG")
        for image in range(10):
            with chance.scope(0, "augment", 0, image, 0):
                lines.append(f"{name} image {image}: {fingerprint(made(buffer.getvalue()))}")
    return lines


def randaugment():
    """The operations of the published policy, their arguments at some magnitudes, and pixels of each."""
    from timm.data.auto_augment import rand_augment_transform

    parameters = {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    policy = rand_augment_transform("rand-m9-mstd0.5-inc1", dict(parameters))
    lines = [f"layers {policy.num_layers}, weights {policy.choice_weights}"]
    for operation in policy.ops:
        lines.append(f"{operation.name}: probability {operation.prob}, m{operation.magnitude},"
            f" mstd {operation.magnitude_std}, {sorted(operation.kwargs)}")  # fmt: skip
        for level in (0, 4.4, 9, 10):
            with chance.scope(0, operation.name):
                arguments = operation.level_fn(level, operation.hparams) if operation.level_fn else ()
            image = operation.aug_fn(photograph(), *arguments, **operation.kwargs)
            said = " ".join(f"{argument:.12g}" for argument in arguments)
            lines.append(f"  {level}: {said} -> {fingerprint(image)}")
    return lines


def settings_of(name):
    for path in sorted((ROOT / "conf" / "model").rglob("*.yaml")):
        given = yaml.safe_load(path.read_text())
        if given["name"] == name:
            fields = {field.name for field in dataclasses.fields(Model)}
            given = {key: value for key, value in given.items() if key in fields}
            if "image_size" in given:
                given["image_size"] = 384 if name.endswith("384") else 224
            if isinstance(given.get("layer_scale"), str):
                given["layer_scale"] = float(given["layer_scale"])
            return Model(**(given | {"drop_path": 0.1}))
    raise KeyError(name)


def models():
    """Layers with the arguments that their constructors chose, and the drop rates."""
    lines = []
    for name in NETS:
        net = create.on_meta(settings_of(name), 1000)
        kinds = Counter()
        for module in net.modules():
            own = next(module.parameters(recurse=False), None) is not None
            if (own or next(module.children(), None) is None) and not isinstance(module, nn.Identity):
                widths = r"^\d+, \d+, |^\(?\d+,?\)?, |(in|out|normalized)_\w+=\S+ ?"
                text = re.sub(r"groups=\d+", "groups=N", re.sub(widths, "", module.extra_repr()))
                if not isinstance(module, drop_path.StochasticDepth):
                    kinds[f"{type(module).__name__}({text})"] += 1
        lines.append(name)
        lines += [f"  {count} x {kind}" for kind, count in sorted(kinds.items())]
        lines.append("  rates " + " ".join(f"{rate:.5f}" for rate in drop_path.rates(net)))
        shapes = [(key, tuple(value.shape)) for key, value in net.state_dict().items()]
        lines.append(f"  names and shapes {sha256(repr(shapes).encode()).hexdigest()[:16]}")
    return lines


def initial_weights():
    """For each kind of parameter: mean, standard deviation, largest value and first value, at seed 0."""
    lines = []
    for name in ("convnext_atto", "convnext_iso_s", "roadmap_00_resnet50", "resnet50", "deit_s", "swin_t"):
        net = create.model(settings_of(name), 10, seed=0)
        kinds = {}
        for key, value in net.named_parameters():
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
            kinds.setdefault(kind, []).append(value.detach())
        lines.append(name)
        for kind, values in kinds.items():
            flat = torch.cat([value.flatten() for value in values]).double()
            numbers = flat.mean(), flat.std(correction=0), flat.abs().max(), flat[0]
            lines.append(f"  {kind}: " + " ".join(f"{float(number):.3g}" for number in numbers))
    return lines


def layer_groups():
    """Of each model: the parameters of each layer, and those of two dimensions without weight decay."""
    lines = []
    for name in NETS:
        net = create.on_meta(settings_of(name), 1000)
        shapes = {key: value.ndim for key, value in net.named_parameters()}
        try:
            groups = optim.parameter_groups(net, Optim(layer_decay=0.8))
        except Stop:
            lines.append(f"{name}: refused")
            continue
        named = {layer: [] for layer in sorted({group["layer"] for group in groups})}
        for group in groups:
            named[group["layer"]] += sorted(group["names"])
        digest = sha256(repr(named).encode()).hexdigest()[:16]
        lines.append(f"{name}: parameters of each layer {' '.join(str(len(own)) for own in named.values())}")
        lines.append(f"  their names {digest}")
        free = [key for group in groups if not group["weight_decay"] for key in group["names"]]
        kept = [key for key in free if shapes[key] > 1]
        lines.append(f"  not decayed: {len(kept)} {' '.join(sorted(kept)[:3])}")
    return lines


def positions():
    """Position tables of ViT and Swin, resampled to another image size by timm."""
    from timm.layers import resample_abs_pos_embed
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    def table(*shape):
        return torch.from_numpy(chance.uniform(shape, "table")).float()

    lines = []
    absolute = resample_abs_pos_embed(table(1, 1 + 14 * 14, 3), [24, 24], num_prefix_tokens=1)
    relative = resize_rel_pos_bias_table(table(13 * 13, 3), (12, 12), (23 * 23, 3))
    for name, values in (("absolute", absolute[0]), ("relative", relative)):
        lines.append(f"{name} {tuple(values.shape)}")
        lines += [" ".join(f"{value:.5f}" for value in row) for row in values[:: len(values) // 12].tolist()]
    return lines


def training():
    """Defaults of the optimizer, of clipping, of the loss scaler and of batch normalisation's statistics."""
    net = nn.Linear(2, 1, bias=False)
    lines = []
    for fused in (True, False):
        group = optim.adamw(net, Optim(), fused=fused).param_groups[0]
        hidden = ("params", "names", "fused", "foreach")
        shown = {key: group[key] for key in sorted(group) if key not in hidden}
        lines.append(f"AdamW fused={fused} {shown}")
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    torch.nn.utils.clip_grads_with_norm_(net.parameters(), 1.0, torch.tensor(5.0))
    lines.append(f"clipped from norm 5 to 1: {net.weight.grad.norm().item():.9f}")
    scaler = torch.amp.GradScaler("cpu")
    factors = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    lines.append(f"loss scale {scaler._init_scale}, {factors}")
    logits, targets = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.7, 0.2, 0.1]])
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    lines.append(f"cross-entropy {loss.item():.6f}")
    return lines


TEXTS = [mixing, augmentation, randaugment, models, initial_weights, layer_groups, positions, training]

if __name__ == "__main__":
    for text in TEXTS:
        if text.__name__ in sys.argv[1:]:
            print("\n".join(text()))
