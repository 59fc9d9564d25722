"""Drawings as files, few dots being frequent."""

from collections import Counter

import numpy as np

from experiments import skewed_dots
from support.datasets import load_dataset
from support.datasets.drawings import DRAWN_SIZE


def test_files_are_the_drawings_with_their_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(skewed_dots, "DRAWN_SIZE", {"train": 6, "val": 2, "test": 3})
    skewed_dots.write(tmp_path / "dots")
    for split, size in skewed_dots.DRAWN_SIZE.items():
        ours, theirs = load_dataset("csv", tmp_path / "dots", split, {"delta": 4}), skewed_dots.skewed_items(split)
        assert len(ours) == size and ours[0].task.decimals == 0
        for a, b in zip(ours, theirs, strict=True):
            assert a.label == b.label and np.array_equal(*map(np.asarray, (a.image(), b.image())))


def test_labels_are_geometric_in_every_split_and_no_drawing_is_in_two():
    items = {split: skewed_dots.skewed_items(split) for split in DRAWN_SIZE}
    assert {split: len(some) for split, some in items.items()} == DRAWN_SIZE
    assert len({item.name for some in items.values() for item in some}) == sum(DRAWN_SIZE.values())
    for split, low, high in (("train", 0.7, 0.8), ("test", 0.6, 0.9)):
        count = Counter(item.label for item in items[split])
        ratios = [count[y + 3] / count[y] for y in (1, 2, 3)]  # three steps down
        assert low < np.mean(ratios) ** (1 / 3) < high
