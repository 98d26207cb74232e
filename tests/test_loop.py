"""The loop of train.py compared with an independent slow loop: accumulation, scaling, clipping, optimizer,
EMA, and their order.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from reconverge.base import chance
from reconverge.config.settings import Augment, Data, Model
from reconverge.config.settings import Mix as MixSettings
from reconverge.data import transforms
from reconverge.data.loader import Images
from reconverge.data.mix import Mix, Noise, Normalise, erase
from reconverge.data.order import Order
from reconverge.data.sources import open_sources
from reconverge.models import create, drop_path

STEPS, BATCH, MICROBATCH, LR, DECAY, CLIP, WEIGHT_DECAY = 4, 16, 8, 1e-3, 0.9, 0.7, 0.3


def reference(digits, cache):
    training, _ = open_sources(Data("folder", "folder", root=str(digits), cache=str(cache)))
    net = create.model(Model("convnext_atto", "atto", 0.5), 10, seed=3).train()
    masked = drop_path.Masked(net)
    parameters = dict(net.named_parameters())
    first = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    average = {name: p.detach().double() for name, p in parameters.items()}
    images_of = Images(
        training, transforms.labelled(transforms.training(Augment(size=32), [0.485, 0.456, 0.406])), 3
    )
    normalise = Normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], torch.device("cpu"), False)
    mix = Mix(0.5, MixSettings(), 10)
    order, losses, norms = Order(len(training), BATCH, MICROBATCH, 3), [], []
    for step in range(STEPS):
        total = 0.0
        for microbatch in range(BATCH // MICROBATCH):
            (images, (labels,), *_), _ = images_of[order.microbatch(step, microbatch)]
            key = (3, step, microbatch)
            images, targets = mix(normalise(images), labels, key)
            logits = masked(
                images, drop_path.draw(drop_path.rates(net), MICROBATCH, key, torch.device("cpu"))
            )
            total = total - (targets * logits.log_softmax(1)).sum() / BATCH  # a mean over the whole batch
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        rate = LR * step / (7 - 1)  # warm-up of one epoch of 7 steps, from 0 to LR with both ends
        with torch.no_grad():
            for name, parameter in parameters.items():
                gradient = gradients[name].double() * min(1, CLIP / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                decay = 0.0 if parameter.ndim == 1 or name.endswith("bias") else WEIGHT_DECAY
                update = (first[name] / (1 - 0.9 ** (step + 1))) / (
                    (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                )
                parameter.copy_(parameter.double() * (1 - rate * decay) - rate * update)
                average[name] = DECAY * average[name] + (1 - DECAY) * parameter.double()
        losses.append(float(total.detach()))
        norms.append(norm)
    return {name: p.detach() for name, p in parameters.items()}, average, losses, norms


def test_the_loop_equals_a_slow_one(train, digits, cache):
    settings = ["model.drop_path=0.5", "recipe.name=mine", "augment.scale=[0.08,1.0]", "augment.flip=0.5",
        "augment.auto=rand-m9-mstd0.5-inc1", "augment.erase=0.5",
        f"optim.lr={LR}", f"optim.clip={CLIP}", f"optim.weight_decay={WEIGHT_DECAY}",
        f"ema.decay={DECAY}", "seed=3", "log_every=1", "evaluate_every=never"]  # fmt: skip
    assert train("run=a", f"steps={STEPS}", *settings) == 0
    weights, average, losses, norms = reference(digits, cache)
    from test_train import metrics

    records = [record for record in metrics("a") if "loss" in record]
    assert torch.allclose(
        torch.tensor([record["loss"] for record in records]), torch.tensor(losses), rtol=1e-4
    )
    assert torch.allclose(
        torch.tensor([record["grad_norm"] for record in records]), torch.tensor(norms), rtol=1e-3
    )
    saved = Path("runs/a/checkpoints/step-00000004")
    raw, ema = load_file(saved / "model.safetensors"), load_file(saved / "ema.safetensors")
    start = create.model(Model("convnext_atto", "atto", 0.5), 10, seed=3).state_dict()
    for name in weights:
        moved = float((weights[name] - start[name]).abs().max())
        # AdamW divides by the gradient's own size: where that is tiny, rounding decides the sign. Most must
        # agree closely.
        close = ((raw[name] - weights[name]).abs() < 0.02 * moved + 1e-7).float().mean()
        assert float(close) > 0.99, name
        drift = float((average[name] - start[name].double()).abs().max())
        assert (
            float(((ema[name].double() - average[name]).abs() < 0.02 * drift + 1e-7).float().mean()) > 0.99
        ), name
    assert any(norm > CLIP for norm in norms)


def test_erasing_comes_before_mixing():
    """Noise is mixed like pixels. If erasing came after mixing, the noise would have full strength."""
    mix = Mix(0.5, MixSettings(), classes=4)
    labels = torch.tensor([0, 1, 2, 3])
    for step in range(20):
        images = torch.from_numpy(chance.uniform((4, 3, 24, 24), step)).float()
        expected = images.clone()
        with chance.scope(0, "erase", step, 1):
            erase(expected, Noise.drawn(0.5, *expected.shape))
        with chance.scope(0, "mix", step, 1):
            expected, _ = mix.mixup(expected, labels)
        assert torch.equal(mix(images, labels, (0, step, 1))[0], expected)
