"""Ranking: merged orders by hand and against scipy, with policies that are functions of the images' names."""

import math
import os
import random

import numpy as np
import pytest
from fakes import TASK, answer, talking_policy
from PIL import Image
from scipy import optimize, stats

import data
import eval as evaluation
from support.rank import (
    PLACE,
    Ranking,
    _strengths,
    asker,
    find_images,
    merge_rankings,
    rank_images,
    ranking_remarks,
    window_starts,
)


@pytest.fixture
def ranker(monkeypatch):
    return talking_policy(monkeypatch)


def test_merge_without_votes_is_the_order_by_values():
    assert merge_rankings([], []) == []
    assert merge_rankings([7], []) == [0]
    assert merge_rankings([3, 1.7e308, 3, -1.7e308], []) == [3, 0, 2, 1]  # equal values: by index
    # The known values 3, 1, 2 stand at +0.5, -0.5, 0 around their middle. Image 1 stands at 0 as well: then by index.
    assert merge_rankings([3, None, 1, 2], []) == [2, 1, 3, 0]
    assert merge_rankings([None, None], []) == [0, 1]


def test_merge_weighs_votes_against_values_by_hand():
    """Two images whose values stand D apart, v votes against them: strengths -d/2 and d/2 around their middle have

        loss  v log(1 + e^d) + (d - D)^2 / 4,    slope at d = 0:  v / 2 - D / 2,

    and the loss is convex: the votes win (d < 0) if v > D, the values if v < D. v = D is a tie, by value.
    """
    assert PLACE == 0.5
    cases = [
        (2, 1, "votes"),  # neighbours, D = 0.5
        (3, 1, "tie"),  # one image between them, D = 1
        (4, 1, "values"),  # two between, D = 1.5
        (4, 2, "votes"),
        (6, 2, "values"),  # D = 2.5
        (6, 3, "votes"),
    ]
    for n, votes, winner in cases:
        order = merge_rankings(list(range(n)), [[n - 1, 0]] * votes)
        assert (order.index(n - 1) < order.index(0)) == (winner == "votes"), (n, votes)
        between = [i for i in order if i not in (0, n - 1)]
        assert between == list(range(1, n - 1))
    # Of 41 images and more the ends stand 20 apart, not 0.5 x (n - 1): at n = 81 neighbours are 20 / 81 apart, D of the
    # images 0 and 4 is 0.99, and one vote turns them round. With places 0.5 apart D were 2.
    order = merge_rankings(list(range(81)), [[4, 0]])
    assert order.index(4) < order.index(0)


def test_merge_by_majority_and_across_pairs_that_never_met():
    assert merge_rankings([1, 1], [[1, 0], [0, 1], [1, 0]]) == [1, 0]
    assert merge_rankings([1, 1], [[1, 0], [0, 1]]) == [0, 1]  # a tie, equal values: by index
    assert merge_rankings([2, 1], [[1, 0], [0, 1]]) == [1, 0]  # a tie: by value
    nothing = [None] * 4
    assert merge_rankings(nothing, [[2, 0], [0, 3], [3, 1]]) == [2, 0, 3, 1]  # a chain
    assert merge_rankings(nothing[:3], [[0, 1], [1, 2], [2, 0]]) == [0, 1, 2]  # a circle: all tied
    # An image without a value goes where its votes put it, beyond the highest or below the lowest.
    assert merge_rankings([1, 2, 3, 4, None], [[3, 4]]) == [0, 1, 2, 3, 4]
    assert merge_rankings([1, 2, 3, 4, None], [[4, 0]]) == [4, 0, 1, 2, 3]
    # The highest of 40 stands at 0.5 x 19.5 = 9.75. There the prior pulls a newcomer down by 0.01 x 9.75, less than the
    # 0.5 by which one vote pushes it up. At a precision of 1 it would stay near the middle.
    assert merge_rankings([*range(40), None], [[39, 40]])[-2:] == [39, 40]
    # Images 0 and 1 share a value and never met. Image 0 stood above image 3, image 1 below image 2.
    assert merge_rankings([5, 5, 4, 6], [[3, 0], [1, 2]]) == [1, 2, 3, 0]


@pytest.mark.parametrize("n", [2, 7, 60])
def test_strengths_minimise_what_they_say(n):
    """Against scipy's general minimiser, gradient by differences: far from what Newton's method computes."""
    rng = np.random.default_rng(n)
    wins = rng.integers(0, 3, (n, n)) * (rng.random((n, n)) < 3 / n)
    np.fill_diagonal(wins, 0)
    wins[0, 1] += 50  # a full Newton step from the prior overshoots here
    prior, precision = 5 * rng.standard_normal(n), rng.choice([0.01, 1.0], n)

    def loss(s):
        votes = sum(wins[i, j] * np.logaddexp(0, s[i] - s[j]) for i, j in zip(*wins.nonzero(), strict=True))
        return votes + sum(precision * (s - prior) ** 2) / 2

    ours = _strengths(wins, prior, precision)
    theirs = optimize.minimize(loss, prior, method="L-BFGS-B", options=dict(maxfun=10**6, maxiter=10**5, ftol=1e-15))
    assert loss(ours) <= theirs.fun + 1e-9
    assert ours == pytest.approx(theirs.x, abs=2e-2)  # flat where the precision is 0.01


