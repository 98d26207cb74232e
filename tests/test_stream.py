"""What reaches the model is the same for every layout: world size, workers, order, start, local copies of
shards.
"""

import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Augment
from reconverge.data import transforms
from reconverge.data.loader import Feed, Images
from reconverge.data.order import Order, Windows
from reconverge.data.shards import open_shards
from reconverge.data.stage import Stage

CPU = torch.device("cpu")
BATCH, MICROBATCH, STEPS = 16, 2, 9  # of 60 images: three epochs of three steps of eight microbatches


def opened(root):
    return open_shards(root, None)[0]


def order_of(source, window, repeats=1):
    windows = None if window == "all" else Windows(source.images_of, int(window), seed=4)
    return Order(len(source), BATCH, MICROBATCH, seed=4, repeats=repeats, windows=windows)


def stream(root, window, ranks=1, workers=0, start=0, repeats=1):
    """(step, microbatch) -> sample ids, repeats, and the bytes of the augmented images, over all ranks."""
    source, found = opened(root), {}
    order = order_of(source, window, repeats)
    images = Images(source, transforms.labelled(transforms.training(Augment(size=32), [0.5] * 3)), seed=4)
    for rank in range(ranks):
        mine = [
            (step, number)
            for step in range(start, STEPS)
            for number in range(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        ]
        feed = Feed(images, order.steps(start, STEPS, rank, ranks), workers, CPU, ahead=True)
        for at, part, batch in zip(mine, order.steps(start, STEPS, rank, ranks), feed, strict=True):
            assert batch.targets[0].tolist() == source.labels(part.ids).tolist()
            found[at] = part.epoch, part.ids.tolist(), part.repeats.tolist(), batch.images.numpy().tobytes()
    return found


@pytest.mark.parametrize("window", [pytest.param("all", marks=pytest.mark.slow), "2"])
def test_every_layout_sees_the_same_images_in_the_same_order(window, shards):
    reference = stream(shards, window)
    assert sorted(reference) == [(step, number) for step in range(STEPS) for number in range(8)]
    for epoch in range(3):
        ids = [sample for of_epoch, ids, *_ in reference.values() if of_epoch == epoch for sample in ids]
        assert (
            len(ids) == len(set(ids)) == 48
        )  # three batches of sixteen; the tail that fills none is dropped
    for ranks, workers in ((1, 1), (1, 3), (2, 1), (4, 3), (8, 0), (8, 1)):
        assert stream(shards, window, ranks, workers) == reference, (ranks, workers)
    assert stream(shards, "2" if window == "all" else "1") != reference


@pytest.mark.parametrize("window", ["all", "2"])
def test_it_starts_at_any_step(window, shards):
    reference = stream(shards, window)
    for start in range(STEPS):
        assert stream(shards, window, ranks=1 + start % 2, start=start) == {
            at: seen for at, seen in reference.items() if at[0] >= start
        }


def test_repeated_augmentation_draws_anew_in_another_microbatch(shards):
    found = stream(shards, "all", repeats=3)
    epoch = {at: seen for at, seen in found.items() if seen[0] == 0}
    pairs = [pair for _, ids, repeats, _ in epoch.values() for pair in zip(ids, repeats, strict=True)]
    assert len(set(pairs)) == len(pairs) == 48
    assert len({sample for sample, _ in pairs}) == 16
    size = 32 * 32 * 3
    pixels = {}
    for (step, number), (_, ids, repeats, data) in epoch.items():
        for place, pair in enumerate(zip(ids, repeats, strict=True)):
            pixels[pair] = (step, number), data[place * size : (place + 1) * size]
    for sample in {sample for sample, _ in pairs}:
        three = [pixels[sample, repeat] for repeat in range(3)]
        assert len({at for at, _ in three}) == 3
        assert len({data for _, data in three}) == 3
    assert stream(shards, "all", ranks=4, workers=1, repeats=3) == found


@given(
    images_of=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    width=st.integers(1, 5),
    windows=st.booleans(),
    microbatches=st.sampled_from([1, 2, 4, 8]),
    repeats=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 50),
)
def test_each_repeat_of_each_sample_at_most_once_an_epoch(
    images_of, width, windows, microbatches, repeats, seed, epoch
):
    images, batch, repeats = sum(images_of), 2 * microbatches, min(repeats, microbatches)
    steps = images // batch
    if not steps:
        return
    order = Order(
        images,
        batch,
        2,
        seed,
        repeats=repeats,
        windows=Windows(np.array(images_of), width, seed) if windows else None,
    )
    seen = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        parts = list(order.steps(step, step + 1))
        assert all(part.epoch == epoch for part in parts)
        assert all(len(set(part.ids.tolist())) == 2 for part in parts), (
            "two repeats of a sample in one microbatch"
        )
        seen += [
            pair for part in parts for pair in zip(part.ids.tolist(), part.repeats.tolist(), strict=True)
        ]
        for ranks in {1, 2, 4, 8} & set(range(1, microbatches + 1)):
            shared = [part for rank in range(ranks) for part in order.steps(step, step + 1, rank, ranks)]
            assert [part.ids.tolist() for part in shared] == [part.ids.tolist() for part in parts]
    assert len(seen) == len(set(seen)) == steps * batch
    assert all(0 <= sample < images and 0 <= repeat < repeats for sample, repeat in seen)


