"""The classifier head in float32: logits that are compared are not rounded to bfloat16 or float16 before."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reconverge.config.settings import Data, Evaluate, Model
from reconverge.data.mix import Normalise
from reconverge.data.sources import open_sources
from reconverge.distributed.world import World
from reconverge.models import create, head
from reconverge.models.table import MODELS
from reconverge.training.evaluate import Among, Evaluator

# One model of each family in the table, and other models of timm.
OURS = ["convnext_atto", "convnext_iso_s", "deit_s", "swin_t", "regnety_16g", "effnet_b7", "r101x3",
        "resnet50", "roadmap_00_resnet50", "roadmap_15_downsampling"]  # fmt: skip
TIMM = ["test_convnext", "test_vit", "deit_tiny_distilled_patch16_224", "levit_128s", "mobilenetv3_small_050",
        "ghostnet_050", "vgg11", "beit_base_patch16_224", "mixer_s32_224"]  # fmt: skip


@pytest.mark.parametrize("name", [*OURS, *TIMM])
def test_logits_of_every_model_are_float32_and_the_method_is_given_back(name):
    """On tensors without data."""
    if name in TIMM:
        net = timm.create_model(name, pretrained=False)
        size = net.pretrained_cfg["input_size"][-1]
    else:
        size = MODELS[name].fixed_size
        net = create.on_meta(Model(name, "t", 0.0, layer_scale=None, image_size=size), 1000)
    size = size or 224
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net = net.to_empty(device="cpu").eval()
        images = torch.empty(2, 3, size, size)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(images).dtype == torch.bfloat16
            for model in (net, Among(net, [3, 5])):
                with head.in_float32(model):
                    assert model(images).dtype == torch.float32
            assert net(images).dtype == torch.bfloat16


class Sharp(nn.Module):
    """The first pixels of an image are its features; a thousand classes with logits close to each other."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 1000)
        weight = np.random.default_rng(0).standard_normal((1000, 64)) * 0.05
        self.fc.weight.data = torch.from_numpy(weight).float()
        self.fc.bias.data = torch.full((1000,), 8.0)

    def get_classifier(self):
        return self.fc

    def forward(self, images):
        return self.fc(images[:, 0, 10:18, 10:18].flatten(1).bfloat16())  # all features fit into bfloat16


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_answers_under_mixed_precision_are_those_of_float64_without_ties(precision, cache, tmp_path):
    _, source = open_sources(Data("digits", "digits", cache=str(tmp_path)))
    world = World("cpu", precision, deterministic=False)
    normalise = Normalise([0.5] * 3, [0.25] * 3, world.device, False)
    evaluator = Evaluator(Evaluate(32, 1.0, "squash", "bicubic"), normalise, world, 0)
    net = Sharp().eval()
    if precision == "fp32":  # as it is outside of an evaluation
        net.forward = lambda images: net.fc(images[:, 0, 10:18, 10:18].flatten(1).bfloat16().float())

    features = []
    handle = net.fc.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].double()))
    tables = evaluator.table(lambda logits, labels: [*logits.T], 1000, {"net": net}, source)
    handle.remove()
    logits, features = tables.of["net"], torch.cat(features)
    exact = features @ net.fc.weight.double().T + 8.0
    best = logits.topk(2).values
    assert (best[:, 0] == best[:, 1]).sum() == 0
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    # The same logits, rounded to bfloat16 at last, would tie.
    best = exact.bfloat16().topk(2).values
    assert (best[:, 0] == best[:, 1]).sum() > len(exact) // 10
    if precision == "fp32":
        with torch.no_grad():
            assert torch.equal(logits.float()[:8], net.fc(features[:8].float()))
