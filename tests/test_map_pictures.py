"""Pictures of label maps: colours, stripes where a prediction is wrong, and the legend."""

import numpy as np
from PIL import Image

from reconverge.data import scenes
from reconverge.report import map_pictures
from reconverge.report.map_pictures import Shown


def test_every_class_has_its_own_colour():
    table = map_pictures.colours(150)
    assert len({tuple(colour) for colour in table[:150].tolist()} | {map_pictures.UNLABELLED}) == 151
    assert np.array_equal(map_pictures.colours(6)[:6], table[:6])
    labels = np.array([[0, 5], [255, 2]])
    assert map_pictures.painted(labels, 6)[1].tolist() == [[222, 222, 222], [0, 158, 115]]


def shown(path, several, classes, title="a title"):
    map_pictures.beside(path, several, classes, title)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def black(pixels):
    return int((pixels.max(-1) == 0).sum())


def test_wrong_pixels_are_striped_and_ignored_ones_are_not(tmp_path):
    """One image; half of its prediction is wrong, and half of that is ignored: a quarter has stripes."""
    pixels, right = np.full((80, 80, 3), 90, np.uint8), np.ones((80, 80), np.uint8)
    wrong = right.copy()
    wrong[:40] = 2
    ignored = right.copy()
    ignored[:20] = 255
    counts = []
    for predicted, labels in ((right, right), (wrong, right), (wrong, ignored)):
        drawn = shown(tmp_path / "one.png", [Shown(pixels, predicted, labels, "")], ["a", "b", "c"], "")
        counts.append(black(drawn))
    stripes = 160 * 160 // 2 // 5  # the longer side is drawn with 160 pixels
    assert abs(counts[1] - counts[0] - stripes) < 0.1 * stripes
    assert abs(counts[2] - counts[0] - stripes / 2) < 0.1 * stripes


def test_the_colours_of_truth_and_prediction_are_there(tmp_path):
    several = [
        Shown(one.pixels, one.labels, one.labels, f"{number}.png")
        for number, one in enumerate(scenes.scene("val", number) for number in range(3))
    ]
    drawn = shown(tmp_path / "maps.png", several, list(scenes.CLASSES))
    for number, one in enumerate(several):
        left, top = number % 2, number // 2
        part = drawn[top * drawn.shape[0] // 2 :, left * drawn.shape[1] // 2 :]
        for label in np.unique(one.labels):
            colour = map_pictures.colours(6)[label]
            count = int((part == colour).all(-1).sum())
            assert count > 1.5 * (one.labels == label).sum()  # in two maps, enlarged from 96 to 160 pixels


def test_other_shapes_many_classes_and_no_truth(tmp_path):
    rows = np.arange(60)[:, None] * np.ones((1, 100), np.int64)
    wide = Shown(np.zeros((60, 100, 3), np.uint8), rows.astype(np.int64), None, "photo $1_2$.jpg")
    tall = Shown(np.zeros((100, 30, 3), np.uint8), rows.T[:, :30].astype(np.int64), None, "x" * 200)
    classes = [f"class number {number}" for number in range(150)]
    drawn = shown(tmp_path / "maps.png", [wide, tall, wide], classes)
    assert drawn.shape[1] >= 640
    assert (map_pictures.colours(150)[30] == drawn).all(-1).any()