@pytest.mark.parametrize("window", [2, 3, 4, 5, 8])
def test_windows_hold_every_image_and_overlap_by_half(window):
    for n in range(1, 40):
        for r in range(3):
            starts = window_starts(n, window, r)
            shown = [set(range(start, min(start + window, n))) for start in starts]
            assert set.union(*shown) == set(range(n)) and all(len(images) == min(window, n) for images in shown)
            assert all(len(a & b) >= window // 2 for a, b in zip(shown, shown[1:], strict=False)), (n, starts)
            assert len(starts) <= 2 * n / window + 2  # linear: each image about twice
    assert window_starts(12, 8, 0) == [0, 4] and window_starts(12, 8, 1) == [0, 2, 4]


def images(count):
    return [data.Item(f"{i}", math.nan, TASK, lambda: None) for i in range(count)]


def listing(names, score):
    """An answer in the order of the scores: image ids as the prompt numbers them, values that say nothing."""
    return answer(*((i, 0) for i in sorted(range(1, len(names) + 1), key=lambda i: score(names[i - 1]))))


def test_windows_find_the_exact_order_that_coarse_values_leave_open(ranker):
    # 30 images with the labels 0..29. The values know them in fives, the windows exactly.
    labels = random.Random(0).sample(range(30), 30)
    label = lambda name: labels[int(name)]
    ranker.say = lambda names: listing(names, label) if len(names) > 1 else answer((1, label(names[0]) // 5))
    ranking = rank_images(asker(evaluation.answer_greedily, ranker, 8), images(30), window=4, rounds=2)
    assert [labels[i] for i in ranking.order] == list(range(30))
    assert ranking.values == [x // 5 for x in labels]
    alone = rank_images(asker(evaluation.answer_greedily, ranker, 16), images(30), rounds=0)
    assert stats.kendalltau([labels[i] for i in alone.order], range(30)).statistic < 0.95
    assert (alone.windows, alone.invalid) == (0, 0)


def test_questions_are_few_shuffled_and_the_same_each_time(ranker):
    ranker.say = lambda names: answer(*((i, int(name)) for i, name in enumerate(names, 1)))  # as numbered in the prompt
    first = rank_images(asker(evaluation.answer_greedily, ranker, 16), images(40), window=4, rounds=2)
    asked = list(ranker.prompts)
    singles, windows = asked[:40], asked[40:]
    assert singles == [[f"{i}"] for i in range(40)]
    assert first.windows == len(windows) == 19 + 20 and {len(names) for names in windows} == {4}
    assert ranker.batches == [16, 16, 8] + [16, 3] + [16, 4]
    # This policy favours the first image always. It should not find the order of the values that it is shown.
    rising = sum(int(a) < int(b) for names in windows for a, b in zip(names, names[1:], strict=False))
    assert 0.35 < rising / (3 * len(windows)) < 0.65
    assert rank_images(asker(evaluation.answer_greedily, ranker, 40), images(40), window=4, rounds=2) == first
    assert ranker.prompts[len(asked) :] == asked
    # Room for five digits, whatever the label: [{"image_id": 1, "value": 99999}] and four of these in a list.
    assert set(ranker.tokens) == {33, 4 * 33}


def test_few_images_make_one_window_and_one_makes_none(ranker):
    ranker.say = lambda names: listing(names, lambda name: -int(name)) if len(names) > 1 else answer((1, 5))
    ranking = rank_images(asker(evaluation.answer_greedily, ranker, 16), images(3), window=4, rounds=2)
    assert ranking == ([2, 1, 0], [5, 5, 5], 2, 0)
    assert [sorted(names) for names in ranker.prompts[3:]] == [["0", "1", "2"]] * 2
    assert rank_images(asker(evaluation.answer_greedily, ranker, 16), images(1)) == ([0], [5], 0, 0)


def test_invalid_answers_are_counted_and_their_images_placed_by_votes(ranker):
    def say(names):
        if len(names) == 1:
            return "no idea" if int(names[0]) % 4 == 0 else answer((1, int(names[0])))
        return "[]" if "7" in names else listing(names, int)  # whoever sees image 7 is lost

    ranker.say = say
    ranking = rank_images(asker(evaluation.answer_greedily, ranker, 16), images(12), window=4, rounds=3)
    assert ranking.values == [None, 1, 2, 3, None, 5, 6, 7, None, 9, 10, 11]
    assert ranking.invalid == sum("7" in names for names in ranker.prompts[12:]) > 0
    assert ranking.windows == len(ranker.prompts) - 12
    # 0 and 4 and 8 began in the middle, beside 6.
    assert merge_rankings(ranking.values, [])[4:8] == [0, 4, 6, 8]
    assert stats.kendalltau(ranking.order, range(12)).statistic > 0.9

    ranker.say = lambda names: "no idea"
    assert rank_images(asker(evaluation.answer_greedily, ranker, 16), images(5), rounds=1) == (
        [0, 1, 2, 3, 4],
        [None] * 5,
        2,
        2,
    )


def remarks_on(values):
    return " / ".join(ranking_remarks(Ranking([*range(len(values))], values, 4, 0)))


def test_a_ranking_says_that_its_values_are_alike():
    assert remarks_on([1, 2, 3]) == ""
    assert remarks_on([5.0]) == "", "one image is like itself"
    assert "4 of 4 values are 1: this policy" in remarks_on([1.0] * 4)
    # Nine of ten, and eight of ten.
    assert "9 of 10 values are 1: " in remarks_on([1] * 9 + [2])
    assert remarks_on([1] * 8 + [2, 3]) == ""
    # What was not valid is no value.
    said = remarks_on([7, None, 7, None])
    assert "2 of 4 images have no valid value" in said and "2 of 2 values are 7" in said
    assert remarks_on([None, None, 3]).count("/") == 0


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(data.DataError, match="no file or folder"):
        find_images([str(tmp_path / "pipe.png")])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert find_images([str(tmp_path)]) == [tmp_path / "a.png"], "a pipe in a folder is passed over"
