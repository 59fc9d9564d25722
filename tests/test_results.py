"""support/show/results.py: tables, intervals, remarks, and the blind rows by hand."""

import json
import math
import random

import numpy as np
import pytest
from fakes import TASK, answer, sample

import data
import eval as evaluation
import reward
from support.show.results import ENOUGH, best_constant, blind_rows, finite, intervals, remarks, results_table


def judged(*pairs):
    return [evaluation.judge(shown, text) for shown, text in pairs]


def row(**known):
    return evaluation.summarize([]) | {"n": 60} | known


def test_table_is_aligned_and_shows_what_is_undefined():
    results = {
        "base": {
            1: row(valid=1.0, mae=3.81, regression=0.5),
            8: row(valid=1 / 60, mae=1e300, tau=-0.5, tau_values=1.0, tau_n=1),
        },
        "stage 1": {1: row(valid=0.985, mae=0.25), 8: row(valid=0.0)},
    }
    lines = results_table(results).splitlines()
    assert lines[1].split() == ["base", "100.0%", "60", "3.810", "-", "-", "-", "0.500", "-", "-", "0"]
    assert lines[5].split() == ["base", "1.7%", "60", "1.0e+300", "-", "-", "-", "-", "-0.500", "1.000", "1"]
    assert lines[6].split() == ["stage", "1", "0.0%", "60", "-", "-", "-", "-", "-", "-", "-", "0"]
    for name, cell in (("MAE", "1.0e+300"), ("tau", "-0.500"), ("tau_values", "1.000"), ("n (tau)", "1")):
        end = (lines[4] + " ").index(f" {name} ") + 1 + len(name)
        assert lines[5][:end].endswith(cell), "a number stands below its name"


def test_a_correlation_of_a_few_values_is_not_shown():
    def shown(valid, images):
        table = results_table({"base": {images: row(valid=valid, mae=1.0, srcc=0.87, plcc=0.97)}})
        return table.splitlines()[1].split()

    assert shown(3 / 60, 1)[3:7] == ["1.000", "-", "-", "-"], "three values"
    assert shown(10 / 60, 1)[3:7] == ["1.000", "-", "0.870", "0.970"]
    assert shown(3 / 60, 4)[3:7] == ["1.000", "-", "0.870", "0.970"], "twelve values"


def test_blind_rows_stand_last_and_say_their_constant():
    samples = {2: [sample(1, 9), sample(9, 1)]}
    blind = blind_rows(samples, [item for s in samples[2] for item in s.items], evaluation.grade)
    results = {"base": {2: row(tau=0.5)}} | blind | {"stage 1": {2: row(tau=0.7)}}
    names = [line.split("  ")[0].split(":")[0] for line in results_table(results).splitlines()[1:]]
    assert names == ["base", "stage 1", "best constant by R_reg", "best constant by MAE", "prompt order"]
    assert "best constant by MAE: 5 " in results_table(results)
    # The same from results.json, where what is undefined is null.
    back = json.loads(json.dumps(finite(results)))
    back = {name: {int(n): metrics for n, metrics in rows.items()} for name, rows in back.items()}
    assert results_table(back) == results_table(results)


def test_remarks_name_a_policy_that_says_one_value_nearly_always():
    right = [(sample(n), answer((1, n))) for n in range(10)]
    assert remarks(judged(*right)) == []
    once = [(sample(n), answer((1, 1 if n else 7))) for n in range(10)]  # 9 of 10
    (said,) = remarks(judged(*once))
    assert said.startswith("at 1 image the policy says 1 of 90% of the images, whose label it is for 10%: ")
    assert remarks(judged(*once[:9])) == [], "fewer may be chance"
    eight = [(sample(n), answer((1, 1 if n > 1 else 7 + n))) for n in range(10)]
    assert remarks(judged(*eight)) == []


