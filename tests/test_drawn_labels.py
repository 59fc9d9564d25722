"""Drawings as files: who is noisy, what is skewed, and that what is made once stays."""

from collections import Counter

import numpy as np
import pytest

from experiments import drawn_labels
from experiments.commands import CommandError
from support.datasets import load_dataset
from support.datasets.drawings import DRAWN_SIZE, load_drawn


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(drawn_labels, "DRAWN_SIZE", {"train": 6, "val": 2, "test": 3})
    monkeypatch.setattr(drawn_labels, "load_drawn", lambda name, split: load_drawn(name, split)[: drawn_labels.DRAWN_SIZE[split]])  # fmt: skip


def test_only_training_labels_are_noisy_and_the_drawings_are_those_of_dots(tmp_path, few):
    folder = tmp_path / "dots-noise-8"
    drawn_labels.command([str(folder)])
    for split in ("train", "val", "test"):
        ours = load_dataset("csv", folder, split, {"delta": 4})
        theirs = load_drawn("dots", split)[: len(ours)]
        assert len(ours) == drawn_labels.DRAWN_SIZE[split] and ours[0].task.decimals == 0
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(np.asarray(a.image()), np.asarray(b.image()))
        same = [a.label == b.label for a, b in zip(ours, theirs, strict=True)]
        assert all(same) == (split != "train")


def test_noise_has_its_std_and_stays_within_the_labels():
    rows = [(item.label, label) for item, label, split in drawn_labels.rows_of("dots-noise-2") if split == "train"]
    assert len(rows) == DRAWN_SIZE["train"] and {label for _, label in rows} == set(range(1, 21))
    inner = [label - true for true, label in rows if 7 <= true <= 14]  # far from the ends
    assert abs(np.mean(inner)) < 0.2 and 1.85 < np.std(inner) < 2.2
    assert rows == [(i.label, label) for i, label, split in drawn_labels.rows_of("dots-noise-2") if split == "train"]


def test_skewed_labels_are_geometric_in_every_split_and_no_drawing_is_in_two():
    rows = drawn_labels.rows_of("dots-skewed")
    assert len({item.name for item, *_ in rows}) == len(rows) == sum(DRAWN_SIZE.values())
    for split, low, high in (("train", 0.7, 0.8), ("test", 0.6, 0.9)):
        count = Counter(item.label for item, _, s in rows if s == split)
        ratios = [count[y + 3] / count[y] for y in (1, 2, 3)]  # three steps down
        assert low < np.mean(ratios) ** (1 / 3) < high
    assert all(item.label == label for item, label, _ in rows)


def test_what_is_there_is_left_and_a_name_that_says_nothing_is_refused(tmp_path, few):
    folder = tmp_path / "dots-skewed"
    folder.mkdir()
    (folder / "labels.csv").write_text("mine")
    drawn_labels.make(folder)
    assert (folder / "labels.csv").read_text() == "mine"
    for name in ("dots", "dots-noise-", "dots-noise-x", "dots-noise--1", "dials-noise-2"):
        with pytest.raises(CommandError, match="dots-noise-STD"):
            drawn_labels.make(tmp_path / name)
        assert not (tmp_path / name).exists()
