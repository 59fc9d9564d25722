"""Tests of reward.py: inputs, a derivation by hand, the expected number. tau is computed a second way too."""

import doctest
import itertools
import json
import math
import pickle
import random
import time
from itertools import permutations

import numpy as np
import pytest
import scipy.stats

import reward
from reward import Reward, compute_reward, is_strict_format, kendall_tau, parse_response

NO_REWARD = Reward(0.0, 0.0, 0.0, 0.0)
ONE = '[{"image_id": 1, "value": 31}]'
TWO = '[{"image_id": 2, "value": 17}, {"image_id": 1, "value": 23}]'


def answer(*pairs):
    """answer((2, 17), (1, 23)) == TWO. Values are pasted as they are, so "1e400" and "NaN" can be written."""
    return "[" + ", ".join(f'{{"image_id": {i}, "value": {v}}}' for i, v in pairs) + "]"


def test_the_docstring_examples():
    result = doctest.testmod(reward)
    assert result.attempted >= 8 and result.failed == 0


# --------------------------------------------------------------------------------------- the answer in a text


def test_pairs_come_in_listed_order_as_int_and_float():
    assert answer((2, 17), (1, 23)) == TWO
    parsed = parse_response(TWO, 2)
    assert parsed == [(2, 17.0), (1, 23.0)]
    assert [(type(i), type(v)) for i, v in parsed] == [(int, float)] * 2


@pytest.mark.parametrize(
    "text",
    [
        ONE,
        f" \n\t{ONE}\r\n",
        '[{"value":31,"image_id":1}]',  # neither the order of the keys nor white space matters in JSON
        '[\n  {\n    "image_id": 1,\n    "value": 3.1e1\n  }\n]',
        '[{"image\\u005fid": 1, "value": 31.0}]',  # an escape is the character it stands for
        f"<think>Maybe [1], maybe {answer((1, 70))}.</think>{ONE}",  # drafts are not searched
        f"  <think></think>\n\n{ONE}\n",
        f"<think> <think> </think>{ONE}",  # the block ends at the first </think>
    ],
)
def test_strict_answers(text):
    assert parse_response(text, 1) == [(1, 31.0)]
    assert is_strict_format(text, 1) is True


@pytest.mark.parametrize(
    "text",
    [
        f"The person looks 31 years old: {ONE}. I am sure!",
        f"```json\n{ONE}\n```",
        f"<think>young</think> Answer: {ONE}",
        f"{ONE} <think>young</think>",  # not a leading block, so prose
        f"<think>a</think><think>b</think>{ONE}",  # the second block is prose
        f"</think>{ONE}",
        f"<THINK></THINK>{ONE}",
        f"\ufeff{ONE}",  # a byte order mark is neither white space nor JSON
        f'"{ONE}"',  # quotes outside of brackets are prose, too
        f"see [sic] and [20, 30) and [a](b) {ONE}",  # brackets, but no JSON
        f"\\boxed{{{ONE}}}",  # "{[" breaks off at once, so the brace is prose
        f"{{}} {{'image_id': 1}} {ONE}",
        f'{{"image_id": [1]}} {ONE}',  # a list inside an object is not top-level
        f"{ONE}]",
        f"{ONE[:-1]}\n{ONE}",  # a list cut short, then a whole one: only one was finished
        f"\0\x1b[31m {ONE} \ud800",  # a colour code, a lone surrogate
    ],
)
def test_answers_inside_other_text_are_read_but_not_strict(text):
    assert parse_response(text, 1) == [(1, 31.0)]
    assert is_strict_format(text, 1) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "31",
        "[]",
        "[31]",
        "[[1, 31]]",
        '{"image_id": 1, "value": 31}',
        ONE[:-1],  # cut short
        ONE[1:],
        ONE.replace("}]", "},]"),  # a trailing comma is not JSON
        ONE.replace('"', "'"),
        ONE.replace("31", "31 // years"),
        # Which list is meant?
        f"{ONE} {ONE}",
        f"[1] {ONE}",
        f"{ONE} [NaN]",
        f"{answer((1, 70))} no, rather {ONE}",
        f"<think>x</think><think>{answer((1, 70))}</think>{ONE}",
        # Not top-level
        f"[{ONE}]",
        f'{{"answer": {ONE}}}',
        f'{{"answer": {ONE}',  # cutting a wrapper short does not bring its list to the top
        f"[{ONE}, oops]",
        f'{{"note": "}}", "answer": {ONE}}}',  # brackets in a JSON string do not count
        # Thinking only
        f"<think>{ONE}",
        f"<think>{ONE}</think>",
        f"<think>{ONE}</THINK>",
    ],
)
def test_texts_without_one_answer(text):
    assert parse_response(text, 1) is None
    assert is_strict_format(text, 1) is False
    assert compute_reward(text, [31], delta=5) == NO_REWARD