def listed(in_order, others):
    orders = [(1, 2, 3)] * in_order + [(2, 1, 3)] * others
    return judged(*((sample(3, 2, 1), answer(*((i, 10 * k + i) for i in order))) for k, order in enumerate(orders)))


def test_remarks_name_a_policy_that_lists_in_prompt_order():
    (said,) = remarks(listed(19, 1))
    assert said == "at 3 images 95% of the lists are in the order of the prompt: their tau is chance"
    assert remarks(listed(18, 2)) == [] and remarks(listed(9, 0)) == []
    single = judged(*((sample(n), answer((1, n))) for n in range(10)))
    assert remarks(single) == [], "one image has no order"


def test_remarks_say_on_how_few_answers_the_numbers_rest():
    four = [(sample(1, 2, 3, 4), "?")] * 59 + [(sample(1, 2, 3, 4), answer(*((i, i) for i in range(1, 5))))]
    good = [(sample(k % 9), answer((1, k))) for k in range(90)]
    (said,) = remarks(judged(*good, *four))
    assert said == "at 4 images 1 of 60 answers are valid, and values and order rest on these"
    assert remarks(judged((sample(1), answer((1, 1))), (sample(1), "?"))) == []
    assert remarks([]) == []


# --- intervals ----------------------------------------------------------------------------------------------


def test_intervals_hold_what_the_normal_distribution_says():
    """100 prompts with errors 0 and 2: the mean's standard error is 1 / 10, so 95 % are within 0.196 of 1."""
    answers = judged(*((sample(5, 9), answer((1, 5 + 2 * (k % 2)), (2, 9 - 2 * (k % 2)))) for k in range(100)))
    found = intervals(answers)
    assert found["mae"] == pytest.approx([1 - 0.196, 1 + 0.196], abs=0.03)
    assert found["valid"] == found["tau"] == [1, 1], "nothing differs"
    assert intervals(answers) == found, "the same each time"
    assert intervals(answers[: ENOUGH - 1]) == {}, "of a few prompts it would be a guess"


@pytest.mark.filterwarnings("error")
def test_intervals_of_answers_that_are_not_valid():
    """Of 20 prompts 10 are valid: within 2 standard errors, 0.11, of 0.5. A pair of equal labels has no tau,
    and the mean of such errors is no number."""
    some = judged(*((sample(5, 5), answer((1, 1e308), (2, 5)) if k % 2 else "?") for k in range(20)))
    found = intervals(some)
    assert found.keys() == {"valid", "regression"} and found["valid"] == pytest.approx([0.28, 0.72], abs=0.05)
    assert intervals(judged(*[(sample(5), "?")] * 20)) == {"valid": [0, 0], "regression": [0, 0]}


# --- what a blind policy would get --------------------------------------------------------------------------


def items(labels, task):
    return [data.Item(f"{task.name}{i}", label, task, lambda: None) for i, label in enumerate(labels)]


def test_blind_rows_by_hand():
    """Training labels 1, 1, 1, 9, 9, 10, 30: the median is 9. At delta 4 the constants earn (times 7): 1: 3;
    9: 2 + 15/16 = 2.94; 10: 1 + 2 * 15/16 = 2.88. So 1 is the best by R_reg."""
    train = items([1, 1, 1, 9, 9, 10, 30], TASK)
    samples = {1: [sample(2), sample(9)], 2: [sample(5, 9), sample(9, 1), sample(3, 3), sample(1, 2)]}
    rows = blind_rows(samples, train, evaluation.grade)
    assert list(rows) == ["best constant by R_reg", "best constant by MAE", "prompt order"]
    by_reward, by_error, order = rows.values()
    assert (by_reward[1]["constant"], by_error[1]["constant"]) == (1, 9)
    assert by_reward[1]["mae"] == (1 + 8) / 2 and by_error[1]["mae"] == (7 + 0) / 2
    assert by_reward[1]["regression"] == pytest.approx((15 / 16 + 0) / 2)
    # Labels 5, 9, 9, 1, 3, 3, 1, 2 against 9.
    assert by_error[2]["mae"] == pytest.approx((4 + 0 + 0 + 8 + 6 + 6 + 8 + 7) / 8)
    assert by_error[2]["accuracy"] == 2 / 8
    assert by_error[2]["regression"] == pytest.approx((0 + 1 + 1 + 0) / 2 / 4)
    assert by_error[2]["tau_values"] == 0 and by_error[2]["tau_n"] == 3, "equal values are no order"
    assert math.isnan(by_error[2]["tau"]), "a constant lists nothing"
    # Prompt order: right, wrong, not comparable, right.
    assert order == {2: pytest.approx(order[2], nan_ok=True)}, "one image has no order"
    assert (order[2]["n"], order[2]["tau_n"]) == (4, 3) and order[2]["tau"] == pytest.approx(1 / 3)
    assert math.isnan(order[2]["mae"]) and math.isnan(order[2]["tau_values"])


