"""rmo.py: which groups are mutated, which answers in them, by what, and how often."""

import doctest
import math
import random
from collections import Counter

import pytest
import torch

import rmo

ALWAYS = 1.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mutate(rewards, k=1, probability=ALWAYS, references=("R",), rng=None, **kwargs):
    """A group whose responses are named by their index. Homogeneous is up to 0.1 here, poor up to 0.5."""
    responses, bounds = [str(i) for i in range(len(rewards))], {"spread": 0.1, "poor": 0.5} | kwargs
    return rmo.mutate(responses, rewards, references, k, probability, rng=rng or generator(), **bounds)


# ---- which answers, by what


def test_the_k_lowest_are_replaced():
    # in order: 0.00 (index 2), 0.05 (0), 0.10 (3), 0.20 (1); std 0.074, best 0.20: homogeneous and poor
    rewards = [0.05, 0.20, 0.00, 0.10]
    assert mutate(rewards, k=1) == (["0", "1", "R", "3"], [False, False, True, False])
    assert mutate(rewards, k=2) == (["R", "1", "R", "3"], [True, False, True, False])
    assert mutate(rewards, k=3) == (["R", "1", "R", "R"], [True, False, True, True])


def test_ties_are_broken_at_random():
    # 5 equal answers, k = 2, 5000 groups: 2000 times each, give or take 5 sqrt(5000 * 0.4 * 0.6) = 173
    rng = generator()
    hits = Counter()
    for _ in range(5000):
        hits.update(i for i, was in enumerate(mutate([0.0] * 5, k=2, rng=rng)[1]) if was)
    assert sum(hits.values()) == 10_000
    assert all(abs(hits[i] - 2000) < 173 for i in range(5))


def test_a_tie_is_random_only_among_the_tied():
    # the lowest (index 3) always goes; the second place is shared by 0 and 2; 1 is the best and never goes
    seen = {tuple(mutate([0.1, 0.2, 0.1, 0.0], k=2, rng=generator(seed))[1]) for seed in range(40)}
    assert seen == {(True, False, False, True), (False, False, True, True)}


def test_each_reference_is_used_once_before_any_is_used_twice():
    for seed in range(40):
        responses, mutated = mutate([0.0] * 6, k=3, references=["A", "B", "C"], rng=generator(seed))
        assert sorted(r for r, was in zip(responses, mutated, strict=True) if was) == ["A", "B", "C"]
        responses, mutated = mutate([0.0] * 6, k=5, references=["A", "B"], rng=generator(seed))
        counts = Counter(r for r, was in zip(responses, mutated, strict=True) if was)
        assert sorted(counts.values()) == [2, 3]


def test_references_are_drawn_uniformly():
    # 3 references, 3000 groups: 1000 each, give or take 5 sqrt(3000 * 1/3 * 2/3) = 129
    rng = generator()
    drawn = Counter(r for _ in range(3000) for r in mutate([0.0] * 2, references=list("ABC"), rng=rng)[0])
    assert all(abs(drawn[name] - 1000) < 129 for name in "ABC")


# ---- which groups


def test_probability_is_the_share_of_groups():
    # 4000 groups at 0.3: 1200, give or take 5 sqrt(4000 * 0.3 * 0.7) = 145
    rng = generator()
    share = sum(any(mutate([0.0] * 4, probability=0.3, rng=rng)[1]) for _ in range(4000))
    assert abs(share - 1200) < 145


@pytest.mark.parametrize(
    ("rewards", "bounds", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], {}, True),
        ([0.9, 0.9, 0.9, 0.9], {}, False),  # homogeneous but good
        ([0.0, 0.0, 0.0, 0.5], {}, False),  # poor but diverse: std sqrt(3)/4 * 0.5 = 0.217
        ([0.0, 0.0, 0.0, 0.5], {"spread": 0.22}, True),
        ([0.0, 0.0, 0.0, 0.5], {"spread": 0.22, "poor": 0.49}, False),  # one good answer teaches already
        (
            [1.0, 3.0, 1.0, 3.0],
            {"spread": 1.0, "poor": 3.0},
            True,
        ),  # std 1 over G (1.155 over G - 1); bounds are included
        ([1.0, 3.0, 1.0, 3.0], {"spread": 0.99, "poor": 3.0}, False),
        ([1.0, 3.0, 1.0, 3.0], {"spread": 1.0, "poor": 2.99}, False),
        ([0.1 * 3] * 7, {"spread": 0.0}, True),  # equal is equal: a rounded mean would see a spread of 1e-17
        ([-1.0, -1.0], {}, True),
    ],
)
def test_only_homogeneous_and_poor_groups(rewards, bounds, expected):
    assert any(mutate(rewards, **bounds)[1]) == expected


