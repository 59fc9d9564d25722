"""support/show/monitor.py: what is logged of a step, and what a run is warned of."""

import json
import math

import torch

import data
from support.datasets import load_dataset
from support.learner.stage import Batch, RewardWeights, Stage
from support.show.clock import Clock
from support.show.monitor import Warnings, dead_base, progress_text, rollout_metrics, rollout_numbers
from support.show.tables import finite


def test_whatever_the_policy_writes_the_log_goes_on():
    samples = data.make_samples(load_dataset("dots"), 2, 1)
    huge = '[{"image_id": 1, "value": 1e308}, {"image_id": 2, "value": -1.7e308}]'
    texts = [huge, huge, "[" * 10**5, '[{"image_id": 1, "value": NaN}]']
    stage = Stage(2, 1, None, RewardWeights(1, 1, 1), 10)
    rewards = [stage.reward(text, samples[0]) for text in texts]
    mask = torch.ones(4, 3, dtype=torch.bool)
    batch = Batch([], mask.long(), mask, mask.float(), torch.zeros(4, dtype=torch.bool), torch.zeros(1, 4),
                        samples=samples, texts=texts, sampled_rewards=rewards, sampled_tokens=mask.sum(1))  # fmt: skip
    log = rollout_metrics([rollout_numbers(batch)])
    assert log["mae"] > 1e300 and log["format"] == 0.5 and log["zero_spread"] == 0
    assert json.loads(json.dumps(finite(log | {"loss": math.nan}), allow_nan=False))["loss"] is None


def test_metrics_are_means_over_all_ranks_not_of_their_means():
    # Rank 0 has one valid value (error 1), rank 1 three (errors 3, 3, 5): mean 3; the mean of means would be 2.33.
    rank = lambda errors: {"mae": errors, "reward": [1.0], "advantage": [0.0]}
    assert rollout_metrics([rank([1.0]), rank([3.0, 3.0, 5.0])])["mae"] == 3
    assert rollout_metrics([rank([]), rank([])])["mae"] is None


def test_the_progress_line_shows_the_base():
    log = {"images": 2, "reward": 2.5, "format": 1.0, "mae": 1.25, "ranking": 0.875, "kl": 0.5, "zero_spread": 0.0}
    base = {"mae": 2.5, "tau": math.nan, "valid": 1.0}
    text = progress_text(log, base)
    assert text == "2 images reward=2.50 format=1.00 mae=1.25 (base 2.50) tau=0.75 kl=0.50 no spread=0.00"
    assert "tau=0.75 (base -0.25)" in progress_text(log, base | {"tau": -0.25})
    assert "tau" not in progress_text(log | {"images": 1, "ranking": None}, {}) and "(base" not in progress_text(
        log, {}
    )


def test_a_clock_knows_what_took_how_long(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.5, 10.0])
    monkeypatch.setattr("support.show.clock.time.perf_counter", lambda: next(now))
    clock = Clock()
    for phase in ("rollout", "update", "rollout"):
        clock.lap(phase)
    assert clock.take() == {"rollout": 1.5, "update": 2.0}
    clock.lap("other")
    assert clock.take() == {"other": 6.5}


def test_watch_names_the_failure_signatures_once():
    fine = {"zero_spread": 0.1, "reward": 1.0, "format": 1.0, "regression": 0.5, "ranking": 0.5, "grad_norm": 1.0}

    def said(change):
        watch = Warnings(steps=5, first_steps=10**6)
        first = [watch(fine | {"format": 0.2}, 3.0) for _ in range(5)]
        return [w.split(":")[0] for w in first + [watch(fine | change, 3.0) for _ in range(30)] if w]

    assert said({"regression": 0.9}) == []
    assert said({"zero_spread": 1.0, "format": 0.2}) == ["collapse"]
    assert said({"grad_norm": 1e-6, "format": 0.2}) == ["stuck"]
    assert said({"format": 0.9}) == ["reward hacking"]


def test_dead_starts_are_named():
    alike = {"zero_spread": 1.0, "reward": 0.0, "format": 0.0, "regression": 0.0, "ranking": None, "grad_norm": 0.1}
    said = lambda change: [w for _ in range(8) if (w := warnings(alike | change, 2.0))]
    warnings = Warnings()
    (only,) = said({})
    assert only.startswith("dead start: in the first 5 steps") and "--temperature" in only
    for change in ({"zero_spread": 0.9}, {"reward": 2.0}):  # some groups have spread; all answers are right
        warnings = Warnings()
        assert said(change) == []
    rows = {1: {"n": 100, "valid": 0.06}, 2: {"n": 100, "valid": 0.02}}  # 4 % of all
    assert dead_base(rows).startswith("dead start: 4.0% of the base's answers are valid")
    assert dead_base({1: {"n": 100, "valid": 0.06}}) is None
