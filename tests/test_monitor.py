"""support/show/monitor.py: what is logged of a step, what a run is warned of, and what trackers are told, by stand-ins."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from runs import TINY, lines, train_here

import data
import reward
from support.datasets import load_dataset
from support.learner.stage import Batch, RewardWeights, Stage
from support.run.settings import Settings
from support.show import monitor
from support.show.monitor import Clock, Warnings, rollout_metrics, rollout_numbers
from support.show.results import finite


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


def test_rewards_that_differ_in_the_last_bit_are_no_spread():
    """0.1 + 0.2 is not 0.3 in floating point."""
    groups = [[0.1 + 0.2, 0.3], [0.3, 0.3 + 1e-6]]
    rewards = [reward.Reward(0.0, x, 0.0, x) for group in groups for x in group]
    none = torch.zeros(4, 1)
    samples = data.make_samples(load_dataset("dots"), 1, 2)
    batch = Batch([], none.long(), none.bool(), none, none[:, 0].bool(), torch.zeros(2, 2), samples=samples,
                  sampled_rewards=rewards)  # fmt: skip
    assert rollout_numbers(batch)["zero_spread"] == [True, False]


def test_metrics_are_means_over_all_ranks_not_of_their_means():
    # Rank 0 has one valid value (error 1), rank 1 three (errors 3, 3, 5): mean 3; the mean of means would be 2.33.
    rank = lambda errors: {"mae": errors, "reward": [1.0], "advantage": [0.0]}
    assert rollout_metrics([rank([1.0]), rank([3.0, 3.0, 5.0])])["mae"] == 3
    assert rollout_metrics([rank([]), rank([])])["mae"] is None


def test_a_clock_knows_what_took_how_long(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.5, 10.0])
    monkeypatch.setattr("support.show.monitor.time.perf_counter", lambda: next(now))
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
    assert only.startswith("dead start: so far the answers of every group") and "--temperature" in only
    for change in ({"zero_spread": 0.9}, {"reward": 2.0}):  # some groups have spread; all answers are right
        warnings = Warnings()
        assert said(change) == []


# --- trackers -----------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Both, as modules that write down what they are told: (name, value, step)."""
    told = SimpleNamespace(scalars=[], logs=[], purged=[], started=[])

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.started.append(folder)
            told.purged.append(purge_step)

        def add_scalar(self, name, value, step):
            told.scalars.append((name, value, step))

        def flush(self):
            pass

    def init(**how):
        told.started.append(how)
        fake["wandb"].run = how

    fake = {name: ModuleType(name) for name in ("torch.utils.tensorboard", "wandb")}
    vars(fake["torch.utils.tensorboard"]).update(SummaryWriter=SummaryWriter)
    log = lambda numbers, step: told.logs.append((numbers, step))
    vars(fake["wandb"]).update(run=None, init=init, log=log)
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return told


def test_what_is_written_is_sent_under_the_same_names(here, signals, installed):
    train_here(*TINY, "--track", "wandb")
    (started,) = installed.started  # once for both stages
    assert started["name"] == "rarl" and started["config"]["steps1"] == 1
    scalars = [(name, value, step) for numbers, step in installed.logs for name, value in numbers.items()]
    for step, line in enumerate(lines(here / "runs/rarl/metrics.jsonl")):  # stage 2 goes on where stage 1 ended
        for name in line.keys() - {"stage", "step"}:
            assert line[name] is None or (name, line[name], step) in scalars
    assert {name for name, _, step in scalars if step == 1} >= {"validation/reward", "validation/2/tau", "reward"}


def test_tensorboard_goes_on_at_the_step_that_comes_next(installed):
    send = monitor.start_tracker(Settings(track="tensorboard"), Path("runs/rarl"), 7, True)
    send(7, {"reward": 1.0, "ranking": None})
    assert (installed.started, installed.purged, installed.scalars) == (
        ["runs/rarl/tensorboard"],
        [7],
        [("reward", 1.0, 7)],
    )


def test_what_is_not_installed_is_named_before_anything_starts(here, signals, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train_here("--track", "wandb")
    assert "--track wandb: the package wandb is not installed: pip install wandb" in capsys.readouterr().err
    assert not (here / "runs" / "rarl").exists()
    assert (
        monitor.start_tracker(Settings(), here, 0, True)(0, {"reward": 1.0}) is None
    )  # nothing asked for, nothing sent
