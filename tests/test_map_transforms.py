"""Augmentation of images with label maps against a slow, independent writing of the published formulas."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from reconverge.base import chance
from reconverge.config.settings import Segment
from reconverge.data import map_transforms
from reconverge.data.image import Undecodable

MEAN = [0.485, 0.456, 0.406]
CROP, LONGEST, SHORTEST = 32, 96, 32


def photograph(height, width, seed):
    """PNG bytes of a smooth picture with noise, and a label map of some areas with ignored pixels."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / (5 + c) + seed) * np.cos(y / (7 - c)) for c in range(3)]
    noise = chance.uniform((height, width, 3), "noise", seed) * 40 - 20
    pixels = (np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
    labels = ((x // 9 + y // 11 + seed) % 4).astype(np.uint8)
    labels[(x + 2 * y) % 17 == 0] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), pixels, labels


# ---- the slow writing --------------------------------------------------------------------------------------


def draw(low=0.0, high=1.0):
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))


def whole(count):
    return int(draw() * count)


def bilinear(pixels, height, width):
    """Half-pixel centres, edges repeated, no antialiasing; rounded."""
    out = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            fy = max((y + 0.5) * pixels.shape[0] / height - 0.5, 0)
            fx = max((x + 0.5) * pixels.shape[1] / width - 0.5, 0)
            y0, x0 = int(fy), int(fx)
            y1, x1 = min(y0 + 1, pixels.shape[0] - 1), min(x0 + 1, pixels.shape[1] - 1)
            dy, dx = fy - y0, fx - x0
            p = pixels.astype(float)
            out[y, x] = (p[y0, x0] * (1 - dx) + p[y0, x1] * dx) * (1 - dy)
            out[y, x] += (p[y1, x0] * (1 - dx) + p[y1, x1] * dx) * dy
    return np.floor(out + 0.5)


def hsv(r, g, b):
    """OpenCV's documentation: V = max, S = 255 (V - min) / V, H = 30 (...) / (V - min), rounded, 0..179."""
    v, low = max(r, g, b), min(r, g, b)
    s = 255 * (v - low) / v if v else 0
    if v == low:
        h = 0
    elif v == r:
        h = 30 * (g - b) / (v - low)
    elif v == g:
        h = 60 + 30 * (b - r) / (v - low)
    else:
        h = 120 + 30 * (r - g) / (v - low)
    h = math.floor(h + 0.5)
    return h + 180 if h < 0 else h, math.floor(s + 0.5), v


def rgb(h, s, v):
    """The six cases of the textbook, cut to whole numbers."""
    sector, part = divmod(h / 30, 1)
    p, q, t = v * (1 - s / 255), v * (1 - s / 255 * part), v * (1 - s / 255 * (1 - part))
    of = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)][int(sector) % 6]
    return [math.floor(value + 1e-6) for value in of]


def line(value, factor, offset):
    return int(min(max(value * factor + offset, 0), 255))


def distorted(pixels):
    def each(change):
        return np.array([[change(*map(int, pixel)) for pixel in row] for row in pixels])

    if whole(2):
        offset = draw(-32, 32)
        pixels = each(lambda *p: [line(value, 1, offset) for value in p])
    first = whole(2)
    if first and whole(2):
        factor = draw(0.5, 1.5)
        pixels = each(lambda *p: [line(value, factor, 0) for value in p])
    if whole(2):
        factor = draw(0.5, 1.5)

        def saturate(*p):
            h, s, v = hsv(*p)
            return rgb(h, line(s, factor, 0), v)

        pixels = each(saturate)
    if whole(2):
        turn = whole(36) - 18

        def turned(*p):
            h, s, v = hsv(*p)
            return rgb((h + turn) % 180, s, v)

        pixels = each(turned)
    if not first and whole(2):
        factor = draw(0.5, 1.5)
        pixels = each(lambda *p: [line(value, factor, 0) for value in p])
    return pixels


