import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconverge.data import order
from reconverge.data.order import Order


@given(images=st.integers(1, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
@settings(max_examples=60)
def test_every_image_once_an_epoch(images, seed, epoch):
    ids = order.permuted(np.arange(images), images, seed, order.VERSION, epoch)
    assert np.array_equal(np.sort(ids), np.arange(images))


@given(images=st.integers(2, 5000), data=st.data())
@settings(max_examples=60)
def test_each_position_alone_gives_what_all_together_give(images, data):
    position = data.draw(st.integers(0, images - 1))
    whole = order.permuted(np.arange(images), images, 3, order.VERSION, 5)
    assert order.permuted(np.array([position]), images, 3, order.VERSION, 5)[0] == whole[position]


def test_epochs_and_seeds_are_independent_and_uniform():
    """Over many epochs each image comes equally often at each tenth of the epoch, and neighbours do not stay
    neighbours.
    """
    images, epochs = 997, 400
    orders = np.stack(
        [order.permuted(np.arange(images), images, 1, order.VERSION, epoch) for epoch in range(epochs)]
    )
    where = np.argsort(orders, axis=1) * 10 // images  # (epochs, images): tenth in which each image comes
    counts = np.stack([(where == tenth).sum(0) for tenth in range(10)])  # (10, images)
    chi2 = ((counts - epochs / 10) ** 2 / (epochs / 10)).sum(0)  # 9 degrees of freedom an image
    assert abs(chi2.mean() - 9) < 0.6
    assert chi2.max() < 40
    fixed = (
        orders[1:] == orders[:-1]
    ).mean()  # chance of the same image at the same place in two epochs: 1 / images
    assert fixed < 3 / images
    distance = (orders[:, 1:] - orders[:, :-1]) % images
    assert abs(distance.mean() - images / 2) < 4
    assert (order.permuted(np.arange(images), images, 2, order.VERSION, 0) != orders[0]).mean() > 0.99


def test_opening_costs_the_same_at_any_size():
    """Fourteen million images: only what is asked for is computed."""
    ids = order.permuted(np.arange(128) + 13_000_000, 14_197_122, 0, order.VERSION, 89)
    assert len(set(ids.tolist())) == 128
    assert 0 <= ids.min() <= ids.max() < 14_197_122


@given(images=st.integers(16, 300), microbatch=st.sampled_from([2, 4, 8]), start=st.integers(0, 30))
@settings(max_examples=40)
def test_microbatches_partition_the_epoch_and_start_anywhere(images, microbatch, start):
    batch = 16
    images_of = Order(images, batch, microbatch, seed=9)
    steps_per_epoch = images // batch
    first = [sample for part in images_of.steps(0, steps_per_epoch) for sample in part.ids.tolist()]
    assert len(first) == len(set(first)) == steps_per_epoch * batch
    whole = [(part.epoch, part.ids.tolist()) for part in images_of.steps(0, start + 3)]
    tail = [(part.epoch, part.ids.tolist()) for part in images_of.steps(start, start + 3)]
    assert whole[start * (batch // microbatch) :] == tail
    # Another microbatch size cuts the same batches.
    other = Order(images, batch, 16, seed=9)
    assert sorted(other.step_ids(start)) == sorted(images_of.step_ids(start))


def test_overfitting_repeats_the_first_step():
    images_of = Order(100, 16, 8, seed=0, overfit=True)
    assert images_of.step_ids(5) == images_of.step_ids(0) == Order(100, 16, 8, seed=0).step_ids(0)


@pytest.mark.parametrize("images", [1437, 1_281_167, 14_197_122])
def test_golden(images, golden):
    ids = order.permuted(np.arange(0, images, max(1, images // 8))[:8], images, 0, order.VERSION, 3)
    golden(f"order_{images}.txt", "\n".join(map(str, ids.tolist())))
