"""Drawings as files: who is noisy, what is skewed, and that what is made once stays."""

from collections import Counter

import numpy as np

from experiments import drawn_labels
from support.datasets import load_dataset
from support.datasets.drawings import DRAWN_SIZE, load_drawn


def test_only_training_labels_are_noisy_and_the_drawings_are_those_of_dots(tmp_path, monkeypatch):
    few = {"train": 6, "val": 2, "test": 3}
    monkeypatch.setattr(drawn_labels, "DRAWN_SIZE", few)
    monkeypatch.setattr(drawn_labels, "load_drawn", lambda name, split: load_drawn(name, split)[: few[split]])
    folder = tmp_path / "dots-noise-8"
    drawn_labels.make(folder)
    for split, size in few.items():
        ours = load_dataset("csv", folder, split, {"delta": 4})
        theirs = load_drawn("dots", split)[:size]
        assert len(ours) == size and ours[0].task.decimals == 0
        assert all(np.array_equal(*map(np.asarray, (a.image(), b.image()))) for a, b in zip(ours, theirs, strict=True))
        same = [a.label == b.label for a, b in zip(ours, theirs, strict=True)]
        assert all(same) == (split != "train")
    (folder / "labels.csv").write_text("mine")
    drawn_labels.make(folder)
    assert (folder / "labels.csv").read_text() == "mine"


def test_noise_has_its_std_and_stays_within_the_labels():
    rows = [(item.label, label) for item, label in drawn_labels.rows_of("dots-noise-2", "train")]
    assert len(rows) == DRAWN_SIZE["train"] and {label for _, label in rows} == set(range(1, 21))
    inner = [label - true for true, label in rows if 7 <= true <= 14]  # far from the ends
    assert abs(np.mean(inner)) < 0.2 and 1.85 < np.std(inner) < 2.2


def test_skewed_labels_are_geometric_in_every_split_and_no_drawing_is_in_two():
    rows = {split: drawn_labels.rows_of("dots-skewed", split) for split in DRAWN_SIZE}
    assert {split: len(some) for split, some in rows.items()} == DRAWN_SIZE
    assert len({item.name for some in rows.values() for item, _ in some}) == sum(DRAWN_SIZE.values())
    for split, low, high in (("train", 0.7, 0.8), ("test", 0.6, 0.9)):
        count = Counter(label for _, label in rows[split])
        ratios = [count[y + 3] / count[y] for y in (1, 2, 3)]  # three steps down
        assert low < np.mean(ratios) ** (1 / 3) < high
    assert all(item.label == label for some in rows.values() for item, label in some)