@pytest.mark.parametrize(
    "value",
    ["true", "null", '"31"', "[31]", "{}", "NaN", "Infinity", "-Infinity", "1e400", "031", "+31", ".5", "5.", "0x1f",
     "1_000", "\u0663\u0661", "3\u0661", "\uff11", "31 years", "--3"],
)  # fmt: skip
def test_values_that_are_no_finite_json_number(value):
    assert parse_response(answer((1, value)), 1) is None


def test_the_range_of_values_is_that_of_a_float():
    # The largest float is 1.797..e308: 309 digits. An int that a float cannot hold is refused, and so is one
    # of 5000 digits, which Python's int() would not even read.
    assert parse_response(answer((1, "17" + "0" * 307)), 1) == [(1, 1.7e308)]
    assert parse_response(answer((1, "-17" + "0" * 307)), 1) == [(1, -1.7e308)]
    for digits in ("18" + "0" * 307, "9" * 310, "9" * 5000):
        assert parse_response(answer((1, digits)), 1) is None
        assert parse_response(answer((1, "-" + digits)), 1) is None
        assert parse_response(answer((digits, 31)), 1) is None
        assert parse_response(f"[{digits}] {ONE}", 1) is None  # still a list, hence two of them
    assert parse_response(answer((1, "1e-400")), 1) == [(1, 0.0)]
    assert compute_reward(answer((1, "-0.0")), [0], delta=1) == Reward(1.0, 1.0, 0.0, 2.0)


@pytest.mark.parametrize("image_id", ["0", "2", "-1", "1.0", "1e0", "true", "null", '"1"', "[1]"])
def test_ids_that_are_not_the_integer_1(image_id):
    assert parse_response(answer((image_id, 31)), 1) is None


def test_each_image_is_named_once():
    assert parse_response(answer((2, 5), (3, 6), (1, 7)), 3) == [(2, 5.0), (3, 6.0), (1, 7.0)]
    for ids in [(1, 2), (1, 1, 2), (1, 2, 2), (1, 2, 3, 3), (1, 2, 3, 4), (0, 1, 2), (2, 3, 4), (1, 2, True)]:
        assert parse_response(answer(*[(str(i).lower(), 5) for i in ids]), 3) is None


@pytest.mark.parametrize(
    "entry",
    ["1", "[1, 31]", '[["image_id", 1], ["value", 31]]', "{}", '{"image_id": 1}', '{"image_id": 1, "Value": 31}',
     '{"image_id": 1, "value": 31, "unit": "years"}', '{"image_id": 1, "value": 30, "value": 31}',
     '{"image_id": 1, "image_id": 1, "value": 31}', '{"image_id": 1, "image_id": 1}'],
)  # fmt: skip
def test_entries_have_exactly_the_two_keys(entry):
    assert parse_response(f"[{entry}]", 1) is None


# -------------------------------------------------------------------------------------------------------- tau


