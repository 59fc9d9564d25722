"""The reward of RARL (arXiv 2601.20585, reward): from the text of one answer to one number.

Version 2026.11 of "RARL, by hand"; runs with Python 3.11 alone.

For n images with labels y_1..y_n the policy writes one JSON list in ranked order, lowest first:

    [{"image_id": 2, "value": 17}, {"image_id": 1, "value": 23}]

The values y~_i are the regression, the order of the list is the predicted permutation, so that one short
answer serves both objectives:

    R_format = 1 if the text is exactly that list, else 0
    R_reg    = mean_i r_i,  r_i = 1 - (y~_i - y_i)^2 / delta^2 where |y~_i - y_i| <= delta, else 0
    tau      = (concordant - discordant) / comparable, over the pairs of images whose labels differ
    R_rank   = (1 + tau) / 2
    R_final  = w_reg R_reg + w_rank R_rank + w_format R_format

Text and numbers in, numbers out: no model, no tensors, nothing but the standard library. Whatever a model
writes, nothing here raises. Mistakes of the caller (delta = 0, a label that is NaN) are ValueErrors.

The paper states r_i, Kendall's tau, a format reward and a weighted sum. The rest is our choice:

1. tau in [-1, 1] becomes R_rank in [0, 1], so that the three rewards share one scale.
2. Pairs with equal labels are not compared (tau is then Goodman and Kruskal's gamma). If no pair can be
   compared, any order is right: R_rank = 1. One image has no order: R_rank is 0 and adds nothing to R_final.
3. All or nothing: an answer names each of the images 1..n once, each with a finite number, under exactly the
   keys "image_id" and "value". A missing, repeated or unknown image, a repeated or additional key, a boolean,
   a string, NaN, or a number beyond the range of a float makes it no answer, and every reward is 0. Partial
   credit could be farmed: answer only the easy images, or name one twice and let the better guess count.
4. R_format does not gate the others: prose or a code fence around the list costs R_format alone.
5. The order and the values may contradict each other. Each is scored on its own.
6. One leading <think>...</think> is set aside unread, since reasoning may hold drafts; left open, it is the
   whole text. A second block, or one after other text, is prose like any other.
7. The text must hold exactly one top-level JSON list, of whatever content: with two, which one is meant? So
   "[1]" beside an answer spoils it, "[sic]" does not. From left to right, each bracket is read as JSON for as
   long as that works. A complete list counts. A complete object is passed over, together with the lists in it.
   Where the reading breaks off ("[20, 30)", "{x", a list cut short), all up to there was prose, and the search
   goes on from there. A text with a thousand brackets to try, a thousand levels, or ten thousand commas and
   opening brackets is noise and no answer. So the time is linear in the length, whatever a model writes.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

Answer = list[tuple[int, float]]  # (image_id in 1..n, value) in the order listed


def _parse_int(digits: str) -> int | float:
    """An int, or inf where no float is that large: int() itself refuses, and raises, beyond 4300 digits."""
    return int(digits) if math.isfinite(float(digits)) else math.inf


# Objects become tuples of (key, value) pairs: a dict would hide that a key was repeated. NaN and Infinity are
# read, as Python does, and fail as values.
_JSON = json.JSONDecoder(object_pairs_hook=tuple, parse_int=_parse_int)
_BRACKET = re.compile(r"[\[{]")
_MAX_BRACKETS = 1000  # to try
_MAX_PARTS = 10_000  # commas and opening brackets; an answer for n images has 3 n
_MAX_READ = 10_000  # characters before a bracket; then they are cut off, since each error of json counts their lines


def _after_thinking(text: str) -> str:
    """The stripped text, without its leading think block; empty if that block is never closed."""
    text = text.strip()
    return text.partition("</think>")[2].strip() if text.startswith("<think>") else text


def _only_list(text: str) -> tuple[list[Any], str] | None:
    """(value, source) of the one top-level JSON list. None if there is none or more than one, and for noise."""
    if text.count("[") + text.count("{") + text.count(",") > _MAX_PARTS:
        return None
    lists: list[tuple[list[Any], str]] = []
    position = 0
    for _ in range(_MAX_BRACKETS):
        bracket = _BRACKET.search(text, position)
        if bracket is None:
            return lists[0] if len(lists) == 1 else None
        start = bracket.start()
        if start > _MAX_READ:
            text, start = text[start:], 0
        try:
            value, position = _JSON.raw_decode(text, start)
        except json.JSONDecodeError as error:
            position = error.pos  # not back to the second bracket: "[[[[..." would take quadratic time
        except RecursionError:
            return None  # a thousand levels deep
        else:
            if isinstance(value, list):
                lists.append((value, text[start:position]))
    return None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  # bool is an int, hence type()


def _parse(text: str, num_images: int) -> tuple[Answer | None, bool]:
    """The answer in `text` or None, and whether the text is nothing else. Everything below reads a text by this."""
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}.")
    body = _after_thinking(text)
    found = _only_list(body)
    if found is None:
        return None, False
    entries, source = found
    answer = []
    for entry in entries:
        if not isinstance(entry, tuple) or sorted(key for key, _ in entry) != ["image_id", "value"]:
            return None, False
        fields = dict(entry)
        if type(fields["image_id"]) is not int or not _is_number(fields["value"]):
            return None, False
        answer.append((fields["image_id"], float(fields["value"])))
    if sorted(image_id for image_id, _ in answer) != list(range(1, num_images + 1)):
        return None, False
    return answer, source == body


def _finite_labels(labels: Iterable[float]) -> list[float]:
    labels = [float(label) for label in labels]
    if not all(map(math.isfinite, labels)):
        raise ValueError(f"labels must be finite numbers, got {labels}.")
    return labels


def parse_response(text: str, num_images: int) -> Answer | None:
    """The answer in `text`, or None if it holds no answer.

    text: str, what the policy wrote, think block and prose included. num_images: int, n >= 1.
    Returns a list of n pairs (image_id: int in 1..n, value: float, finite, in the unit of the labels) in the
    order listed, which is the predicted order, lowest first.
    Raises ValueError if num_images < 1, never because of `text`.
    Source: arXiv 2601.20585, reward (JSON with `image_id` and a value); the form is our choice (see top).

    >>> parse_response('Sure: [{"image_id": 2, "value": 17}, {"image_id": 1, "value": 23.5}]', num_images=2)
    [(2, 17.0), (1, 23.5)]
    >>> parse_response('[{"image_id": 2, "value": 17}]', num_images=2) is None  # image 1 is missing
    True
    """
    return _parse(text, num_images)[0]


def is_strict_format(text: str, num_images: int) -> bool:
    """Whether `text` is exactly one answer: nothing but white space and one leading think block around it.

    Arguments and errors as in `parse_response`.
    Returns a bool, True only where `parse_response` finds an answer.
    Source: arXiv 2601.20585, reward (R_format); the form is our choice.

    >>> is_strict_format('<think>I see one face.</think> [{"image_id": 1, "value": 31}]', num_images=1)
    True
    >>> is_strict_format('Image 1 is about 31: [{"image_id": 1, "value": 31}]', num_images=1)
    False
    """
    return _parse(text, num_images)[1]


def kendall_tau(ranking: Sequence[int], labels: Iterable[float]) -> float:
    """Kendall's tau of a predicted order against the true labels, over the pairs whose labels differ.

    ranking: the n image ids 1..n, lowest first. labels: n finite numbers, labels[i] belongs to image i + 1.
    Returns a float in [-1, 1]: 1 for the true order, -1 for its reverse, nan if no two labels differ.
    Raises ValueError if ranking is no permutation of 1..n or a label is not finite.
    Source: arXiv 2601.20585, reward (Kendall's tau); leaving tied labels out is our choice.

    >>> kendall_tau([2, 1, 3], labels=[20, 10, 30])
    1.0
    >>> kendall_tau([3, 1, 2], labels=[20, 10, 30])  # all three pairs are the wrong way round
    -1.0
    """
    labels = _finite_labels(labels)
    if sorted(ranking) != list(range(1, len(labels) + 1)):
        raise ValueError(f"ranking must name each of the images 1..{len(labels)} once, got {ranking}.")
    listed = [labels[image_id - 1] for image_id in ranking]
    signs = [1 if first < second else -1 for first, second in combinations(listed, 2) if first != second]
    return sum(signs) / len(signs) if signs else math.nan


def value_reward(value: float, label: float, delta: float) -> float:
    """r_i, what one value earns: 1 where it is right, falling as a parabola to 0 at an error of delta, and 0 beyond.

    value, label: finite numbers in the same unit. delta: the tolerance, > 0, in that unit. Returns a float in [0, 1].
    Source: arXiv 2601.20585, reward: r_i = 1 - |y~_i - y_i|^2 / delta^2 where |y~_i - y_i| <= delta, else 0.
    This is the only place that knows its form: training, evaluation, blind policies and even drawing all call it.

    >>> value_reward(35, label=30, delta=10)
    0.75
    """
    error = (value - label) / delta  # in units of delta
    return max(0.0, 1 - error * error)  # error ** 2 would raise where error * error is inf


class _Rewards(NamedTuple):
    format: float
    regression: float
    ranking: float
    total: float


class Reward(_Rewards):
    """R_format (0 or 1), R_reg and R_rank (both in [0, 1]) and their weighted sum R_final: a tuple of four.

    Beside it, `answer` is what was read: (image_id, value) pairs as `parse_response` gives them, None if there is
    no answer. So a text need not be parsed again for its values.
    """

    answer: Answer | None = None


def compute_reward(
    text: str, labels: Iterable[float], delta: float, w_reg: float = 1, w_rank: float = 1, w_format: float = 1
) -> Reward:
    """The rewards of one answer: see the equations at the top of this file.

    text: str, what the policy wrote. labels: n >= 1 finite numbers, labels[i] belongs to image i + 1.
    delta: the tolerance, > 0, in the unit of the labels: an error of delta or more earns nothing.
    w_reg, w_rank, w_format: the weights, >= 0.
    Returns a `Reward`, all zeros if the text holds no answer. With one image `ranking` is 0.
    Raises ValueError for labels, delta or weights outside these ranges, never because of `text`.
    Source: arXiv 2601.20585, reward (r_i, weighted sum); the form of R_rank and R_format is our choice.

    The errors are 0 and 5, so R_reg = (1 + 0.75) / 2; the order is right:

    >>> answer = '[{"image_id": 2, "value": 20}, {"image_id": 1, "value": 35}]'
    >>> compute_reward(answer, labels=[30, 20], delta=10)
    Reward(format=1.0, regression=0.875, ranking=1.0, total=2.875)
    """
    labels = _finite_labels(labels)
    if not labels:
        raise ValueError("labels must hold one number per image, got none.")
    if not 0 < delta < math.inf:
        raise ValueError(f"delta must be positive and finite, got {delta}.")
    for name, weight in (("w_reg", w_reg), ("w_rank", w_rank), ("w_format", w_format)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {weight}.")

    answer, strict = _parse(text, len(labels))
    if answer is None:
        return Reward(0.0, 0.0, 0.0, 0.0)

    # fsum is exact, so the same values listed in another order earn the same to the last bit: no advantage by rounding.
    regression = math.fsum(value_reward(value, labels[image_id - 1], delta) for image_id, value in answer) / len(answer)

    ranking = 0.0
    if len(labels) > 1:
        tau = kendall_tau([image_id for image_id, _ in answer], labels)
        ranking = 1.0 if math.isnan(tau) else (1 + tau) / 2

    total = w_reg * regression + w_rank * ranking + w_format * strict
    reward = Reward(float(strict), regression, ranking, total)
    reward.answer = answer
    return reward
