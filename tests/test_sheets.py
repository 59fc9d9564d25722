"""support/show/sheets.py: which image stands where, in which colour its caption is, whatever the answers."""

import json

import numpy as np
import pytest
import torch
from fakes import COLOURS, answer, sample
from PIL import Image

import eval as evaluation
import reward
from support.learner.stage import Batch
from support.show import sheets


def reading_order(path, colours):
    """Line by line, left to right, as each colour's first pixel stands."""
    pixels = np.asarray(Image.open(path)) @ [2**16, 2**8, 1]
    corner = lambda colour: tuple(np.argwhere(pixels == np.dot(colour, [2**16, 2**8, 1]))[0])
    return sorted(colours, key=corner)


def has_colour(path, colour):
    return (np.asarray(Image.open(path)) == tuple(bytes.fromhex(colour[1:]))).all(-1).any()


@pytest.mark.parametrize("order", [[3, 1, 2], [2, 9, 4, 8, 1, 3, 6, 5, 7, 10], None])
def test_images_stand_in_the_predicted_order(tmp_path, order):
    shown = sample(*range(len(order or "abc")))
    text = "数\n\x00" + "[" * 100_000 if order is None else answer(*((i, i) for i in order))  # not valid: as given
    sheets.draw_predictions([shown], [evaluation.judge(shown, text)], tmp_path / "p.png")
    expected = [COLOURS[i - 1] for i in order or (1, 2, 3)]
    assert reading_order(tmp_path / "p.png", COLOURS[: len(expected)]) == expected


def test_a_caption_has_the_colour_of_what_its_value_earns(tmp_path, monkeypatch):
    """delta = 4: an error of 1 earns 1 - 1/16 = 0.94, one of 1.5 0.86, from 4 on nothing. The legend alone is drawn first."""
    write = lambda sheet, x, y, text, room, colour=sheets.INK, *_, **__: written.append((text, colour)) or x
    monkeypatch.setattr(sheets.Sheet, "write", write)

    def colour(said):
        written.clear()
        sheets.draw_predictions([sample(9)], [evaluation.judge(sample(9), answer((1, said)))], tmp_path / "p.png")
        return next(colour for text, colour in written if text.startswith("true 9  said"))

    written = []
    expected = {9: "GREEN", 10: "GREEN", 10.5: "ORANGE", 12.9: "ORANGE", 13: "RED", 1e308: "RED"}
    assert {said: colour(said) for said in expected} == {said: getattr(sheets, c) for said, c in expected.items()}
    # Whoever replaces the reward replaces it here too.
    monkeypatch.setattr(reward, "value_reward", lambda value, label, delta: 0.5)
    assert colour(9) == sheets.ORANGE


@pytest.mark.parametrize("n", [1, 10])
def test_a_group_shows_all_images_and_marks_the_mutated(tmp_path, n):
    shown, path = sample(*range(n)), tmp_path / "g.png"
    texts = [answer(*((i, 3) for i in range(1, n + 1))), answer(*((i, 4) for i in range(1, n + 1)))]
    rewards = [reward.compute_reward(text, shown.labels, 4) for text in texts]
    none = torch.zeros(2, 1)
    for mutated, advantages in (([False, True], [1.5, 0.0]), ([False, False], [0.0, -1.5])):
        batch = Batch([], none.long(), none.bool(), none, torch.tensor(mutated), torch.tensor([advantages]),
                      samples=[shown], texts=texts, rewards=rewards)  # fmt: skip
        sheets.draw_group(shown, sheets.describe_group(batch, 0)["answers"], "Step 0", path)
        assert len(reading_order(path, COLOURS[:n])) == n  # else one of them is not to be found
        found = [has_colour(path, colour) for colour in (sheets.ORANGE, sheets.GREEN, sheets.RED)]
        assert found == [any(mutated), advantages[0] > 0, advantages[1] < 0]
    assert sheets.short_answer("", None) == "not valid: "
    assert sheets.short_answer("...", [(i, i / 2) for i in range(1, 6)]).startswith("#1: 0.5  #2: 1  ")


def test_the_group_whose_rewards_differ_most_is_watched(tmp_path):
    samples = [sample(5, prefix="a"), sample(7, prefix="b")]
    texts = [answer((1, 5)), answer((1, 6)), answer((1, 7)), "prose"]
    rewards = [reward.compute_reward(text, samples[i // 2].labels, 4) for i, text in enumerate(texts)]
    none = torch.zeros(4, 1)
    batch = Batch([], none.long(), none.bool(), none, torch.tensor([True, False, False, True]),
                  torch.tensor([[1.0, -1.0], [0.5, -0.5]]), samples=samples, texts=texts, rewards=rewards)  # fmt: skip
    sheets.watch_group(tmp_path, 1, 7, batch)
    (line,) = map(json.loads, (tmp_path / "groups/groups.jsonl").read_text().splitlines())
    assert (line["stage"], line["step"], line["images"], line["labels"]) == (1, 7, ["b1"], [7])
    said = [(a["text"], a["advantage"], a["mutated"], a["format"]) for a in line["answers"]]
    assert said == [(texts[2], 0.5, False, 1), ("prose", -0.5, True, 0)]
    assert (tmp_path / "groups" / "1-0000007.png").exists()
