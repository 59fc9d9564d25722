"""Metrics against scipy and by hand; loop, files and pictures with policies that are dictionaries or functions."""

import doctest
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import optimize, stats

import data
import eval as evaluation
import rarl

TASK = data.Task("dots", "How many?", "from the fewest to the most", delta=4)
COLOURS = [(25 * i, 0, 250 - 25 * i) for i in range(10)]  # one for each image of a sample


def sample(*labels, prefix="s"):
    """Image i of a sample is one solid colour and 40 x 20 pixels."""
    items = [
        data.Item(f"{prefix}{i}", label, TASK, lambda c=c: Image.new("RGB", (40, 20), c))
        for i, (label, c) in enumerate(zip(labels, COLOURS, strict=False), 1)
    ]
    return data.Sample(tuple(items))


def answer(*pairs):
    return json.dumps([{"image_id": i, "value": value} for i, value in pairs])


@pytest.fixture
def policy(monkeypatch):
    """A policy that says `said[name of image 1]`; `calls` records (names, max_new_tokens) of every batch."""
    fake = SimpleNamespace(said={}, calls=[])

    def generate(policy, prompts, group_size, max_new_tokens, temperature, generator):
        assert (group_size, temperature, generator) == (1, 0.0, None) and not torch.is_grad_enabled()
        fake.calls.append((prompts, max_new_tokens))
        return SimpleNamespace(ids=prompts, mask=None)

    monkeypatch.setattr(data, "make_prompts", lambda policy, samples: [s.items[0].name for s in samples])
    monkeypatch.setattr(data, "answer_budget", lambda policy, samples: 100 + len(samples))
    monkeypatch.setattr(rarl, "generate", generate)
    monkeypatch.setattr(rarl, "decode", lambda policy, ids, mask: [fake.said[name] for name in ids])
    return fake


