"""mIoU against torchmetrics and a loop over pixels; windows, sizes and mirror images against slow loops."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from reconverge.base import chance
from reconverge.data import scenes
from reconverge.training import areas, views


def slow(pairs, classes):
    """(miou, pixel accuracy, mean accuracy, iou of each class or None) by loops over pixels."""
    iou, accuracy, right, labelled = [], [], 0, 0
    for of in range(classes):
        both = either = mine = 0
        for predicted, labels in pairs:
            for p, t in zip(predicted.ravel().tolist(), labels.ravel().tolist(), strict=True):
                if t == 255:
                    continue
                both += p == of and t == of
                either += of in (p, t)
                mine += t == of
        right, labelled = right + both, labelled + mine
        iou.append(100 * both / either if either else None)
        accuracy.append(100 * both / mine if mine else None)
    means = [np.mean([value for value in values if value is not None]) for values in (iou, accuracy)]
    return means[0], 100 * right / labelled, means[1], iou


def drawn(number, classes, shape=(5, 6), ignored=0.2):
    predicted, labels = (chance.uniform(shape, "areas", number, which) * classes for which in "pl")
    labels = np.where(chance.uniform(shape, "ignored", number) < ignored, 255, labels)
    return predicted.astype(np.int64), labels.astype(np.uint8)


WHOLE = np.zeros((4, 4), np.int64)
CASES = {
    "drawn": ([drawn(number, 5) for number in range(4)], 5),
    "two of nine classes": ([drawn(number, 2) for number in range(3)], 9),
    "predicted but never there": ([(WHOLE + 2, WHOLE.astype(np.uint8)), (WHOLE, WHOLE.astype(np.uint8))], 3),
    "an image without labels": ([drawn(1, 3), (WHOLE, np.full((4, 4), 255, np.uint8))], 3),
    "perfect": ([(scenes.scene("val", 0).labels.astype(np.int64), scenes.scene("val", 0).labels)], 6),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_a_loop_and_of_torchmetrics(case):
    pairs, classes = CASES[case]
    rows = [areas.areas(torch.tensor(p)[None], torch.tensor(t)[None], classes)[0] for p, t in pairs]
    assert all(row.dtype == torch.int64 for row in rows)
    found = areas.scores(torch.stack(rows).sum(0).numpy())
    miou, pixels, mean_accuracy, iou = slow(pairs, classes)
    assert found.miou == pytest.approx(miou, abs=1e-12)
    assert found.pixels == pytest.approx(pixels, abs=1e-12)
    assert found.mean_accuracy == pytest.approx(mean_accuracy, abs=1e-12)
    for mine, theirs in zip(found.iou, iou, strict=True):
        assert np.isnan(mine) if theirs is None else mine == pytest.approx(theirs, abs=1e-12)
    flat = [
        torch.cat([torch.tensor(of.astype(np.int64)).ravel() for of in side])
        for side in zip(*pairs, strict=True)
    ]
    options = {"num_classes": classes, "ignore_index": 255}
    assert found.miou == pytest.approx(100 * float(multiclass_jaccard_index(*flat, **options)), abs=1e-4)
    exact = 100 * float(multiclass_accuracy(*flat, average="micro", **options))
    assert found.pixels == pytest.approx(exact, abs=1e-4)
    # The same from the table of confusions.
    confusions = sum(areas.confusion(torch.tensor(p), torch.tensor(t), classes) for p, t in pairs)
    both, predicted, label = torch.stack(rows).sum(0)
    assert torch.equal(confusions.diag(), both)
    assert torch.equal(confusions.sum(0), predicted)
    assert torch.equal(confusions.sum(1), label)


def test_areas_of_several_images_are_those_of_each():
    pairs = [drawn(number, 4) for number in range(60)]  # so many that 255 could fall into another's row
    predicted, labels = (torch.tensor(np.stack(of)) for of in zip(*pairs, strict=True))
    together = areas.areas(predicted, labels, 4)
    for row, (p, t) in zip(together, pairs, strict=True):
        assert torch.equal(row, areas.areas(torch.tensor(p)[None], torch.tensor(t)[None], 4)[0])
    assert torch.equal(together.double().sum(0).long(), together.sum(0))


def test_nothing_labelled_gives_no_number():
    found = areas.scores(np.zeros((3, 2), np.int64))
    assert np.isnan([found.miou, found.pixels, found.mean_accuracy, *found.iou]).all()
    assert areas.table(["a", "b"], found) == ["class  IoU, %  accuracy, %", "a", "b", "mean"]


def test_table_of_classes():
    found = areas.scores(np.array([[2, 0, 0], [4, 0, 1], [2, 3, 0]]))
    assert areas.table(["cat", "dog", "cow"], found) == [
        "class  IoU, %  accuracy, %",
        "cat     50.00       100.00",
        "dog      0.00         0.00",
        "cow      0.00",
        "mean    16.67        50.00",
    ]


# ---- windows, sizes, mirror images -------------------------------------------------------------------------

WEIGHT = torch.tensor(chance.uniform((4, 3, 3, 3), "weight") - 0.5).float()


def logits(images):
    """Of a convolution whose padding shows where a window ends."""
    return torch.nn.functional.conv2d(images, WEIGHT, padding=1)


def picture(height, width, number=0):
    return torch.tensor(chance.uniform((1, 3, height, width), "picture", number)).float()


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (512, 512, 341, [0]),
        (683, 512, 341, [0, 171]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]),
        (300, 512, 341, [0]),
    ],
)
def test_windows_cover_everything_and_end_at_the_edge(length, window, stride, expected):
    assert views.starts(length, window, stride) == expected
    covered = {pixel for start in expected for pixel in range(start, min(start + window, length))}
    assert covered == set(range(length))


@pytest.mark.parametrize("size", [(12, 31), (20, 20), (9, 40), (12, 12)])
def test_sliding_windows_average_logits(size):
    image = picture(*size)
    expected = np.zeros((4, *size))
    for y in range(size[0]):
        for x in range(size[1]):
            answers = []
            for top in sorted(set(views.starts(size[0], 12, 8))):
                for left in sorted(set(views.starts(size[1], 12, 8))):
                    if top <= y < top + 12 and left <= x < left + 12:
                        part = logits(image[..., top : top + 12, left : left + 12])
                        answers.append(part[0, :, y - top, x - left].numpy())
            expected[:, y, x] = np.mean(answers, axis=0)
    assert np.allclose(views.sliding(logits, image, 12, 8)[0].numpy(), expected, atol=1e-5)


def test_one_window_is_the_whole_image():
    image = picture(10, 12)
    assert torch.equal(views.sliding(logits, image, 16, 8), logits(image))


def test_sizes_and_mirror_images_average_probabilities():
    shapes = views.sides((20, 30), 96, 24, (0.5, 1.0, 1.75))
    assert shapes == [(12, 18), (24, 36), (42, 63)]
    several = [picture(*shape, number) for number, shape in enumerate(shapes)]
    expected = []
    for image in several:
        for mirrored in (False, True):
            seen = image.numpy()[..., ::-1].copy() if mirrored else image.numpy()
            answer = logits(torch.tensor(seen)).numpy()
            answer = torch.tensor(answer[..., ::-1].copy() if mirrored else answer)
            answer = torch.nn.functional.interpolate(answer, (20, 30), mode="bilinear", align_corners=False)
            power = np.exp(answer.numpy().astype(np.float64))
            expected.append(power / power.sum(1, keepdims=True))
    found = views.averaged(logits, iter(several), (20, 30), flip=True)
    assert np.allclose(found.numpy(), np.mean(expected, axis=0), atol=1e-6)
    assert np.allclose(found.sum(1), 1, atol=1e-6)
    alone = views.averaged(logits, iter(several), (20, 30), flip=False)
    assert np.allclose(alone.numpy(), np.mean(expected[::2], axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="no view"):
        views.averaged(logits, [], (20, 30), flip=False)
