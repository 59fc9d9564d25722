"""Metrics against scipy and by hand; the loop with policies that are dictionaries."""

import doctest
import json
import math

import numpy as np
import pytest
from fakes import answer, sample, scripted_policy
from scipy import stats

import data
import eval as evaluation
from support import rank as ranking
from support.show import results, sheets


@pytest.fixture
def policy(monkeypatch):
    return scripted_policy(monkeypatch)


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


def test_tau_of_values_by_hand():
    # Of the pairs (10, 20), (10, 30), (20, 30) the values 1, 3, 2 have two right and one wrong.
    assert evaluation.tau_of_values([1, 3, 2], [10, 20, 30]) == pytest.approx(1 / 3)
    # Equal values share a place: their pair counts neither way, but is comparable. (2 - 0) / 3.
    assert evaluation.tau_of_values([1, 2, 2], [10, 20, 30]) == pytest.approx(2 / 3)
    assert evaluation.tau_of_values([5, 5, 5], [10, 20, 30]) == 0, "one value for all is no order"
    # Equal labels are not compared: of three pairs two are, one of them right, one wrong.
    assert evaluation.tau_of_values([1, 3, 2], [20, 20, 10]) == 0
    assert evaluation.tau_of_values([3, 2, 1], [20, 20, 10]) == 1
    assert math.isnan(evaluation.tau_of_values([1, 2], [7, 7])) and math.isnan(evaluation.tau_of_values([4], [4]))
    assert evaluation.tau_of_values([1.7e308, -1.7e308], [1, 0]) == 1


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
        # delta is 4: 1 - 1 / 16 and 1, 1;  1 - 0.01 and 1;  1 and 0;  nothing for what is not valid.
        "regression": pytest.approx(((15 / 16 + 2) / 3 + 1.99 / 2 + 1 / 2 + 0) / 4),
        "mae": pytest.approx((1 + 0 + 0 + 0.4 + 0 + 0 + 4) / 7),
        "accuracy": pytest.approx(5 / 7),  # all but 8 and 2: 4.4 rounds to 4
        "srcc": pytest.approx(stats.spearmanr(values, labels).statistic),
        "plcc": pytest.approx(stats.pearsonr(values, labels).statistic),
        "tau": pytest.approx((1 / 3 - 1) / 2),
        "tau_values": 1,  # 8, 3, 5 and 4.4, 9 stand as their labels do
        "tau_n": 2,
        "contradict": 2 / 3,  # of a1 and b1, whose lists put 8 before 5 and 9 before 4.4; not of c1
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
        "strict": True,
        "regression": pytest.approx((15 / 16 + 2) / 3),
        "tau": pytest.approx(1 / 3),
        "tau_values": 1,
    }
    assert not predictions[1]["strict"] and predictions[2]["tau"] is predictions[2]["tau_values"] is None
    assert predictions[3]["order"] is predictions[3]["values"] is None
    assert evaluation.summarize(predictions) == metrics


def test_summary_without_any_valid_answer_is_nan_but_for_the_shares(policy):
    policy.said = {"s1": "no idea"}
    metrics, _ = evaluation.evaluate(policy, [sample(1, 2)])
    assert [metrics.pop(name) for name in ("n", "valid", "strict", "regression", "tau_n")] == [1, 0, 0, 0, 0]
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


def test_progress_is_shown_from_the_start_where_it_is_asked_for(policy, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "make_prompts", lambda policy, samples: seen.append(capsys.readouterr().err) or ["s1"])
    policy.said = {"s1": answer((1, 5))}
    evaluation.evaluate(policy, [sample(5)], progress="base, 1 image")
    assert "base, 1 image" in seen[0] and "0/1" in seen[0], "before the first batch"
    evaluation.evaluate(policy, [sample(5)])
    assert seen[1].count("base") <= 1 and capsys.readouterr().err == "", "a library is silent"


# --- files --------------------------------------------------------------------------------------------------


def test_json_lines_round_trip(policy, tmp_path):
    policy.said = {"a1": 'twee\n"regels" \u2028 数 ' + answer((1, 5)), "b1": "nothing"}
    _, predictions = evaluation.evaluate(policy, [sample(5, prefix="a"), sample(6, 7, prefix="b")])
    predictions[1]["labels"] = [math.nan, 7.0]
    results.write_predictions(predictions, tmp_path / "p.jsonl")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    back = [json.loads(line, parse_constant=refuse) for line in lines]
    assert back == [predictions[0], predictions[1] | {"labels": [None, 7.0]}]
    assert math.isnan(predictions[1]["labels"][0])  # what is written is a copy


def test_examples_in_docstrings():
    found = [doctest.testmod(module) for module in (evaluation, ranking, results, sheets)]
    assert sum(result.attempted for result in found) >= 5 and not any(result.failed for result in found)