# --- metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])  # nearly all tied, nearly none
@pytest.mark.parametrize("size", [2, 3, 50, 3000])  # 3000: several chunks of tau_b
def test_correlations_equal_scipys(levels, size):
    rng = np.random.default_rng(levels + size)
    labels = rng.integers(0, levels, size) / 4
    values = labels + rng.integers(0, levels, size)
    labels[:2], values[:2] = (0, 1), (1, 3)  # never constant
    for ours, theirs in (
        (evaluation.srcc, stats.spearmanr),
        (evaluation.plcc, stats.pearsonr),
        (evaluation.tau_b, stats.kendalltau),
    ):
        assert ours(values, labels) == pytest.approx(theirs(values, labels).statistic, abs=1e-12)
        assert ours(-values, labels) == pytest.approx(-ours(values, labels), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_correlations_are_nan_where_they_are_undefined():
    for metric in (evaluation.srcc, evaluation.plcc, evaluation.tau_b):
        for values, labels in (([], []), ([1], [1]), ([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3)):
            assert math.isnan(metric(values, labels))
        assert math.isnan(metric([1, math.nan, 3], [1, 2, 3]))
        with pytest.raises(ValueError, match="equally long"):
            metric([1, 2, 3], [1])


@pytest.mark.filterwarnings("error")
def test_the_largest_numbers_that_a_policy_can_write_do_no_harm():
    values, labels = [1.7e308, -1.7e308, 1.7e308], [3, 1, 2]
    # Ranks of the values: 2.5, 1, 2.5; of the labels: 3, 1, 2.
    assert evaluation.srcc(values, labels) == pytest.approx(stats.spearmanr([2.5, 1, 2.5], labels).statistic)
    assert evaluation.tau_b(values, labels) == pytest.approx(2 / math.sqrt(2 * 3))  # 2 agree, 1 is tied
    assert evaluation.plcc(values, labels) == pytest.approx(stats.pearsonr([1, -1, 1], labels).statistic)
    assert evaluation.mae(values, labels) == math.inf
    assert evaluation.accuracy(values, labels, 2) == 0


def test_mae_and_accuracy_by_hand():
    assert evaluation.mae([1, 5, 2.5], [2, 3, 2.5]) == 1  # (1 + 2 + 0) / 3
    # Whole numbers: 2.4 -> 2 and 6.6 -> 7 hit, 3.6 -> 4 misses 3.
    assert evaluation.accuracy([2.4, 6.6, 3.6], [2, 7, 3]) == pytest.approx(2 / 3)
    # One decimal for the first pair, none for the second: 2.4 is not 2.0, and 6.6 is 7.
    assert evaluation.accuracy([2.4, 6.6], [2, 7], [1, 0]) == 0.5
    assert evaluation.accuracy([5.43], [5.4321], 2) == 1  # labels are rounded as well
    assert math.isnan(evaluation.mae([], [])) and math.isnan(evaluation.accuracy([], []))


# --- summary and loop ---------------------------------------------------------------------------------------


def test_summary_by_hand(policy):
    samples = [
        sample(7, 3, 5, prefix="a"),
        sample(4, 9, prefix="b"),
        sample(6, 6, prefix="c"),
        sample(2, 8, prefix="d"),
    ]
    policy.said = {
        # Listed 2, 1, 3 = labels 3, 7, 5. Of 3 pairs 2 rise: tau = (2 - 1) / 3. Values: 8, 3, 5.
        "a1": answer((2, 3), (1, 8), (3, 5)),
        # Listed 2, 1 = labels 9, 4: tau = -1, although the values, 4.4 and 9, rise rightly. Not strict.
        "b1": "The list is " + answer((2, 9), (1, 4.4)),
        # Equal labels: no pair to compare, so no tau. Values 6, 2.
        "c1": answer((2, 2), (1, 6)),
        # No value for image 2: invalid, and 100 must show up nowhere.
        "d1": answer((1, 100)),
    }
    metrics, predictions = evaluation.evaluate(policy, samples)
    values, labels = [8, 3, 5, 4.4, 9, 6, 2], [7, 3, 5, 4, 9, 6, 6]
    assert metrics == {
        "n": 4,
        "valid": 3 / 4,
        "strict": 2 / 4,
        "mae": pytest.approx((1 + 0 + 0 + 0.4 + 0 + 0 + 4) / 7),
        "accuracy": pytest.approx(5 / 7),  # all but 8 and 2: 4.4 rounds to 4
        "srcc": pytest.approx(stats.spearmanr(values, labels).statistic),
        "plcc": pytest.approx(stats.pearsonr(values, labels).statistic),
        "tau": pytest.approx((1 / 3 - 1) / 2),
        "tau_b": pytest.approx(stats.kendalltau(values, labels).statistic),
    }
    assert predictions[0] == {
        "items": ["a1", "a2", "a3"],
        "task": "dots",
        "decimals": 0,
        "labels": [7, 3, 5],
        "text": policy.said["a1"],
        "order": [2, 1, 3],
        "values": [8, 3, 5],
    }
    assert predictions[3]["order"] is predictions[3]["values"] is None
    assert evaluation.summarize(predictions) == metrics


def test_summary_without_any_valid_answer_is_nan_but_for_the_shares(policy):
    policy.said = {"s1": "no idea"}
    metrics, _ = evaluation.evaluate(policy, [sample(1, 2)])
    assert (metrics.pop("n"), metrics.pop("valid"), metrics.pop("strict")) == (1, 0, 0)
    assert all(math.isnan(x) for x in metrics.values())
    metrics, predictions = evaluation.evaluate(policy, [])
    assert predictions == [] and metrics["n"] == 0 and math.isnan(metrics["valid"])


def test_batches_are_sorted_by_number_of_images_and_the_order_is_restored(policy):
    sizes = [4, 1, 2, 1, 2]
    samples = [sample(*range(n), prefix=f"{place}-") for place, n in enumerate(sizes)]
    policy.said = {s.items[0].name: answer(*((i, 10 * place + i) for i in range(1, n + 1)))
                   for place, (s, n) in enumerate(zip(samples, sizes, strict=True))}  # fmt: skip
    metrics, predictions = evaluation.evaluate(policy, samples, batch_size=2)
    assert [p["items"][0] for p in predictions] == ["0-1", "1-1", "2-1", "3-1", "4-1"]
    assert [p["values"][0] for p in predictions] == [1, 11, 21, 31, 41]
    # One budget, of all five samples, for all batches.
    assert policy.calls == [(["1-1", "3-1"], 105), (["2-1", "4-1"], 105), (["0-1"], 105)]
    assert evaluation.evaluate(policy, samples, batch_size=5, max_new_tokens=7) == (metrics, predictions)
    assert policy.calls[3:] == [(["1-1", "3-1", "2-1", "4-1", "0-1"], 7)]


# --- files --------------------------------------------------------------------------------------------------


def test_json_lines_round_trip(policy, tmp_path):
    policy.said = {"a1": 'twee\n"regels" \u2028 数 ' + answer((1, 5)), "b1": "nothing"}
    _, predictions = evaluation.evaluate(policy, [sample(5, prefix="a"), sample(6, 7, prefix="b")])
    predictions[1]["labels"] = [math.nan, 7.0]
    evaluation.write_predictions(predictions, tmp_path / "p.jsonl")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    back = [json.loads(line, parse_constant=refuse) for line in lines]
    assert back == [predictions[0], predictions[1] | {"labels": [None, 7.0]}]
    assert math.isnan(predictions[1]["labels"][0])  # what is written is a copy


def test_table_is_aligned_and_shows_what_is_undefined():
    metrics = evaluation.summarize([]) | {"n": 12, "mae": 3.81, "tau": -0.5, "valid": 1e300}
    head, one, eight = evaluation.format_table([{"1 image": metrics}, {"8 images": metrics}]).splitlines()
    assert head.split() == list(evaluation.TABLE)
    assert one.split() == ["1", "image", "12", "1.0e+300", "-", "3.810", "-", "-", "-", "-0.500", "-"]
    assert len(head) == len(one) == len(eight)
    for name, cell in (("n", "12"), ("mae", "3.810"), ("tau", "-0.500")):
        end = head.index(f" {name}  ") + 1 + len(name)
        assert one[:end].endswith(cell) and eight[:end].endswith(cell)


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
    evaluation.draw_predictions([shown], predictions, tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png")
    expected = [COLOURS[i - 1] for i in order]
    assert reading_order(picture, COLOURS[: len(order)]) == expected


def test_picture_shows_an_invalid_answers_images_as_given(policy, tmp_path):
    shown = sample(7, 3, 5)
    policy.said = {"s1": "数\n\x00" + "[" * 100_000}
    _, predictions = evaluation.evaluate(policy, [shown])
    evaluation.draw_predictions([shown], predictions, tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png")
    assert reading_order(picture, COLOURS[:3]) == COLOURS[:3]


def test_picture_colours_a_caption_by_its_error(policy, tmp_path):
    # delta = 4. Errors 0 and 1 = delta / 4 are good, 1.5 and 3.9 fair, from 4 on poor.
    expected = {9: "GOOD", 10: "GOOD", 10.5: "FAIR", 12.9: "FAIR", 13: "POOR", 1e308: "POOR"}
    for said, colour in expected.items():
        policy.said = {"s1": answer((1, said))}
        _, predictions = evaluation.evaluate(policy, [sample(9)])
        evaluation.draw_predictions([sample(9)], predictions, tmp_path / "p.png")
        pixels = np.asarray(Image.open(tmp_path / "p.png"))[100:]  # below title and legend
        for name in ("GOOD", "FAIR", "POOR"):
            rgb = tuple(bytes.fromhex(getattr(evaluation, name)[1:]))
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
    evaluation.draw_predictions(samples, predictions, tmp_path / "p.png", rows=3)
    assert drawn == [0, 4, 8]
    evaluation.draw_predictions(samples[:2], predictions[:2], tmp_path / "p.png", rows=8)
    assert drawn == [0, 4, 8, 0, 1]
    evaluation.draw_predictions([], [], tmp_path / "p.png")
    with pytest.raises(ValueError, match="2 samples but 1 predictions"):
        evaluation.draw_predictions(samples[:2], predictions[:1], tmp_path / "p.png")


# --- ranking ------------------------------------------------------------------------------------------------


def test_examples_in_docstrings():
    result = doctest.testmod(evaluation)
    assert result.attempted >= 2 and result.failed == 0


def test_merge_without_votes_is_the_order_by_values():
    assert evaluation.merge_rankings([], []) == []
    assert evaluation.merge_rankings([7], []) == [0]
    assert evaluation.merge_rankings([3, 1.7e308, 3, -1.7e308], []) == [3, 0, 2, 1]  # equal values: by index
    # The known values 3, 1, 2 stand at +0.5, -0.5, 0 around their middle. Image 1 stands at 0 as well: then by index.
    assert evaluation.merge_rankings([3, None, 1, 2], []) == [2, 1, 3, 0]
    assert evaluation.merge_rankings([None, None], []) == [0, 1]


def test_merge_weighs_votes_against_values_by_hand():
    """Two images whose values stand D apart, v votes against them: strengths -d/2 and d/2 around their middle have

        loss  v log(1 + e^d) + (d - D)^2 / 4,    slope at d = 0:  v / 2 - D / 2,

    and the loss is convex: the votes win (d < 0) if v > D, the values if v < D. v = D is a tie, by value.
    """
    assert evaluation.PLACE == 0.5
    cases = [
        (2, 1, "votes"),  # neighbours, D = 0.5
        (3, 1, "tie"),  # one image between them, D = 1
        (4, 1, "values"),  # two between, D = 1.5
        (4, 2, "votes"),
        (6, 2, "values"),  # D = 2.5
        (6, 3, "votes"),
    ]
    for n, votes, winner in cases:
        order = evaluation.merge_rankings(list(range(n)), [[n - 1, 0]] * votes)
        assert (order.index(n - 1) < order.index(0)) == (winner == "votes"), (n, votes)
        between = [i for i in order if i not in (0, n - 1)]
        assert between == list(range(1, n - 1))
    # Of 41 images and more the ends stand 20 apart, not 0.5 x (n - 1): at n = 81 neighbours are 20 / 81 apart, D of the
    # images 0 and 4 is 0.99, and one vote turns them round. With places 0.5 apart D were 2.
    order = evaluation.merge_rankings(list(range(81)), [[4, 0]])
    assert order.index(4) < order.index(0)


def test_merge_by_majority_and_across_pairs_that_never_met():
    assert evaluation.merge_rankings([1, 1], [[1, 0], [0, 1], [1, 0]]) == [1, 0]
    assert evaluation.merge_rankings([1, 1], [[1, 0], [0, 1]]) == [0, 1]  # a tie, equal values: by index
    assert evaluation.merge_rankings([2, 1], [[1, 0], [0, 1]]) == [1, 0]  # a tie: by value
    nothing = [None] * 4
    assert evaluation.merge_rankings(nothing, [[2, 0], [0, 3], [3, 1]]) == [2, 0, 3, 1]  # a chain
    assert evaluation.merge_rankings(nothing[:3], [[0, 1], [1, 2], [2, 0]]) == [0, 1, 2]  # a circle: all tied
    # An image without a value goes where its votes put it, beyond the highest or below the lowest.
    assert evaluation.merge_rankings([1, 2, 3, 4, None], [[3, 4]]) == [0, 1, 2, 3, 4]
    assert evaluation.merge_rankings([1, 2, 3, 4, None], [[4, 0]]) == [4, 0, 1, 2, 3]
    # The highest of 40 stands at 0.5 x 19.5 = 9.75. There the prior pulls a newcomer down by 0.01 x 9.75, less than the
    # 0.5 by which one vote pushes it up. At a precision of 1 it would stay near the middle.
    assert evaluation.merge_rankings([*range(40), None], [[39, 40]])[-2:] == [39, 40]
    # Images 0 and 1 share a value and never met. Image 0 stood above image 3, image 1 below image 2.
    assert evaluation.merge_rankings([5, 5, 4, 6], [[3, 0], [1, 2]]) == [1, 2, 3, 0]


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

    ours = evaluation._strengths(wins, prior, precision)
    theirs = optimize.minimize(loss, prior, method="L-BFGS-B", options=dict(maxfun=10**6, maxiter=10**5, ftol=1e-15))
    assert loss(ours) <= theirs.fun + 1e-9
    assert ours == pytest.approx(theirs.x, abs=2e-2)  # flat where the precision is 0.01


@pytest.mark.parametrize("window", [2, 3, 4, 5, 8])
def test_windows_hold_every_image_and_overlap_by_half(window):
    for n in range(1, 40):
        for r in range(3):
            starts = evaluation.window_starts(n, window, r)
            shown = [set(range(start, min(start + window, n))) for start in starts]
            assert set.union(*shown) == set(range(n)) and all(len(images) == min(window, n) for images in shown)
            assert all(len(a & b) >= window // 2 for a, b in zip(shown, shown[1:], strict=False)), (n, starts)
            assert len(starts) <= 2 * n / window + 2  # linear: each image about twice
    assert evaluation.window_starts(12, 8, 0) == [0, 4] and evaluation.window_starts(12, 8, 1) == [0, 2, 4]


def images(count):
    return [data.Item(f"{i}", math.nan, TASK, lambda: None) for i in range(count)]


@pytest.fixture
def ranker(monkeypatch):
    """A policy that answers a prompt by calling `ranker.say(names)`. `prompts`: names asked for, `tokens`: budgets."""
    fake = SimpleNamespace(prompts=[], tokens=[], batches=[])

    def generate(policy, prompts, group_size, max_new_tokens, temperature, generator):
        assert (group_size, temperature, generator) == (1, 0.0, None) and not torch.is_grad_enabled()
        fake.prompts += prompts
        fake.tokens.append(max_new_tokens)
        fake.batches.append(len(prompts))
        return SimpleNamespace(ids=prompts, mask=None)

    monkeypatch.setattr(data, "make_prompts", lambda policy, samples: [[i.name for i in s.items] for s in samples])
    monkeypatch.setattr(data, "answer_budget", lambda policy, samples: len(data.reference_answer(samples[0])))
    monkeypatch.setattr(rarl, "generate", generate)
    monkeypatch.setattr(rarl, "decode", lambda policy, ids, mask: [fake.say(names) for names in ids])
    return fake


def listing(names, score):
    """An answer in the order of the scores: image ids as the prompt numbers them, values that say nothing."""
    return answer(*((i, 0) for i in sorted(range(1, len(names) + 1), key=lambda i: score(names[i - 1]))))


def test_windows_find_the_exact_order_that_coarse_values_leave_open(ranker):
    # 30 images with the labels 0..29. The values know them in fives, the windows exactly.
    labels = random.Random(0).sample(range(30), 30)
    label = lambda name: labels[int(name)]
    ranker.say = lambda names: listing(names, label) if len(names) > 1 else answer((1, label(names[0]) // 5))
    ranking = evaluation.rank_images(ranker, images(30), window=4, rounds=2, batch_size=8)
    assert [labels[i] for i in ranking.order] == list(range(30))
    assert ranking.values == [x // 5 for x in labels]
    alone = evaluation.rank_images(ranker, images(30), rounds=0)
    assert stats.kendalltau([labels[i] for i in alone.order], range(30)).statistic < 0.95
    assert (alone.windows, alone.invalid) == (0, 0)


def test_questions_are_few_shuffled_and_the_same_each_time(ranker):
    ranker.say = lambda names: answer(*((i, int(name)) for i, name in enumerate(names, 1)))  # as numbered in the prompt
    first = evaluation.rank_images(ranker, images(40), window=4, rounds=2, batch_size=16)
    asked = list(ranker.prompts)
    singles, windows = asked[:40], asked[40:]
    assert singles == [[f"{i}"] for i in range(40)]
    assert first.windows == len(windows) == 19 + 20 and {len(names) for names in windows} == {4}
    assert ranker.batches == [16, 16, 8] + [16, 3] + [16, 4]
    # This policy favours the first image always. It should not find the order of the values that it is shown.
    rising = sum(int(a) < int(b) for names in windows for a, b in zip(names, names[1:], strict=False))
    assert 0.35 < rising / (3 * len(windows)) < 0.65
    assert evaluation.rank_images(ranker, images(40), window=4, rounds=2, batch_size=40) == first
    assert ranker.prompts[len(asked) :] == asked
    # Room for five digits, whatever the label: [{"image_id": 1, "value": 99999}] and four of these in a list.
    assert set(ranker.tokens) == {33, 4 * 33}


def test_few_images_make_one_window_and_one_makes_none(ranker):
    ranker.say = lambda names: listing(names, lambda name: -int(name)) if len(names) > 1 else answer((1, 5))
    ranking = evaluation.rank_images(ranker, images(3), window=4, rounds=2)
    assert ranking == ([2, 1, 0], [5, 5, 5], 2, 0)
    assert [sorted(names) for names in ranker.prompts[3:]] == [["0", "1", "2"]] * 2
    assert evaluation.rank_images(ranker, images(1)) == ([0], [5], 0, 0)


def test_merged_ranking_beats_the_values_where_all_answers_are_noisy(ranker):
    labels, taus = np.random.default_rng(1).uniform(0, 100, 60), []
    for seed in range(4):
        noise = random.Random(seed)
        heard = lambda name, noise=noise: labels[int(name)] + noise.gauss(0, 8)
        ranker.say = lambda names, heard=heard: (
            listing(names, heard) if len(names) > 1 else answer((1, heard(names[0])))
        )
        ranking = evaluation.rank_images(ranker, images(60))
        place = np.argsort(ranking.order)
        taus.append([stats.kendalltau(x, labels).statistic for x in (ranking.values, place)])
    values, merged = np.mean(taus, axis=0)
    assert 0.75 < values < 0.87 and merged > values + 0.04
    assert all(after > before for before, after in taus)


def test_invalid_answers_are_counted_and_their_images_placed_by_votes(ranker):
    def say(names):
        if len(names) == 1:
            return "no idea" if int(names[0]) % 4 == 0 else answer((1, int(names[0])))
        return "[]" if "7" in names else listing(names, int)  # whoever sees image 7 is lost

    ranker.say = say
    ranking = evaluation.rank_images(ranker, images(12), window=4, rounds=3)
    assert ranking.values == [None, 1, 2, 3, None, 5, 6, 7, None, 9, 10, 11]
    assert ranking.invalid == sum("7" in names for names in ranker.prompts[12:]) > 0
    assert ranking.windows == len(ranker.prompts) - 12
    # 0 and 4 and 8 began in the middle, beside 6.
    assert evaluation.merge_rankings(ranking.values, [])[4:8] == [0, 4, 6, 8]
    assert stats.kendalltau(ranking.order, range(12)).statistic > 0.9

    ranker.say = lambda names: "no idea"
    assert evaluation.rank_images(ranker, images(5), rounds=1) == ([0, 1, 2, 3, 4], [None] * 5, 2, 2)


@pytest.mark.parametrize(("count", "thumb"), [(1, 168), (10, 168), (33, 120), (130, 84)])
def test_sheet_shows_all_images_in_ranked_order(tmp_path, count, thumb):
    colours = [(i, 255 - i, 100) for i in range(count)]
    items = [data.Item(f"d/{i}", 0, TASK, lambda c=c: Image.new("RGB", (40, 20), c)) for i, c in enumerate(colours)]
    order = random.Random(0).sample(range(count), count)
    values = [None if i % 3 else 1e308 for i in range(count)]
    evaluation.draw_ranking(items, evaluation.Ranking(order, values, 0, 0), tmp_path / "r.png")
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
    evaluation.draw_ranking(items, evaluation.Ranking([*range(121)], [0.0] * 121, 0, 0), tmp_path / "r.png")
    red = (np.asarray(Image.open(tmp_path / "r.png")) == (255, 0, 0)).all(-1).sum()
    assert red == 31 * 84 + 30 * 84 + 30 * 84 * 84 + 30 * 84  # lines of one pixel, squares


def test_a_sheets_captions_stay_in_their_column(tmp_path):
    def draw(name):
        items = [data.Item(n, 0, TASK, lambda: Image.new("RGB", (20, 20), "red")) for n in ("a", name, "c")]
        evaluation.draw_ranking(items, evaluation.Ranking([0, 1, 2], [1.0] * 3, 0, 0), tmp_path / "r.png")
        return np.asarray(Image.open(tmp_path / "r.png"))

    name = "photo " * 30
    assert (draw(name + "1.jpg") != draw(name + "2.jpg")).any(), "of a long name the end is what tells it from the next"
    short, long = draw("b"), draw("x/" + "数b\n " * 60 + ".jpg")
    y, x = (short != long).any(-1).nonzero()
    left = evaluation.MARGIN + 168 + 21  # of the second column
    assert len(x) and x.min() >= left - 1 and x.max() <= left + 168 and y.min() > 96 + 168  # 1: smooth edges


# --- command line -------------------------------------------------------------------------------------------


def test_command_writes_table_answers_and_picture(policy, tmp_path, monkeypatch, capsys):
    class Knows(dict):  # answers for image 1 alone: right at one image, invalid at two
        def __missing__(self, name):
            return answer((1, items[name]))

    items = {item.name: item.label for item in data.load_dataset("dots", None, "test")}
    policy.said = Knows()
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: policy)
    arguments = f"--model some/hub-id --data dots --images 1 2 --samples 3 --device cpu --out {tmp_path}/new/out"
    evaluation.main(arguments.split())
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:6] == ["1", "image", "3", "1.000", "1.000", "0.000"]
    assert table[2].split()[:5] == ["2", "images", "3", "0.000", "0.000"]
    written = [json.loads(line) for line in (tmp_path / "new/out/predictions.jsonl").read_text().splitlines()]
    assert [len(p["items"]) for p in written] == [1, 1, 1, 2, 2, 2]
    Image.open(tmp_path / "new/out/predictions.png").verify()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {tmp}/missing --data dots", "missing does not exist"),
        ("--model runs/mistyped --data dots", "mistyped does not exist"),
        ("--model {tmp} --data dotz", "dotz"),
        ("--model {tmp} --data dots --images 2 4096", "4096 images"),
        ("--model {tmp} --data coco", "--data-root"),
        ("--model {tmp} --data dots --out {tmp}/file", "file"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    arguments = arguments.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*arguments, *([] if "--out" in arguments else ["--out", str(tmp_path / "out")])])
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert str(stop.value).startswith("eval.py: ")


@pytest.mark.parametrize("wrong", ["--images 0", "--samples -1", "--batch-size x", "--device tpu9", "--split dev"])
def test_a_mistyped_setting_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--model", "m", "--data", "dots", *wrong.split()])
    assert f"argument {wrong.split()[0]}: " in capsys.readouterr().err


# --- command line: --rank -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Five images: 3.png has 3 red pixels, and so on. Also what should be passed over."""
    path = tmp_path / "my images"
    (path / "subfolder.png").mkdir(parents=True)
    for i in (5, 3, 1, 4, 2):
        image = Image.new("RGB", (30, 30))
        for x in range(i):
            image.putpixel((x, 0), (255, 0, 0))
        image.save(path / f"{i}.png")
    for other in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (path / other).write_text("not an image")
    return path


@pytest.fixture
def rank(ranker, monkeypatch, tmp_path):
    """Runs the command with a policy that counts red pixels, but in a single image no further than 2."""

    def say(names):
        counts = [np.asarray(Image.open(name))[0, :, 0].astype(bool).sum() for name in names]
        counts = counts if len(names) > 1 else [min(2, *counts, 9)]
        return answer(*((i, int(count)) for count, i in sorted(zip(counts, range(1, 99), strict=False))))

    ranker.say = say
    monkeypatch.setattr(rarl, "load_policy", lambda path, device, dtype: ranker)
    return lambda *more: evaluation.main(
        ["--model", "some/hub-id", "--device", "cpu", "--out", f"{tmp_path}/new/out", *map(str, more)]
    )


COUNT_RED = ["--question", "How many pixels are red?", "--order", "from the fewest to the most"]


def test_rank_prints_order_and_values_and_writes_a_sheet(rank, folder, tmp_path, capsys):
    rank("--rank", folder, *COUNT_RED)
    output = capsys.readouterr()
    values = {1: 1, 2: 2, 3: 2, 4: 2, 5: 2}  # the order above 2 is the windows'
    assert output.out.splitlines() == [
        "rank  value  file",
        *(f"   {i}      {values[i]}  {folder}/{i}.png" for i in values),
    ]
    assert "5 prompts with 1 image, 4 with 4" in output.err
    written = [json.loads(line) for line in (tmp_path / "new/out/ranking.jsonl").read_text().splitlines()]
    assert written == [{"rank": i, "file": f"{folder}/{i}.png", "value": values[i]} for i in values]
    assert Image.open(tmp_path / "new/out/ranking.png").size[0] > 5 * 168


def test_json_is_one_document_and_nothing_else(rank, folder, ranker, tmp_path, capsys):
    (folder / "2.png").rename(folder / "2 é.png")
    right = ranker.say
    ranker.say = lambda names: "?" if [name[-5:] for name in names] == ["3.png"] else right(names)
    rank("--rank", *(folder / f"{n}.png" for n in "135"), folder / "2 é.png", "--data", "dots", "--json")
    document = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in document] == [f"{folder}/{n}.png" for n in ("1", "2 é", "3", "5")]
    assert [(row["rank"], row["value"]) for row in document] == [(1, 1), (2, 2), (3, None), (4, 2)]
    assert (tmp_path / "new/out/ranking.png").exists()


def test_rank_says_what_was_not_valid(rank, folder, ranker, capsys):
    right, windows = ranker.say, []

    def say(names):
        if len(names) == 1:
            return "?" if "3.png" in names[0] else right(names)
        windows.append(names)
        return "?" if len(windows) == 1 else right(names)

    ranker.say = say
    rank("--rank", folder, *COUNT_RED)
    output = capsys.readouterr()
    assert "1 of 5 images have no value" in output.err and "1 of 4 windows were left out" in output.err
    assert output.out.splitlines()[3] == f"   3      -  {folder}/3.png"


def test_bad_images_are_named_or_left_out_and_counted(rank, folder, ranker, tmp_path, capsys):
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    (folder / "6.jpg").write_text("<html>not found</html>")
    Image.new("RGB", (1000, 1)).save(folder / "7.png")
    with pytest.raises(SystemExit) as stop:
        rank("--rank", folder, *COUNT_RED)
    message = str(stop.value)
    assert all(f"{folder}/{name} " in message for name in ("4.png", "6.jpg", "7.png")) and "5.png" not in message
    assert message.endswith("--skip-bad leaves such files out") and "\n" not in message
    assert not ranker.prompts and not (tmp_path / "new").exists(), "found before anything else is done"
    rank("--rank", folder, *COUNT_RED, "--skip-bad", "--json")
    output = capsys.readouterr()
    assert [Path(row["file"]).stem for row in json.loads(output.out)] == ["1", "2", "3", "5"]
    assert "left out 3 of 7 images" in output.err and output.err.count("left out: image file") == 3
    with pytest.raises(SystemExit, match=r"6\.jpg .*cannot be read.*take it out$"):  # none is left to rank
        rank("--rank", folder / "6.jpg", *COUNT_RED, "--skip-bad")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["{folder}/6.png"], "no file or folder '{folder}/6.png'"),
        (["{folder}/*.jpg"], "no file or folder '{folder}/*.jpg'"),  # nothing matched, so the shell left it as it is
        ([""], "no file or folder ''"),  # an unset variable, not the current folder
        (["{folder}/1.png", "{folder}/2.png", "{folder}/1.png"], "{folder}/1.png is given twice"),
        (["{folder}", "{folder}/../my images/3.png"], "3.png is given twice, first as {folder}/3.png"),
        (["{folder}/subfolder.png"], "subfolder.png has no images (.jpg .jpeg .png"),
        (["{folder}/notes.txt"], "notes.txt cannot be read"),
    ],
)
def test_a_wrong_path_to_rank_is_one_sentence(rank, folder, paths, message):
    with pytest.raises(SystemExit) as stop:
        rank("--rank", *(path.format(folder=folder) for path in paths), *COUNT_RED)
    assert message.format(folder=folder) in str(stop.value) and "\n" not in str(stop.value)
    assert str(stop.value).startswith("eval.py: ")


def test_a_sheet_is_not_written_among_the_images(rank, folder):
    with pytest.raises(SystemExit, match="is ranked itself"):
        rank("--rank", folder, *COUNT_RED, "--out", folder)


def test_an_untrained_policy_is_told_so(folder, tmp_path):
    from experiments import make_tiny  # for once real weights, prompts and decoding

    torch.manual_seed(0)
    rarl.save_policy(make_tiny.build_policy(), tmp_path / "policy")
    with pytest.raises(SystemExit, match="none of the 7 answers is valid"):
        evaluation.main(["--model", f"{tmp_path}/policy", "--data", "dials", "--device", "cpu", "--rank", f"{folder}",
                         "--rounds", "1", "--out", f"{tmp_path}/out"])  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--rank x --data dots --images 2", "--images does not go with --rank"),
        ("--rank x --data dots --seed 0", "--seed does not go with --rank"),  # even if it is the default
        ("--rank x --data dots --split val --samples 3", "does not go with --rank"),
        ("--data dots --window 4", "--window needs --rank"),
        ("--data dots --json", "--json needs --rank"),
        ("--data dots --skip-bad", "--skip-bad needs --rank"),
        ("--rank x", "either --data or both --question and --order"),
        ("--rank x --question q", "either --data or both --question and --order"),
        ("--rank x --order o", "either --data or both --question and --order"),
        ("--rank x --data dots --order o", "either --data or both --question and --order"),
        ("--rank x --data dots --question q --order o", "either --data or both --question and --order"),
        ("--rank x --question q --order o --data-root r", "--data-root goes with --data"),
        ("--rank x --data dots --window 1", "argument --window: 1 is less than 2"),
        ("--rank x --data dots --rounds -1", "argument --rounds: -1 is less than 0"),
        ("--rank --data dots", "argument --rank: expected at least one argument"),
        ("", "--data is required, or --rank"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong, message, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--model", "m", *wrong.split()])
    assert message in capsys.readouterr().err


def test_the_question_of_a_data_set(tmp_path, folder):
    def task(*arguments):
        return evaluation._task(evaluation._arguments(["--model", "m", "--rank", "x", *map(str, arguments)]))

    assert task("--data", "dots") == data.DOTS and task("--data", "dials") == data.DIALS
    assert "old" in task("--data", "utkface").question and "youngest" in task("--data", "utkface").order
    assert task("--data", "ava").decimals == 2
    own = task("--question", "How red?", "--order", "from pale to red")
    assert (own.question, own.order) == ("How red?", "from pale to red")
    # A rating names the lowest and the highest label, so it takes the labels to know the question.
    with pytest.raises(data.DataError, match="--data csv depends on the images"):
        task("--data", "csv")
    lines = [f"{i}.png,{i},train" for i in range(1, 6)]
    (folder / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    assert task("--data", "csv", "--data-root", folder).question == "Rate the image from 1 to 5."
    with pytest.raises(data.DataError, match="dotz"):
        task("--data", "dotz")
    # Two groups are two questions.
    lines = [f"{i}.png,{i},train,{'ab'[i % 2]}" for i in range(1, 6)]
    (folder / "labels.csv").write_text("\n".join(["path,label,split,group", *lines]))
    with pytest.raises(data.DataError, match="asks 2 questions, such as 'Rate the image"):
        task("--data", "csv", "--data-root", folder)
