import random

import numpy as np
import torch
from scipy import stats

from reconverge.base import chance


def test_keys_are_golden(golden):
    keys = [(0,), (0, "mix", 3, 1), (1, "mix", 3, 1), (0, "augment", 2, 17, 0), ("digits-1", 5)]
    golden("keys.txt", "\n".join(f"{parts} {chance.key(*parts)}" for parts in keys))
    assert chance.key(np.int64(3), "a") == chance.key(3, "a")


def test_uniform_numbers_are_golden_and_uniform(golden):
    golden(
        "uniform.txt",
        "\n".join(f"{number:.17g}" for number in chance.uniform((2, 3), 0, "drop_path", 4, 5).flatten()),
    )
    numbers = chance.uniform((100, 200), 7, "x")
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers.flatten()[:-1], numbers.flatten()[1:])[0, 1]) < 0.03


def draw():
    return random.random(), np.random.rand(), float(torch.rand(()))


def test_a_scope_is_a_function_of_its_key_and_leaves_no_trace():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = draw()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    with chance.scope(5, "a"):
        inside = draw()
    assert draw() == before
    with chance.scope(5, "a"):
        assert draw() == inside
    with chance.scope(6, "a"):
        assert draw() != inside


def test_a_scope_is_left_on_an_error():
    random.seed(1)
    expected = random.random()
    random.seed(1)
    try:
        with chance.scope(5):
            raise ValueError
    except ValueError:
        pass
    assert random.random() == expected


def test_python_and_numpy_draw_from_different_streams():
    """With the same seed they are the same generator, and erasing would depend on mixing."""
    pairs = []
    for key in range(300):
        with chance.scope(key):
            pairs.append((random.random(), np.random.rand()))
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.2
    with chance.scope(0):
        python = [random.random() for _ in range(5)]
        assert python != np.random.rand(5).tolist()
