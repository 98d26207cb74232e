"""Pixels against timm's and the official code's own transforms."""

import io
import os
import random

import numpy as np
import pytest
import torch
from conftest import weights
from PIL import Image
from scipy import stats
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms as tv

from reconverge.base import chance
from reconverge.config.settings import Augment, Evaluate
from reconverge.config.settings import Mix as MixSettings
from reconverge.data import transforms
from reconverge.data.mix import Mix, Noise, Normalise, erase

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
normalise = Normalise(MEAN, STD, torch.device("cpu"), channels_last=False)
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m3-mstd0.5-inc1"]


def image(number, size=None):
    random = np.random.Generator(np.random.PCG64(number))
    size = size or (int(random.integers(40, 500)), int(random.integers(40, 500)))
    return Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )


def jpeg(number, size=None):
    """The same image as a file, so that both decoders read the same bytes."""
    buffer = io.BytesIO()
    image(number, size).save(
        buffer, "JPEG", quality=90, subsampling=2 * (number % 2), progressive=number % 5 == 0
    )
    return buffer.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def shipped(pixels):
    """(H, W, 3) -> (1, 3, H, W), as the loader returns it."""
    assert pixels.dtype == np.uint8
    return torch.from_numpy(pixels[None].copy()).permute(0, 3, 1, 2)


