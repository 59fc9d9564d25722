"""The best constants by hand, and against trying every number."""

import doctest
import random

import pytest

import reward
from support.show import blind
from support.show.blind import best_constant


def earned(value, labels, delta):
    text = f'[{{"image_id": 1, "value": {value}}}]'
    return sum(reward.compute_reward(text, [label], delta).regression for label in labels) / len(labels)


def test_examples_in_docstrings():
    assert doctest.testmod(blind) == (0, 1)


@pytest.mark.parametrize(("delta", "decimals"), [(10, 0), (1, 2), (0.3, 1)])
def test_no_other_constant_earns_more_or_errs_less(delta, decimals):
    labels = [round(random.Random(seed).gammavariate(2, 3), 2) for seed in range(60)]
    by_reward, by_error = best_constant(labels, delta, decimals)
    tried = [i / 10 ** min(decimals, 1) for i in range(250)]
    assert earned(by_reward, labels, delta) >= max(earned(v, labels, delta) for v in tried) - 1e-9
    error = lambda value: sum(abs(value - label) for label in labels)
    assert error(by_error) <= 1.01 * min(map(error, tried))  # rounded


@pytest.mark.filterwarnings("error")
def test_labels_as_large_as_floats_go():
    assert best_constant([1e308, -1e308, 1e308], 4, 0) == (1e308, 1e308)
    assert best_constant([1e308, 1.2e308], 4, 0)[1] == 1.1e308
    assert best_constant([7], 4, 0) == (7, 7)
    assert best_constant([1.0, 1e9], 4, 3) == (1, 500000000.5)