@given(
    images_of=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    width=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_window_is_finished_before_the_next_begins(images_of, width, seed):
    windows = Windows(np.array(images_of), width, seed)
    images = sum(images_of)
    shard_of = np.repeat(np.arange(len(images_of)), images_of)
    order = windows.ids(3, np.arange(images))
    assert np.array_equal(np.sort(order), np.arange(images))
    position = 0
    visited = []
    for window in range(windows.count):
        shards = windows.shards(3, window)
        assert 1 <= len(shards) <= width
        held = sum(images_of[shard] for shard in shards)
        assert set(shard_of[order[position : position + held]]) <= set(shards)
        assert {windows.window(3, at) for at in range(position, position + held)} <= {window}
        visited += shards.tolist()
        position += held
    assert sorted(visited) == list(range(len(images_of)))


def test_windows_are_uniform_and_independent():
    """Over many epochs each image comes equally often in each window and at each tenth of the epoch."""
    images_of, epochs = np.full(40, 25), 400
    images = int(images_of.sum())
    windows = Windows(images_of, 4, seed=1)
    orders = np.stack([windows.ids(epoch, np.arange(images)) for epoch in range(epochs)])
    tenth = np.argsort(orders, axis=1) * 10 // images
    counts = np.stack([(tenth == number).sum(0) for number in range(10)])
    chi2 = ((counts - epochs / 10) ** 2 / (epochs / 10)).sum(
        0
    )  # 9 degrees of freedom an image; images of a shard move together
    assert abs(chi2.mean() - 9) < 1.2
    assert not np.array_equal(orders[0], orders[1])
    inside = orders[:, :100] % 25  # place in its shard of what comes first
    assert abs(inside.mean() - 12) < 0.2


def test_golden_windows(golden):
    windows = Windows(np.arange(100, 2100, 2), 8, seed=0)
    ids = windows.ids(3, np.arange(0, int(np.arange(100, 2100, 2).sum()), 100_000))
    golden("order_windows.txt", "\n".join(map(str, ids.tolist())))


# ---- local copies ------------------------------------------------------------------------------------------


def staged(root, folder, gigabytes=1.0, slowly=0.0, limit=None):
    source = opened(root)
    order = order_of(source, "2")
    images = Images(source, transforms.labelled(transforms.training(Augment(size=32), [0.5] * 3)), seed=4)
    found, most = [], 0
    with Stage(source, order.windows, folder, gigabytes) as stage:
        for batch in Feed(images, stage.follow(order.steps(0, STEPS)), 1, CPU, ahead=True):
            found.append(batch.images.numpy().tobytes())
            time.sleep(slowly)
            most = max(most, sum(path.stat().st_size for path in folder.iterdir() if path.exists()))
    return found, most


def test_local_copies_give_the_same_images_within_their_space(shards, tmp_path):
    reference = [seen[-1] for _, seen in sorted(stream(shards, "2").items())]
    largest = 2 * max(shard["bytes"] for shard in opened(shards).shards)
    space = 2.1 * largest / 1e9
    found, most = staged(shards, tmp_path / "stage", space, slowly=0.005)
    assert found == reference
    assert 0 < most <= space * 1e9
    assert not (tmp_path / "stage").exists()


def test_local_copies_are_what_is_read(shards, tmp_path):
    """After the source was removed, the images are read from the copies."""
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    source = opened(root)
    with Stage(source, Windows(source.images_of, 2, seed=4), tmp_path / "stage", 1.0) as stage:
        order = order_of(source, "2")
        first = next(iter(stage.follow(order.steps(0, 1))))
        for _ in range(500):
            if stage._brought is not None:
                break
            time.sleep(0.01)
        for path in root.glob("train-*.tar"):
            path.unlink()
        assert [source.read(int(sample)) for sample in first.ids] == [
            opened(shards).read(int(sample)) for sample in first.ids
        ]


def test_a_copy_that_is_not_the_shard_stops_the_run(shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    path = sorted(root.glob("train-*.tar"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the padding, which no checksum of an image covers
    path.write_bytes(data)
    with pytest.raises(Stop, match="is damaged") as stopped:
        staged(root, tmp_path / "stage", slowly=0.05)
    assert stopped.value.code == Exit.DAMAGED
    assert not (tmp_path / "stage").exists()


def test_too_little_space_is_refused(shards, tmp_path):
    with pytest.raises(Stop, match="space for two windows") as stopped:
        staged(shards, tmp_path / "stage", 1e-6)
    assert stopped.value.code == Exit.USAGE
