"""Even drawing: weights by hand, the cap, and what it takes from the best constant."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
from small_data import item

import data
import reward
from support.datasets import drawings
from support.datasets.balance import even_weights, task_weights


def geometric_items(number):
    """Labels 1, 2, ... of which 60 % are 1 to 3, as counts of things in photographs are."""
    rng = random.Random(0)
    return [item(str(i), min(20, 1 + int(rng.expovariate(0.305)))) for i in range(number)]


def test_even_weights_by_hand():
    """Labels 1, 1, 1, 9 at delta 4: saying 1 earns 3/4, saying 9 earns 1/4. 1 / that is 4/3, 4/3, 4/3, 4, whose mean is 2."""
    assert even_weights([1, 9, 1, 1], delta=4) == pytest.approx([2 / 3, 2, 2 / 3, 2 / 3])
    # 1 and 3 at delta 4 earn for each other 1 - (2 / 4)^2 = 3/4: both earn (1 + 3/4) / 2, so they weigh the same.
    assert even_weights([1, 3], delta=4) == pytest.approx([1, 1])
    # The cap: 9 would weigh 1000 times what 1 does. It gets 4, the 999 ones share the rest, (1000 - 4) / 999 each.
    assert even_weights([*[1] * 999, 9], delta=4) == pytest.approx([*[996 / 999] * 999, 4])
    # More labels than bins: as with few, within a bin's width.
    labels = np.random.default_rng(0).gamma(2, 3, 3000)
    few = dict(zip(labels.round(1), even_weights(labels.round(1), delta=2), strict=True))
    many = even_weights(labels, delta=2)
    assert many == pytest.approx([few[label] for label in labels.round(1)], rel=0.1)


def test_drawing_evenly_takes_the_reward_from_the_best_constant():
    """Weighted by hand: what the best constant earns among the drawn labels, and that no item is drawn all the time."""
    items = geometric_items(3000)
    earned = {}
    for balance in (False, True):
        weights = {drawings.DOTS: even_weights([i.label for i in items], 4)} if balance else None
        sampler = data.Sampler(items, (1,), 64, seed=0, weights=weights)
        drawn = [s.items[0] for step in range(60) for s in sampler.batch(step)]
        labels = np.array([i.label for i in drawn])
        earned[balance] = max(np.maximum(0, 1 - ((value - labels) / 4) ** 2).mean() for value in range(1, 21))
        assert max(Counter(i.name for i in drawn).values()) <= 20  # 3840 draws of 3000 items, 4 times the average
    assert earned[False] > 0.65 and earned[True] < 0.5


def test_another_reward_draws_otherwise(monkeypatch):
    """Where nothing but the exact label earns, 1 in 4 and 3 in 4 of the labels weigh 4 and 4/3 (mean 2)."""
    monkeypatch.setattr(reward, "value_reward", lambda value, label, delta: float(value == label))
    assert even_weights([2, 1, 1, 1], delta=4) == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])


def test_items_of_files_are_drawn_evenly_and_purely(tmp_path):
    assert task_weights(geometric_items(30)) is None  # drawn ones
    items = [dataclasses.replace(i, path=tmp_path / i.name) for i in geometric_items(300)]
    weights = task_weights(items)
    for images in ((1,), (2, 8)):
        sampler, again = (data.Sampler(items, images, 6, 3, weights) for _ in range(2))
        plain = data.Sampler(items, images, 6, 3)
        batches = [sampler.batch(step) for step in range(5)]
        assert [again.batch(step) for step in reversed(range(5))] == batches[::-1]
        assert batches != [plain.batch(step) for step in range(5)]
        for sample in (s for batch in batches for s in batch):
            assert len({i.name for i in sample.items}) == len(set(sample.labels)) == len(sample.items)
    # All 8 items of a task, some of which are hardly ever drawn.
    few = [dataclasses.replace(item(str(i), 1 + i // 7), path=tmp_path) for i in range(8)]
    drawn = data.Sampler(few, (8,), 200, 0, task_weights(few)).batch(0)
    assert {len({i.name for i in s.items}) for s in drawn} == {8}