def test_tau_by_hand():
    # Listed 1, 2, 3 with labels 1, 3, 2. Pairs: 1 < 3 right, 1 < 2 right, 3 > 2 wrong. (2 - 1) / 3.
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    # Listed 3, 1, 2: labels 2, 1, 3. Pairs: 2 > 1 wrong, 2 < 3 right, 1 < 3 right.
    assert kendall_tau([3, 1, 2], [1, 3, 2]) == pytest.approx(1 / 3)
    # Listed 2, 3, 1: labels 3, 2, 1, the reverse of the truth.
    assert kendall_tau([2, 3, 1], [1, 3, 2]) == -1.0
    assert kendall_tau([1, 3, 2], [1, 3, 2]) == 1.0
    # Labels 5, 5, 7: the first two are not compared. Listed 3, 1, 2: 7 > 5 wrong, 7 > 5 wrong.
    # Listed 1, 3, 2: 5 < 7 right, 7 > 5 wrong. Listed 2, 1, 3: both right.
    assert kendall_tau([3, 1, 2], [5, 5, 7]) == -1.0
    assert kendall_tau([1, 3, 2], [5, 5, 7]) == 0.0
    assert kendall_tau([2, 1, 3], [5, 5, 7]) == 1.0


def test_tau_without_comparable_pairs_is_nan():
    assert math.isnan(kendall_tau([2, 1, 3], [5, 5, 5]))
    assert math.isnan(kendall_tau([1], [5]))


def test_tau_equals_scipys_without_ties():
    rng = random.Random(0)
    for n in [2, 3, 4, 5, 6, 7, 8] * 20:
        ranking = rng.sample(range(1, n + 1), n)
        labels = rng.sample(range(100), n)
        place = [ranking.index(image_id) for image_id in range(1, n + 1)]  # of image 1, of image 2, ...
        assert kendall_tau(ranking, labels) == pytest.approx(scipy.stats.kendalltau(place, labels).statistic)


def test_tau_with_ties_equals_a_second_way():
    # Places and labels of images 1..n; a pair's sign is the product of the signs of its two differences.
    # Labels are 0, 1 or 2, so that there are many ties.
    rng = random.Random(1)
    for n in [2, 3, 4, 6, 8] * 40:
        ranking = rng.sample(range(1, n + 1), n)
        labels = [rng.randrange(3) for _ in range(n)]
        place = np.argsort(ranking)
        signs = np.sign(np.subtract.outer(place, place)) * np.sign(np.subtract.outer(labels, labels))
        expected = signs.sum() / np.abs(signs).sum() if signs.any() else math.nan
        assert kendall_tau(ranking, labels) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("ranking", [[1, 2], [1, 1, 2], [0, 1, 2], [2, 3, 4], [1, 2, 3, 4]])
def test_tau_refuses_what_is_no_permutation(ranking):
    with pytest.raises(ValueError, match=r"images 1\.\.3 once"):
        kendall_tau(ranking, [1, 3, 2])


# ------------------------------------------------------------------------------------------------ the rewards


@pytest.mark.parametrize(
    "value, expected",
    [
        (40, 1.0),  # no error
        (45, 0.75),  # half of delta: 1 - 1/4
        (35, 0.75),
        (47.5, 0.4375),  # three quarters: 1 - 9/16
        (50, 0.0),  # exactly delta
        (30, 0.0),
        (49.999, 0.00019999),  # 1 - 0.9999^2 = 2e-4 - 1e-8, just inside
        (50.001, 0.0),  # just outside: never negative
        (1000, 0.0),
    ],
)
def test_regression_of_one_image(value, expected):
    result = compute_reward(answer((1, value)), labels=[40], delta=10)
    assert result.regression == pytest.approx(expected, abs=1e-12)
    assert (result.format, result.ranking) == (1.0, 0.0)  # one image has no order
    assert result.total == result.regression + 1


def test_regression_is_the_mean_over_images_matched_by_id():
    # Labels 10, 20, 30, 40; delta 4. Errors by id: 0, 2, 4, 8, so (1 + 0.75 + 0 + 0) / 4: an image outside
    # the tolerance lowers the mean by its share, no more. Listed 4, 1, 2, 3, labels 40, 10, 20, 30: the three
    # pairs with the 40 are wrong, the other three right, tau = 0.
    text = answer((4, 48), (1, 10), (2, 22), (3, 26))
    assert compute_reward(text, [10, 20, 30, 40], delta=4) == Reward(1.0, 0.4375, 0.5, 1.9375)