@pytest.mark.parametrize("off", [{"k": 0}, {"probability": 0.0}, {"references": []}, {"rewards": [1.0] * 4}])
def test_an_unchanged_group(off):
    for seed in range(20):
        settings = {"rewards": [0.0] * 4, "rng": generator(seed)} | off
        assert mutate(**settings) == (["0", "1", "2", "3"], [False] * 4)


# ---- conduct


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_inputs_stay(probability):
    responses, rewards, references = ["a", "b", "c"], [0.0, 0.1, 0.0], ["R", "S"]
    result, mutated = rmo.mutate(responses, rewards, references, 2, probability, rng=generator())
    assert (responses, rewards, references) == (["a", "b", "c"], [0.0, 0.1, 0.0], ["R", "S"])
    assert result is not responses
    assert sum(mutated) == 2 * probability
    assert [r != o for r, o in zip(result, responses, strict=True)] == mutated


def test_every_group_draws_as_many_numbers():
    # 1 + G + k, so that the next group's luck does not hang on this one's rewards, references or trigger
    def state_after(**kwargs):
        rng = generator()
        mutate(**{"rewards": [0.0] * 4, "k": 2, "rng": rng} | kwargs)
        return rng.get_state()

    expected = generator()
    torch.rand(1 + 4 + 2, generator=expected, dtype=torch.float64)
    for kwargs in (
        {},
        {"rewards": [1.0] * 4},
        {"references": []},
        {"references": list("ABCDEF")},
        {"probability": 0.0},
    ):
        assert torch.equal(state_after(**kwargs), expected.get_state())


def test_the_global_generators_are_left_alone():
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    mutate([0.0] * 4, k=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


class Constant:
    """Anything with .random() will do, NumPy's generators too."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def test_probability_is_compared_with_a_number_below_1():
    largest = math.nextafter(1.0, 0.0)
    assert any(mutate([0.0] * 3, probability=1.0, rng=Constant(largest))[1])
    assert not any(mutate([0.0] * 3, probability=0.0, rng=Constant(0.0))[1])
    for n in range(1, 50):  # and the largest draw stays inside the references
        references = [str(i) for i in range(n)]
        assert references[-1] in mutate([0.0] * 3, references=references, rng=Constant(largest))[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 4}, ValueError, "k must be in 0..3"),  # all replaced: equal again, no gradient
        ({"k": 5}, ValueError, "k must be"),
        ({"k": -1}, ValueError, "k must be"),
        ({"probability": 1.5}, ValueError, "probability"),
        ({"probability": -0.1}, ValueError, "probability"),
        ({"probability": math.nan}, ValueError, "probability"),
        ({"rewards": [0.0] * 3}, ValueError, "one per response"),
        ({"rewards": [[0.0] * 4]}, ValueError, "one per response"),
        ({"rewards": [0.0, 0.0, 0.0, math.nan]}, ValueError, "finite"),
        ({"rewards": [0.0, 0.0, 0.0, -math.inf]}, ValueError, "finite"),
        ({"references": "truth"}, TypeError, "references"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    settings = {"rewards": [9.0] * 4, "references": [], "k": 1, "probability": 0.0} | change
    with pytest.raises(error, match=message):  # even where nothing would be mutated: a wrong setting shows at once
        rmo.mutate(["a", "b", "c", "d"], **settings, rng=generator())


def test_docstring_examples():
    assert doctest.testmod(rmo).attempted > 0
    assert doctest.testmod(rmo).failed == 0
