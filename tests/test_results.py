"""The table of results and the remarks beside it."""

import dataclasses
import json

from fakes import TASK, answer, sample

import eval as evaluation
from support.show.results import remarks, results_table
from support.show.tables import finite


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
    assert lines[0].split() == ["1", "image", "valid", "n", "MAE", "accuracy", "SRCC", "PLCC", "R_reg"]
    assert lines[1].split() == ["base", "100.0%", "60", "3.810", "-", "-", "-", "0.500"]
    assert lines[2].split() == ["stage", "1", "98.5%", "60", "0.250", "-", "-", "-", "-"]
    assert lines[3] == ""
    head = lines[4]
    assert head.split()[:2] == ["8", "images"] and head.endswith("R_reg    tau tau_values n (tau)")
    assert lines[5].split() == ["base", "1.7%", "60", "1.0e+300", "-", "-", "-", "-", "-0.500", "1.000", "1"]
    assert lines[6].split() == ["stage", "1", "0.0%", "60", "-", "-", "-", "-", "-", "-", "-", "0"]
    for name, cell in (("MAE", "1.0e+300"), ("tau", "-0.500"), ("tau_values", "1.000"), ("n (tau)", "1")):
        end = (head + " ").index(f" {name} ") + 1 + len(name)
        assert lines[5][:end].endswith(cell), "a number stands below its name"


def test_a_correlation_of_a_few_values_is_not_shown():
    def shown(valid, images):
        return (
            results_table({"base": {images: row(valid=valid, mae=1.0, srcc=0.87, plcc=0.97)}}).splitlines()[1].split()
        )

    assert shown(3 / 60, 1)[3:7] == ["1.000", "-", "-", "-"], "three values"
    assert shown(10 / 60, 1)[3:7] == ["1.000", "-", "0.870", "0.970"]
    assert shown(3 / 60, 4)[3:7] == ["1.000", "-", "0.870", "0.970"], "twelve values"


def test_blind_rows_stand_last_and_say_their_constant():
    samples = {2: [sample(1, 9), sample(9, 1)]}
    blind = evaluation.blind_rows(samples, [item for s in samples[2] for item in s.items])
    results = {"base": {2: row(tau=0.5)}} | blind | {"stage 1": {2: row(tau=0.7)}}
    names = [line.split("  ")[0].split(":")[0] for line in results_table(results).splitlines()[1:]]
    assert names == ["base", "stage 1", "best constant by R_reg", "best constant by MAE", "prompt order"]
    assert "best constant by MAE: 5 " in results_table(results)
    # The same from results.json, where what is undefined is null.
    back = json.loads(json.dumps(finite(results)))
    back = {name: {int(n): metrics for n, metrics in rows.items()} for name, rows in back.items()}
    assert results_table(back) == results_table(results)


def test_constants_of_several_tasks_are_not_shown_as_one():
    other = dataclasses.replace(TASK, name="other")
    samples = {1: [sample(2), sample(2), sample(9, task=other), sample(9, task=other)]}
    blind = evaluation.blind_rows(samples, [item for s in samples[1] for item in s.items])
    assert blind["best constant by MAE"][1]["srcc"] > 0.99, "2 for the one and 9 for the other: it correlates"
    assert "best constant by R_reg, one per task " in results_table(blind)


def test_remarks_name_a_policy_that_says_one_value_nearly_always():
    right = [(sample(n), answer((1, n))) for n in range(10)]
    assert remarks(judged(*right)) == []
    once = [(sample(n), answer((1, 1 if n else 7))) for n in range(10)]  # 9 of 10
    (said,) = remarks(judged(*once))
    assert "one value of nearly all images" in said
    assert said.endswith(": 1 for 90% of them at 1 image, whose label it is for 10%")
    assert remarks(judged(*once[:9])) == [], "fewer may be chance"
    eight = [(sample(n), answer((1, 1 if n > 1 else 7 + n))) for n in range(10)]
    assert remarks(judged(*eight)) == []


def listed(in_order, others):
    orders = [(1, 2, 3)] * in_order + [(2, 1, 3)] * others
    return judged(*((sample(3, 2, 1), answer(*((i, 10 * k + i) for i in order))) for k, order in enumerate(orders)))


def test_remarks_name_a_policy_that_lists_in_prompt_order():
    (said,) = remarks(listed(19, 1))
    assert "in the order of the prompt" in said and said.endswith(": 95% of its lists at 3 images")
    assert remarks(listed(18, 2)) == [] and remarks(listed(9, 0)) == []
    single = judged(*((sample(n), answer((1, n))) for n in range(10)))
    assert remarks(single) == [], "one image has no order"


def test_each_number_of_images_is_looked_at_by_itself():
    """A policy that sorts two images and never three: the many that it sorts must not hide it."""
    pairs = [(sample(9, k % 9), answer((2, k), (1, 9))) for k in range(60)]
    (said,) = remarks(judged(*pairs) + listed(20, 0))
    assert said.endswith(": 100% of its lists at 3 images")


def test_remarks_say_on_how_few_answers_the_numbers_rest():
    four = [(sample(1, 2, 3, 4), "?")] * 59 + [(sample(1, 2, 3, 4), answer(*((i, i) for i in range(1, 5))))]
    good = [(sample(k % 9), answer((1, k))) for k in range(90)]
    (said,) = remarks(judged(*good, *four))
    assert said == "few answers are valid, and what is said of values and order rests on these: 1 of 60 at 4 images"
    assert remarks(judged((sample(1), answer((1, 1))), (sample(1), "?"))) == []
    assert remarks([]) == []