def test_the_order_of_the_list_does_not_change_the_values_reward_by_a_bit():
    # Errors 0, 0, 1, 1 of 10. Added one after the other, 1 + 1 + 0.99 + 0.99 and 0.99 + 1 + 0.99 + 1 differ in the last bit.
    said = [(1, 20), (2, 10), (3, 31), (4, 41)]
    earned = [compute_reward(answer(*order), [20, 10, 30, 40], delta=10).regression for order in permutations(said)]
    assert set(earned) == {0.995}


@pytest.mark.parametrize(
    "order, labels, expected",
    [
        ((1, 2, 3), (1, 3, 2), 2 / 3),  # tau = 1/3
        ((1, 3, 2), (1, 3, 2), 1.0),
        ((2, 3, 1), (1, 3, 2), 0.0),
        ((1, 3, 2), (5, 5, 7), 0.5),  # tau = 0 over the two comparable pairs
        ((3, 1, 2), (5, 5, 5), 1.0),  # nothing to compare: any order is right
    ],
)
def test_ranking_follows_the_order_and_not_the_values(order, labels, expected):
    for values in itertools.permutations((100, 200, 300)):
        result = compute_reward(answer(*zip(order, values, strict=True)), labels, delta=1)
        assert result.ranking == pytest.approx(expected)
        assert (result.format, result.regression) == (1.0, 0.0)  # all values are far off


def test_format_is_lost_alone_in_prose():
    assert compute_reward(TWO, [23, 17], delta=5) == Reward(1.0, 1.0, 1.0, 3.0)
    assert compute_reward(f"Here: {TWO}", [23, 17], delta=5) == Reward(0.0, 1.0, 1.0, 2.0)


def test_a_reward_is_a_tuple_of_four_that_hands_back_the_answer():
    reward = compute_reward(f"Here: {TWO}", [23, 17], delta=5)
    assert reward == (0.0, 1.0, 1.0, 2.0) and len(reward) == 4
    assert reward.answer == parse_response(TWO, 2) == [(2, 17.0), (1, 23.0)]
    assert repr(reward) == "Reward(format=0.0, regression=1.0, ranking=1.0, total=2.0)"
    assert pickle.loads(pickle.dumps(reward)).answer == reward.answer  # it may come from another process
    for text in ("none", f"{TWO} {TWO}"):
        assert compute_reward(text, [23, 17], delta=5).answer is None


def test_weights():
    # Labels 20, 17; delta 6: the errors are 3 and 0, so R_reg = (0.75 + 1) / 2. The order 2, 1 is right.
    text, labels = TWO, [20, 17]
    assert compute_reward(text, labels, 6) == Reward(1.0, 0.875, 1.0, 2.875)
    assert compute_reward(text, labels, 6, w_reg=2, w_rank=0.5, w_format=0.25).total == 2 * 0.875 + 0.5 + 0.25
    assert compute_reward(text, labels, 6, w_reg=1, w_rank=0, w_format=0).total == 0.875
    assert compute_reward(text, labels, 6, w_reg=0, w_rank=3, w_format=0).total == 3.0
    assert compute_reward(text, labels, 6, w_reg=0, w_rank=0, w_format=5).total == 5.0
    assert compute_reward(text, labels, 6, 0, 0, 0) == Reward(1.0, 0.875, 1.0, 0.0)
    assert compute_reward("none", labels, 6, w_reg=2, w_rank=3, w_format=4) == NO_REWARD
    # One image: R_rank does not count, whatever its weight.
    assert compute_reward(ONE, [31], 6, w_reg=2, w_rank=100, w_format=3) == Reward(1.0, 1.0, 0.0, 5.0)


