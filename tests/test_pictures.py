"""Pictures, looked at pixel by pixel: which image stands where, in which colour its caption is."""

import dataclasses
import json
import random
from functools import partial

import numpy as np
import pytest
from fakes import COLOURS, TASK, answer, sample, scripted_policy
from PIL import Image

import data
import eval as evaluation
from support.rank import Ranking
from support.show import pictures, watch


@pytest.fixture
def policy(monkeypatch):
    return scripted_policy(monkeypatch)


def reading_order(picture, colours):
    """The colours in the order in which their thumbnails stand: line by line, left to right."""
    pixels = np.asarray(picture)
    corners = []
    for c in colours:
        y, x = (pixels == c).all(-1).nonzero()
        assert len(y) == 128 * 64, "40 x 20 pixels, scaled to 128 wide with the aspect kept"
        corners.append((y.min(), x.min(), c))
    return [c for *_, c in sorted(corners)]


@pytest.mark.parametrize("order", [[3, 1, 2], [1], [2, 9, 4, 8, 1, 3, 6, 5, 7, 10]])
def test_picture_shows_the_predicted_order(policy, tmp_path, order):
    shown = sample(*range(len(order)))
    policy.said = {"s1": answer(*((i, i) for i in order))}
    _, predictions = evaluation.evaluate(policy, [shown])
    pictures.draw_predictions([shown], predictions, tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png")
    expected = [COLOURS[i - 1] for i in order]
    assert reading_order(picture, COLOURS[: len(order)]) == expected


def test_picture_shows_an_invalid_answers_images_as_given(policy, tmp_path):
    shown = sample(7, 3, 5)
    policy.said = {"s1": "数\n\x00" + "[" * 100_000}
    _, predictions = evaluation.evaluate(policy, [shown])
    pictures.draw_predictions([shown], predictions, tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png")
    assert reading_order(picture, COLOURS[:3]) == COLOURS[:3]


def test_picture_colours_a_caption_by_its_error(policy, tmp_path):
    # delta = 4. Errors 0 and 1 = delta / 4 are good, 1.5 and 3.9 fair, from 4 on poor.
    expected = {9: "GOOD", 10: "GOOD", 10.5: "FAIR", 12.9: "FAIR", 13: "POOR", 1e308: "POOR"}
    for said, colour in expected.items():
        policy.said = {"s1": answer((1, said))}
        _, predictions = evaluation.evaluate(policy, [sample(9)])
        pictures.draw_predictions([sample(9)], predictions, tmp_path / "p.png")
        pixels = np.asarray(Image.open(tmp_path / "p.png"))[100:]  # below title and legend
        for name in ("GOOD", "FAIR", "POOR"):
            rgb = tuple(bytes.fromhex(getattr(pictures, name)[1:]))
            assert (pixels == rgb).all(-1).any() == (name == colour), (said, name)


def test_picture_takes_rows_from_the_whole_list(policy, tmp_path):
    samples = [sample(n, prefix=f"{n}-") for n in range(9)]
    policy.said = {f"{n}-1": answer((1, n)) for n in range(9)}
    _, predictions = evaluation.evaluate(policy, samples)
    drawn = []
    for n, s in enumerate(samples):
        image = s.items[0].image
        item = data.Item(f"{n}-1", n, TASK, lambda n=n, image=image: drawn.append(n) or image())
        samples[n] = data.Sample((item,))
    pictures.draw_predictions(samples, predictions, tmp_path / "p.png", rows=3)
    assert drawn == [0, 4, 8]
    pictures.draw_predictions(samples[:2], predictions[:2], tmp_path / "p.png", rows=8)
    assert drawn == [0, 4, 8, 0, 1]
    pictures.draw_predictions([], [], tmp_path / "p.png")
    with pytest.raises(ValueError, match="2 samples but 1 predictions"):
        pictures.draw_predictions(samples[:2], predictions[:1], tmp_path / "p.png")


def test_before_and_after_show_each_policys_order(tmp_path):
    """Prompts of 2, 3 and 8 images: the first two share a line, the third has its own; two policies in each."""
    few, more, most = sample(5, 7, prefix="a"), sample(1, 2, 3, prefix="b"), sample(*range(8), prefix="c")
    samples = [data.Sample(tuple(dataclasses.replace(item, image=partial(Image.new, "RGB", (40, 20), (k, 9, 10 * i)))
               for i, item in enumerate(s.items, 1))) for k, s in enumerate((few, more, most), 1)]  # fmt: skip
    orders = {"base": [[1, 2], [3, 1, 2], [*range(1, 9)]], "stage 1": [[2, 1], None, [*range(8, 0, -1)]]}
    answers = {
        name: [
            evaluation.judge(s, "no list" if order is None else answer(*((i, 1) for i in order)))
            for s, order in zip(samples, some, strict=True)
        ]
        for name, some in orders.items()
    }
    pictures.draw_before_after(samples, answers, tmp_path / "b.png")
    pixels = np.asarray(Image.open(tmp_path / "b.png"))
    rows = {}  # y -> what stands there, as (prompt, image), from left to right
    for k, s in enumerate(samples, 1):
        for i in range(1, len(s.items) + 1):
            y, x = (pixels == (k, 9, 10 * i)).all(-1).nonzero()
            assert len(y) == 2 * 104 * 52  # once for each policy
            for top in sorted(set(y))[:1], sorted(set(y))[52:53]:
                rows.setdefault(top[0], []).append((x[y == top[0]].min(), (k, i)))
    seen = [[what for _, what in sorted(row)] for _, row in sorted(rows.items())]
    line = lambda k, order: [(k, i) for i in order]
    assert seen == [
        line(1, [1, 2]) + line(2, [3, 1, 2]),
        line(1, [2, 1]) + line(2, [1, 2, 3]),  # not valid: as given
        line(3, range(1, 9)),
        line(3, range(8, 0, -1)),
    ]


def test_before_and_after_are_read_from_the_predictions(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(watch, "draw_before_after", lambda samples, answers, path: shown.append((samples, answers)))
    samples = {n: [sample(*range(n), prefix=f"{n}-{k}-") for k in range(2)] for n in (1, 2)}
    prediction = lambda s, value: evaluation.judge(s, answer(*((i, value) for i in range(1, len(s.items) + 1))))
    for name, value in (("base", 3), ("stage1", 5)):
        lines = [json.dumps(prediction(s, value)) for some in samples.values() for s in some]
        (tmp_path / f"predictions_{name}.jsonl").write_text("\n".join(lines))
    watch.compare_policies(tmp_path, ["base", "stage 1", "stage 2"], samples)  # stage 2 has no answers yet
    (tmp_path / "predictions_base.jsonl").write_text("{")
    watch.compare_policies(tmp_path, ["base", "stage 1"], samples)
    (first, answers), (_, without_base) = shown
    assert first == [samples[1][0], samples[2][0]] and list(answers) == ["base", "stage 1"]
    assert [p["values"] for p in answers["stage 1"]] == [[5], [5, 5]] and list(without_base) == ["stage 1"]


@pytest.mark.parametrize(("count", "thumb"), [(1, 168), (10, 168), (33, 120), (130, 84)])
def test_sheet_shows_all_images_in_ranked_order(tmp_path, count, thumb):
    colours = [(i, 255 - i, 100) for i in range(count)]
    items = [data.Item(f"d/{i}", 0, TASK, lambda c=c: Image.new("RGB", (40, 20), c)) for i, c in enumerate(colours)]
    order = random.Random(0).sample(range(count), count)
    values = [None if i % 3 else 1e308 for i in range(count)]
    pictures.draw_ranking(items, Ranking(order, values, 0, 0), tmp_path / "r.png")
    pixels, corners = np.asarray(Image.open(tmp_path / "r.png")) @ [2**16, 2**8, 1], []
    assert pixels.shape[0] <= 1.2 * pixels.shape[1]
    for r, g, b in colours:
        y, x = (pixels == r * 2**16 + g * 2**8 + b).nonzero()
        assert len(y) == thumb * (thumb // 2), "40 x 20 pixels, the aspect kept, nothing written over it"
        corners.append((y.min(), x.min()))
    assert sorted(range(count), key=corners.__getitem__) == order


def test_a_sheet_holds_the_longest_images(tmp_path):
    shapes = [(1, 200), (200, 1), (1, 1), (2000, 10)]
    items = [data.Item("x", 0, TASK, lambda i=i: Image.new("RGB", shapes[i % 4], "red")) for i in range(121)]  # small
    pictures.draw_ranking(items, Ranking([*range(121)], [0.0] * 121, 0, 0), tmp_path / "r.png")
    red = (np.asarray(Image.open(tmp_path / "r.png")) == (255, 0, 0)).all(-1).sum()
    assert red == 31 * 84 + 30 * 84 + 30 * 84 * 84 + 30 * 84  # lines of one pixel, squares


def test_a_sheets_captions_stay_in_their_column(tmp_path):
    def draw(name):
        items = [data.Item(n, 0, TASK, lambda: Image.new("RGB", (20, 20), "red")) for n in ("a", name, "c")]
        pictures.draw_ranking(items, Ranking([0, 1, 2], [1.0] * 3, 0, 0), tmp_path / "r.png")
        return np.asarray(Image.open(tmp_path / "r.png"))

    name = "photo " * 30
    assert (draw(name + "1.jpg") != draw(name + "2.jpg")).any(), "of a long name the end is what tells it from the next"
    short, long = draw("b"), draw("x/" + "数b\n " * 60 + ".jpg")
    y, x = (short != long).any(-1).nonzero()
    left = pictures.MARGIN + 168 + 21  # of the second column
    assert len(x) and x.min() >= left - 1 and x.max() <= left + 168 and y.min() > 96 + 168  # 1: smooth edges