def slowly(pixels, labels):
    height, width = labels.shape
    ratio = draw(0.5, 2)
    longest, shortest = int(LONGEST * ratio), int(SHORTEST * ratio)
    factor = min(longest / max(height, width), shortest / min(height, width))
    rows, columns = int(height * factor + 0.5), int(width * factor + 0.5)
    resized = bilinear(pixels, rows, columns)
    mapped = np.array(
        [[labels[y * height // rows, x * width // columns] for x in range(columns)] for y in range(rows)]
    )
    for attempt in range(11):  # noqa: B007
        top, left = whole(max(rows - CROP, 0) + 1), whole(max(columns - CROP, 0) + 1)
        found, counts = np.unique(mapped[top : top + CROP, left : left + CROP], return_counts=True)
        counts = counts[found != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    resized, mapped = (
        resized[top : top + CROP, left : left + CROP],
        mapped[top : top + CROP, left : left + CROP],
    )
    if draw() < 0.5:
        resized, mapped = np.flip(resized, 1), np.flip(mapped, 1)
    resized = distorted(resized)
    full, full_labels = np.tile([124, 116, 104], (CROP, CROP, 1)), np.full((CROP, CROP), 255)
    full[: mapped.shape[0], : mapped.shape[1]], full_labels[: mapped.shape[0], : mapped.shape[1]] = (
        resized,
        mapped,
    )
    return full, full_labels, attempt


@pytest.mark.parametrize("number", range(24))
def test_augmentation_follows_the_published_formulas(number):
    data, pixels, labels = photograph(*[(30, 45), (50, 37), (24, 80)][number % 3], number)
    transform = map_transforms.training(CROP, Segment(resize=[LONGEST, SHORTEST]), 0.5, MEAN)
    with chance.scope(3, "augment", 0, number, 0):
        mine, my_labels = transform(data, labels)
    with chance.scope(3, "augment", 0, number, 0):
        expected, expected_labels, _ = slowly(pixels, labels)
    assert mine.dtype == my_labels.dtype == np.uint8
    assert mine.shape == (CROP, CROP, 3)
    assert np.array_equal(my_labels, expected_labels)
    # A resized pixel may be rounded the other way, and what follows multiplies this difference.
    difference = np.abs(mine.astype(int) - expected)
    assert (difference > 8).mean() < 0.02
    assert difference.mean() < 1


def test_a_crop_of_nearly_one_class_is_drawn_again():
    """A map with a second class in a tenth of it: a crop with one class only is drawn again, ten times."""
    data, pixels, labels = photograph(40, 120, 1)
    labels[:], labels[:, :24] = 1, 2
    tries, accepted = [], 0
    for number in range(20):
        with chance.scope(number):
            tries.append(slowly(pixels, labels)[2])
        transform = map_transforms.training(CROP, Segment(resize=[LONGEST, SHORTEST]), 0.5, MEAN)
        with chance.scope(number):
            counts = np.bincount(transform(data, labels)[1].ravel(), minlength=256)[:255]
        accepted += counts.max() < 0.75 * counts.sum()
    assert 0 in tries
    assert 10 in tries
    assert accepted == sum(attempt < 10 for attempt in tries)


def test_hue_saturation_and_value_there_and_back():
    """Of 4,096 colours, against the formulas in OpenCV's documentation."""
    colours = (chance.uniform((64, 64, 3), "colours") * 256).astype(np.uint8)
    colours[0, :, 1] = colours[0, :, 0]  # two equal channels, three equal channels
    colours[1, :, 1:] = colours[1, :, :1]
    hue, saturation, value = map_transforms.to_hsv(colours)
    expected = np.array([[hsv(*map(int, pixel)) for pixel in row] for row in colours])
    for mine, theirs in zip((hue, saturation, value), np.moveaxis(expected, -1, 0), strict=True):
        assert (mine.astype(int) != theirs).mean() < 0.02  # where a fraction is exactly a half
        assert np.abs(mine.astype(int) - theirs).max() <= 1
    back = map_transforms.to_rgb(hue, saturation, value)
    known = np.array([[rgb(*map(int, one)) for one in row] for row in np.stack([hue, saturation, value], -1)])
    assert (back != known).mean() < 0.02
    assert np.abs(back.astype(int) - known).max() <= 1
    assert np.abs(back.astype(int) - colours).max() <= 6  # 180 hues and whole numbers are coarse


def test_hues_turn_both_ways_and_every_distortion_occurs():
    gray = np.full((1, 1, 3), 100, np.uint8)
    red = np.array([[[200, 60, 50]]], np.uint8)
    grays, greens = set(), []
    for number in range(300):
        with chance.scope(number):
            grays.add(int(map_transforms.distorted(gray)[0, 0, 0]))
        with chance.scope(number):
            pixel = map_transforms.distorted(red)[0, 0].astype(int)
            greens.append(pixel[1] - pixel[2])
    assert min(grays) < 60
    assert max(grays) > 160
    assert min(greens) < 0 < max(greens)
    with chance.scope("none", 5):
        state = torch.get_rng_state()
        map_transforms.distorted(gray)
        assert not torch.equal(state, torch.get_rng_state())


def test_the_whole_image_is_evaluated_and_resized_on_the_device():
    data, pixels, labels = photograph(30, 45, 2)
    shown, same = map_transforms.whole(data, labels)
    assert np.array_equal(shown, pixels)
    assert np.array_equal(same, labels)
    size = map_transforms.fitted(labels.shape, 128, 32)
    assert size == (32, 48)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = map_transforms.resized_planes(planes, size)
    assert np.abs(resized[0].permute(1, 2, 0).numpy() - bilinear(pixels, 32, 48)).max() <= 1
    assert map_transforms.fitted((10, 100), 128, 32) == (13, 128)


def test_other_sizes_and_broken_images_are_refused():
    data, _, labels = photograph(30, 45, 2)
    transform = map_transforms.training(CROP, Segment(resize=[LONGEST, SHORTEST]), 0.5, MEAN)
    with pytest.raises(Undecodable, match="45 x 30 pixels with a label map of 44 x 30"):
        transform(data, labels[:, 1:])
    with pytest.raises(Undecodable):
        transform(data[:200], labels)
