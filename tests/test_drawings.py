"""Drawn data: labels are what the drawing shows, and no split shares an image."""

import hashlib
import random

import numpy as np
import pytest

from support.datasets import drawings, load_dataset


@pytest.mark.parametrize("name", ["dots", "dials"])
def test_splits_share_no_image_and_labels_are_the_drawings(name):
    draw = {"dots": drawings.draw_dots, "dials": drawings.draw_dials}[name]
    hashes = {}
    for split in ("train", "val", "test"):
        items = load_dataset(name, None, split)
        hashes[split] = [hashlib.sha256(i.image().tobytes()).digest() for i in items[:300]]
        assert len(set(hashes[split])) == len(hashes[split])
        assert all(draw(random.Random(i.name))[1] == i.label for i in items[:300])
        assert items[0].image().tobytes() == items[0].image().tobytes()
        labels = {i.label for i in items}
        assert labels == set(range(1 if name == "dots" else 0, 21))
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(hashes[a]) & set(hashes[b])


def test_dots_can_be_counted():
    """A second way to the label: connected blobs that stand out from the background, which the corner shows."""
    from scipy import ndimage

    found, drawn = [], []
    for i in range(30):
        image, count = drawings.draw_dots(random.Random(f"blobs {i}"))
        pixels = np.asarray(image, dtype=int)
        found.append(ndimage.label(np.abs(pixels - pixels[0, 0]).max(-1) > 25)[1])
        drawn.append(count)
    assert found == drawn
    assert len(set(drawn)) > 10