def test_each_task_has_its_own_constant():
    cats, cows = (data.Task(f"count {name}", "How many?", "by number", delta=4) for name in ("cat", "cow"))
    train = items([1, 1, 2], cats) + items([7, 8, 8], cows)
    samples = {1: [sample(1, task=cats), sample(8, task=cows)]}
    rows = blind_rows(samples, train, evaluation.grade)
    assert rows["best constant by MAE"][1]["mae"] == 0 and math.isnan(rows["best constant by MAE"][1]["constant"])
    # A task without training images is answered with the median of all labels, 1 1 2 7 8 8: 4.5, written as 4.
    ewes = data.Task("count ewe", "How many?", "by number", delta=4)
    rows = blind_rows({1: [sample(4, task=ewes)]}, train, evaluation.grade)
    assert rows["best constant by MAE"][1]["mae"] <= 1
    # Without training labels there is no constant to find.
    assert list(blind_rows({2: [sample(1, 2)]}, [], evaluation.grade)) == ["prompt order"]


def earned(value, labels, delta):
    text = f'[{{"image_id": 1, "value": {value}}}]'
    return sum(reward.compute_reward(text, [label], delta).regression for label in labels) / len(labels)


@pytest.mark.parametrize(("delta", "decimals"), [(10, 0), (1, 2), (0.3, 1)])
def test_no_other_constant_earns_more_or_errs_less(delta, decimals):
    labels = [round(random.Random(seed).gammavariate(2, 3), 2) for seed in range(60)]
    by_reward, by_error = best_constant(labels, delta, decimals)
    tried = [i / 10 ** min(decimals, 1) for i in range(250)]
    assert earned(by_reward, labels, delta) >= max(earned(v, labels, delta) for v in tried) - 1e-9
    error = lambda value: sum(abs(value - label) for label in labels)
    assert error(by_error) <= 1.01 * min(map(error, tried))  # rounded


@pytest.mark.filterwarnings("error")
def test_labels_as_large_as_they_may_be():
    assert best_constant([1e12, -1e12, 1e12], 4, 0) == (1e12, 1e12)
    assert best_constant([7], 4, 0) == (7, 7)
    assert best_constant([1.0, 1e9], 4, 3) == (1, 500000000.5)


def test_the_reward_of_a_recipe_is_the_blind_policys_too(monkeypatch):
    """A reward of exact answers alone: the best constant is the mode, at any delta."""
    assert best_constant([1, 1, 9, 10, 11], 4, 0)[0] == 10
    monkeypatch.setattr(reward, "value_reward", lambda value, label, delta: float(value == label))
    assert best_constant([1, 1, 9, 10, 11], 4, 0)[0] == 1


def test_many_labels_are_grouped():
    """250,000 different ones: normal around 5, so both constants are, up to the groups' width."""
    labels = np.random.default_rng(0).normal(5, 1.4, 250_000).tolist()
    by_reward, by_error = best_constant(labels, 1, 1)
    assert by_error == 5 and abs(by_reward - 5) <= 0.2