@pytest.mark.usefixtures("decoder")
def test_evaluation_at_224_is_the_official_transform():
    """Resize the shorter side to 256, bicubic; crop the centre; ToTensor; Normalize."""
    official = tv.Compose(
        [
            tv.Resize(256, interpolation=tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(224),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    ours = transforms.evaluation(Evaluate())
    assert transforms.resized_side(Evaluate()) == 256
    for number in range(12):
        assert torch.equal(normalise(shipped(ours(jpeg(number))))[0], official(opened(jpeg(number))))


@pytest.mark.usefixtures("decoder")
def test_evaluation_at_384_is_a_squash():
    official = tv.Compose(
        [
            tv.Resize((384, 384), interpolation=tv.InterpolationMode.BICUBIC),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    ours = transforms.evaluation(Evaluate(size=384, crop_ratio=1.0, mode="squash"))
    for number in range(6):
        assert torch.equal(normalise(shipped(ours(jpeg(number))))[0], official(opened(jpeg(number))))


def timms(augment):
    return create_transform(
        augment.size, is_training=True, color_jitter=0.4, auto_augment=augment.auto,
        interpolation=augment.interpolation,
        re_prob=augment.erase, re_mode="pixel", re_count=1, mean=tuple(MEAN), std=tuple(STD),
    )  # fmt: skip


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("size", [64, 224])
def test_training_is_bit_equal_to_timms_with_erasing_when_the_stream_goes_on(size):
    augment = Augment(size=size)
    ours, theirs = transforms.training(augment, MEAN), timms(augment)
    erased = 0
    for number in range(60 if size == 64 else 16):
        with chance.scope(0, "augment", number):
            expected = theirs(opened(jpeg(number)))
        with chance.scope(0, "augment", number):
            pixels = normalise(shipped(ours(jpeg(number))))
            before = pixels.clone()
            erase(pixels, Noise.drawn(augment.erase, *pixels.shape))
        assert torch.equal(pixels[0], expected)
        erased += not torch.equal(pixels, before)
    assert erased > 0


def test_what_reaches_the_model_has_the_distribution_of_timms():
    """With the real keys: one for each sample in the worker, and another for erasing a microbatch."""
    augment = Augment(size=48)
    ours, theirs = transforms.training(augment, MEAN), timms(augment)
    picture, count = jpeg(3, (160, 120)), 512
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    reference = torch.stack([theirs(opened(picture)) for _ in range(count)])
    batches = []
    for microbatch in range(count // 64):
        augmented = []
        for sample in range(64):
            with chance.scope(0, "augment", 0, microbatch * 64 + sample, 0):
                augmented.append(shipped(ours(picture)))
        pixels = normalise(torch.cat(augmented))
        with chance.scope(0, "erase", 0, microbatch):
            erase(pixels, Noise.drawn(augment.erase, *pixels.shape))
        batches.append(pixels)
    for statistic in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: x[:, 0, 24, 24],
        lambda x: (x[:, :, 1:] - x[:, :, :-1]).abs().mean((1, 2, 3)),  # erased noise shows here
        lambda x: (x.abs() > 2.7).float().mean((1, 2, 3)),  # beyond white and black: only noise
    ):
        assert (
            stats.ks_2samp(statistic(torch.cat(batches)).numpy(), statistic(reference).numpy()).pvalue > 1e-3
        )


def test_erasing_and_mixing_do_not_know_of_each_other():
    """With the same seed in python and numpy, erasing would depend on the kind of mixing."""
    mix = Mix(0.25, MixSettings(), classes=10)
    erased = {True: [], False: []}
    for microbatch in range(300):
        with chance.scope(0, "erase", 0, microbatch):
            images = torch.zeros(8, 3, 16, 16)
            erase(images, Noise.drawn(0.25, *images.shape))
        with chance.scope(0, "mix", 0, microbatch):
            _, box = mix.mixup.draw(16, 16)
        erased[box is not None].append(float((images.flatten(1).abs().sum(1) > 0).float().mean()))
    for shares in erased.values():
        assert len(shares) > 100
        assert np.mean(shares) == pytest.approx(0.25, abs=0.06)


def test_mix_is_mixup_or_cutmix_of_a_microbatch_with_itself_flipped():
    """Compared with the definitions, pixel by pixel: one lambda or one box for each microbatch, and matching
    targets.
    """
    mix, classes = Mix(0.0, MixSettings(), classes=5), 5
    labels = torch.tensor([0, 1, 2, 3])
    kinds = set()
    for step in range(60):
        images = torch.from_numpy(chance.uniform((4, 3, 20, 20), step)).float()
        mixed, targets = mix(images.clone(), labels, (0, step, 0))
        hard = torch.nn.functional.one_hot(labels, classes) * 0.9 + 0.1 / classes
        difference = targets[0] - hard.flip(0)[0]
        share = float(difference[0] / (hard - hard.flip(0))[0, 0])  # weight of the image itself
        assert torch.allclose(targets, share * hard + (1 - share) * hard.flip(0), atol=1e-5)
        if torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-4):
            kinds.add("mixup")
            continue
        pasted = (mixed == images.flip(0)).all(1)
        assert (pasted | (mixed == images).all(1)).all()
        assert (pasted == pasted[0]).all()  # the same box in each
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted[0].sum() == rows * columns  # a rectangle
        assert float(pasted[0].float().mean()) == pytest.approx(1 - share, abs=1e-4)
        kinds.add("cutmix")
    assert kinds == {"mixup", "cutmix"}


def test_mix_off_is_label_smoothing_alone():
    images, targets = Mix(0.0, MixSettings(mixup=0, cutmix=0), classes=4)(
        torch.ones(2, 3, 8, 8), torch.tensor([1, 2]), (0, 0, 0)
    )
    assert (images == 1).all()
    assert targets[0].tolist() == pytest.approx([0.025, 0.925, 0.025, 0.025])


def test_mix_is_a_function_of_its_key():
    mix = Mix(0.5, MixSettings(), classes=5)

    def mixed(*key):
        return mix(
            torch.from_numpy(chance.uniform((4, 3, 20, 20), 0)).float(), torch.tensor([0, 1, 2, 3]), key
        )[0]

    assert torch.equal(mixed(0, 1, 2), mixed(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(mixed(0, 1, 2), mixed(*other))


@pytest.mark.parametrize("policy", POLICIES)
def test_five_thousand_draws_of_each_shipped_policy(policy):
    """Pillow 13 raises on posterize with 0 bits; the published recipe got a black image."""
    transform = rand_augment_transform(
        policy, {"translate_const": 10, "img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    )
    picture = image(1, (24, 24))
    for draw in range(5000):
        with chance.scope(draw):
            assert transform(picture).size == (24, 24)


def test_shipped_policies_are_all_tested():
    from conftest import ROOT

    shipped = {
        line.split("auto:")[1].split("#")[0].strip()
        for path in ROOT.glob("conf/**/*.yaml")
        for line in path.read_text().splitlines()
        if "auto:" in line and "{" not in line
    }
    assert shipped == set(POLICIES)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_erasing_writes_box_after_box(layout):
    """Compared with timm's RandomErasing, which writes each box by itself, on a microbatch."""
    from timm.data.random_erasing import RandomErasing

    images = torch.arange(16 * 3 * 20 * 30.0).view(16, 3, 20, 30).to(memory_format=layout)
    expected = images.clone()
    with chance.scope(0, "erase", 3, 1):
        RandomErasing(0.5, mode="pixel", device="cpu")(expected)
    erase(images, Noise.of(0.5, images.shape, (0, 3, 1)))
    assert torch.equal(images, expected)
    assert (
        0 < int((expected != torch.arange(16 * 3 * 20 * 30.0).view(16, 3, 20, 30)).any((1, 2, 3)).sum()) < 16
    )


def test_data_workers_draw_what_erases(train, monkeypatch):
    """The same bits as in the process that trains, which then draws nothing."""
    arguments = ["steps=3", "augment.erase=0.5", "evaluate_every=never", "save_every=0"]
    assert train("run=here", *arguments, "workers=0") == 0
    drawn, here = Noise.drawn, os.getpid()

    def elsewhere(*given):
        assert os.getpid() != here
        return drawn(*given)

    monkeypatch.setattr(Noise, "drawn", staticmethod(elsewhere))
    assert train("run=there", *arguments, "workers=1") == 0
    assert weights("here") == weights("there")
