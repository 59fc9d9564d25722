"""support/show/group_sheet.py: one group of answers as a picture, whatever the answers and however many the images."""

import numpy as np
import pytest
from fakes import COLOURS, answer, sample
from PIL import Image

import reward
from support.show import group_sheet


@pytest.mark.parametrize("n", [1, 3, 10])
def test_all_images_and_answers_are_there_and_the_mutated_is_marked(tmp_path, n):
    shown = sample(*range(n))
    texts = [answer(*((i, 3) for i in range(1, n + 1))), "prose", answer((1, 1))]
    rewards = [reward.compute_reward(text, shown.labels, 4) for text in texts]

    def draw(mutated, advantages=(1.5, 0.0, -0.75)):
        group_sheet.draw_group(shown, texts, rewards, advantages, mutated, "Step 0", tmp_path / "g.png")
        return np.asarray(Image.open(tmp_path / "g.png"))

    pixels = draw([False, True, False])
    for colour in COLOURS[:n]:
        assert (pixels == colour).all(-1).sum() == 128 * 64  # 40 x 20, scaled, nothing written over it
    rgb = lambda name: tuple(bytes.fromhex(getattr(group_sheet, name)[1:]))
    table = pixels.shape[0] - group_sheet.ROW * 3 - group_sheet.MARGIN  # its first row
    marked = (pixels == rgb("FAIR")).all(-1).nonzero()[0]
    assert (
        table + group_sheet.ROW - 4 < marked.min() and marked.max() < table + 2 * group_sheet.ROW - 4
    )  # the second row
    assert not (draw([False] * 3) == rgb("FAIR")).all(-1).any()
    bars = [
        (pixels[:, group_sheet.BAR - 110 :] == rgb(name)).all(-1).sum(0).astype(bool).sum() for name in ("GOOD", "POOR")
    ]
    assert bars[0] == pytest.approx(2 * bars[1], abs=3)  # an advantage of 1.5 has twice the bar of -0.75


def test_short_answers():
    assert group_sheet.short_answer("", None) == "not valid: "
    assert group_sheet.short_answer("...", [(i, i / 2) for i in range(1, 6)]).startswith("#1: 0.5  #2: 1  ")