def test_nothing_overflows():
    # (1e308 - y)^2 is beyond a float, and 1.7e308 - (-1.7e308) is so before it is squared.
    assert compute_reward(answer((1, "1e308")), [-5], delta=1).regression == 0.0
    assert compute_reward(answer((1, "1.7e308")), [-1.7e308], delta=1e-300).regression == 0.0
    assert compute_reward(answer((1, 1)), [1], delta=5e-324).regression == 1.0
    assert compute_reward(answer((1, "5e307")), [0], delta=1e308).regression == 0.75


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"delta": 0}, "delta"),
        ({"delta": -1}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"delta": math.inf}, "delta"),
        ({"labels": []}, "labels"),
        ({"labels": [math.nan]}, "labels"),
        ({"labels": [-math.inf]}, "labels"),
        ({"w_reg": -1}, "w_reg"),
        ({"w_rank": math.nan}, "w_rank"),
        ({"w_format": math.inf}, "w_format"),
    ],
)
@pytest.mark.parametrize("text", [ONE, "no answer"])  # a mistake must not wait for the first good answer to show
def test_mistakes_of_the_caller_raise(arguments, message, text):
    with pytest.raises(ValueError, match=message):
        compute_reward(**{"text": text, "labels": [31], "delta": 5, **arguments})


def test_further_mistakes_of_the_caller():
    with pytest.raises(ValueError, match="labels"):
        kendall_tau([1, 2], [1, math.nan])
    for function in (parse_response, is_strict_format):
        with pytest.raises(ValueError, match="num_images"):
            function("[]", 0)


# ------------------------------------------------------------------------------------- what a model may write


def megabyte(piece):
    return piece * (1_000_000 // len(piece))


HOSTILE = {  # one megabyte each, or more; no answer in any
    "open lists": megabyte("["),
    "nested lists": "[" * 500_000 + "]" * 500_000,
    "open objects": megabyte("{"),
    "lists in objects": megabyte('[{"a":'),
    "objects in objects": megabyte('{"a":'),
    "lists after numbers": megabyte("[1,"),
    "lines of lists that break off": megabyte("[x\n"),
    "prose, then 999 lists that break off": megabyte("word \n") + "[x" * 999,
    "999 lists that break off after many lines": ("[" + "\n" * 1000 + "x") * 999,
    "999 long lists that break off": ("[" + "1," * 500 + "x") * 999,
    "500 levels that break off": ("[" * 500 + "x") * 2000,
    "900 levels that are closed": ("[" * 900 + "]" * 900) * 555,
    "empty lists": megabyte("[]"),
    "empty objects": megabyte("{}"),
    "a list of empty lists": "[" + megabyte("[],") + "[]]",
    "a list of numbers": "[" + megabyte("1,") + "1]",
    "an open list of numbers": "[" + megabyte("1,"),
    "a list of fractions": "[" + megabyte("1.5,") + "1]",
    "a list of long numbers": "[" + megabyte("9" * 4301 + ",") + "1]",
    "a list of NaN": "[" + megabyte("NaN,") + "1]",
    "an open string": '["' + megabyte('\\"['),
    "a long string": '["' + megabyte("a") + '"]',
    "escapes": '["' + megabyte("\\u0041") + '"]',
    "quotes": megabyte('"['),
    "think blocks": megabyte("<think>"),
    "closed think blocks": megabyte("<think></think>"),
    "a value of a million digits": answer((1, "9" * 1_000_000)),
    "a fraction of a million digits": answer((1, "0." + "9" * 1_000_000), (1, 0)),
    "an exponent of a million digits": answer((1, "1e" + "9" * 1_000_000)),
    "an id of a million digits": answer(("9" * 1_000_000, 1)),
    "one image many times": answer(*[(1, 31)] * 35_000),
    "many images": answer(*[(i, 31) for i in range(1, 35_000)]),
    "one key many times": "[{" + megabyte('"value": 1, ') + '"image_id": 1}]',
    "answers": megabyte(ONE),
    "white space": "[" + megabyte(" "),
    "noise": "".join(random.Random(0).choices('[]{}",:1 ', k=1_000_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_of_nonsense_is_refused_at_once(name, monkeypatch):
    # Linear work takes some milliseconds. Starting again at each of 300,000 brackets would take hours, and a thousand error
    # messages, for each of which json counts the lines so far, a second. So count what json is given to do.
    decoder, lines, parts = reward._JSON, [], []

    class Counting:
        def raw_decode(self, text, start):
            end = start
            try:
                value, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                end = error.pos
                lines.append(end)
                raise
            finally:
                parts.append(text.count(",", start, end))
            return value, end

    monkeypatch.setattr(reward, "_JSON", Counting())
    start = time.process_time()
    for text in (HOSTILE[name], HOSTILE[name] + ONE):
        lines.clear(), parts.clear()
        assert compute_reward(text, [31], delta=5).format == 0.0
        assert sum(lines) <= 12 * len(text)  # counted once or some ten times, not a thousand times
        assert sum(parts) <= 10_000
    assert compute_reward(HOSTILE[name], [31], delta=5) == NO_REWARD
    assert time.process_time() - start < 5


def test_where_noise_begins():
    # Up to ten thousand commas and brackets are read, one more is noise.
    assert parse_response(f"{'a, ' * 9_997}{ONE}", 1) == [(1, 31.0)]  # [, { and one comma are the answer's
    assert parse_response(f"{'a, ' * 9_998}{ONE}", 1) is None
    assert parse_response("a, " * 20_000 + "</think>" + ONE, 1) is None
    assert parse_response("<think>" + "a, " * 20_000 + "</think>" + ONE, 1) == [(1, 31.0)]  # set aside unread
    # Lines and prose before an answer do not change what is read: the text is cut there, and only for json.
    for before in ("word " * 5_000, "[x\n" * 900 + "word " * 5_000, "[20, 30)" + "word " * 5_000 + "{x"):
        assert parse_response(f"{before}{ONE}", 1) == [(1, 31.0)]
        assert is_strict_format(f"{before}{ONE}", 1) is False
    spread = "[" + "\n" * 30_000 + ONE[1:]
    assert is_strict_format(spread, 1) and is_strict_format(f"\n{spread}\n", 1)
    assert not is_strict_format(f"{' ' * 30_000}x{spread}", 1)


def test_an_answer_after_much_prose_is_found():
    assert parse_response("word " * 400_000 + ONE, 1) == [(1, 31.0)]
    assert parse_response("see [sic] " * 900 + ONE, 1) == [(1, 31.0)]
    assert parse_response("see [sic] " * 1100 + ONE, 1) is None  # over a thousand brackets are noise


def test_no_cut_of_an_answer_is_an_answer():
    text = answer((3, 1.5), (1, -2), (2, "4e1"))
    assert parse_response(text, 3) == [(3, 1.5), (1, -2.0), (2, 40.0)]
    for start, end in itertools.combinations(range(len(text) + 1), 2):
        if (start, end) != (0, len(text)):
            assert parse_response(text[start:end], 3) is None


NUMBERS = ["0", "-0.0", "17", "3.5", "1e308", "-1e308", "1e-400", "1e400", "9" * 400, "-" + "9" * 5000, "NaN"]
NUMBERS += ["Infinity", "-Infinity", "true", "null", '"5"', "[5]", "{}", "\u0663", "1e", "--1"]
PIECES = [*'[]{},:" ', *"\\\0\x1b\n\u2028\ufeff\ud83d\u00e9", "\\u12", "<think>", "</think>", "```json\n"]
PIECES += ["```", "[sic]", "[1]", "[[[[", "]]]]", '"image_id"', '"value"', '{"image_id": 1, "value": 5}']
PIECES += ["[]", "{}", "[" * 2000, *NUMBERS]


def random_text(rng, n):
    """An answer for n images, or something more or less like one."""
    ids = rng.sample(range(1, n + 1), n)
    kind = rng.randrange(10)
    if kind == 0:  # repeated, missing, unknown, odd ids
        ids = rng.choices([*range(n + 2), -1, "1.0", "true", '"1"', "9" * 5000], k=rng.randrange(n + 2))
    odd_values = rng.random() < 0.2
    text = answer(*[(i, rng.choice(NUMBERS) if odd_values else rng.randrange(100)) for i in ids])
    if kind == 1:  # a wrapper, a second list
        around = ["[{}]", '{{"answer": {}}}', "{0} {0}", "{0}{0}", "[1] {}", "[{}", "{}]", '"{}"']
        text = rng.choice(around).format(text)
    elif kind == 2:  # cut short, or a half before the whole
        cut = text[: rng.randrange(len(text))]
        text = rng.choice([cut, cut + text, cut + "\n" + text, text + cut])
    elif kind in (3, 4, 5):  # a few edits
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(["", rng.choice(PIECES)]) + text[at + rng.randrange(3) :]
    elif kind == 6:  # any pieces at all
        text = "".join(rng.choices(PIECES, k=rng.randrange(30)))
    elif kind == 7:  # control characters and the like
        at = rng.randrange(len(text) + 1)
        text = text[:at] + "".join(map(chr, rng.choices(range(0x3000), k=3))) + text[at:]
    if rng.random() < 0.3:
        thinking = ["<think>{}", "<think>[1]</think>{}", "<think>a</think> <think>b</think>{}"]
        text = rng.choice(thinking).format(text)
    if rng.random() < 0.3:
        text = rng.choice(["```json\n{}\n```", "The answer: {}.", "  {}\n", "[sic] {}"]).format(text)
    return text


def test_20_000_texts():
    rng = random.Random(2)
    seen = {"none": 0, "prose": 0, "strict": 0}
    for number in range(20_000):
        n = rng.choice([1, 2, 3, 8])
        text = random_text(rng, n)
        labels = [rng.choice([0, 17, 3.5, 50]) for _ in range(n)]
        weights = rng.choice([(1, 1, 1), (1, 0, 0), (0.5, 2, 0.25)])
        result = compute_reward(text, labels, 10, *weights)
        pairs, strict = result.answer, result.format == 1
        if number % 10 == 0:  # all three read a text by the same function; two thousand texts show it
            assert (parse_response(text, n), is_strict_format(text, n)) == (pairs, strict), text

        # Nothing raised. The parts lie in [0, 1], the total is their weighted sum.
        assert all(0 <= part <= 1 for part in result[:3]), text
        assert result.format in (0, 1)
        w_reg, w_rank, w_format = weights
        assert result.total == w_reg * result.regression + w_rank * result.ranking + w_format * strict
        seen["none" if pairs is None else "strict" if strict else "prose"] += 1
        if pairs is None:
            assert result == NO_REWARD and not strict, text
            continue

        # What was parsed is an answer. Its rewards once more, by image rather than by place.
        values, place = dict(pairs), {image_id: at for at, (image_id, _) in enumerate(pairs)}
        assert sorted(values) == list(range(1, n + 1)) and len(pairs) == n, text
        assert all(type(value) is float and math.isfinite(value) for value in values.values()), text
        close = [abs(values[i + 1] - label) / 10 for i, label in enumerate(labels)]
        assert abs(result.regression - sum(1 - c**2 for c in close if c < 1) / n) < 1e-12, text
        signs = [(place[i + 1] - place[j + 1]) * (labels[i] - labels[j]) for i in range(n) for j in range(i)]
        right, wrong = sum(s > 0 for s in signs), sum(s < 0 for s in signs)
        share_right = right / (right + wrong) if right + wrong else 1  # = (1 + tau) / 2
        assert abs(result.ranking - (share_right if n > 1 else 0)) < 1e-12, text
        if strict:  # the text, less its think block, is JSON and nothing else
            body = text.split("</think>", 1)[1] if text.lstrip().startswith("<think>") else text
            assert [(entry["image_id"], entry["value"]) for entry in json.loads(body.strip())] == pairs, text
    assert min(seen.values()) > 1_000, seen  # each outcome was met often
