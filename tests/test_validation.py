"""Validation while a stage trains: what is measured, on which prompts, and that the stage ends with the best policy."""

import csv

import pytest
import torch
from runs import TINY, copies_when_logged, lines, train_here
from small_data import make_images

import data
import rarl
import train
from support.datasets import load_dataset
from support.learner.stage import RewardWeights, Stage
from support.run.checkpoints import Best
from support.run.preflight import validation_prompts

SHORT = ["--stage", "1", *TINY, "--steps1", "3"]


def test_a_stage_ends_with_its_best_policy_also_if_it_was_killed(here, signals, monkeypatch, capsys):
    """Three validations, of which the first is best; killed in step 2, after a checkpoint whose last policy is another."""
    shares, seen = [0.5, 0.3, 0.4], []

    def validate(learner, stage):
        seen.append({name: p.detach().clone() for name, p in learner.policy.model.named_parameters()})
        return [shares[len(seen) - 1]] * 4, {}

    monkeypatch.setattr(train, "validate", validate)
    with copies_when_logged((1, 2)):
        train_here(*SHORT)
    assert "the stage ends with its policy after step 1," in capsys.readouterr().err
    assert [l["reward"] for l in lines(here / "runs/rarl/validation.jsonl")] == shares
    (here / "killed-1-2" / "rarl").rename(here / "runs" / "again")
    shares += shares[2:]
    train_here(*SHORT, "--resume", "--name", "again")
    for run in ("rarl", "again"):
        saved = dict(rarl.load_policy(here / "runs" / run / "stage1").model.named_parameters())
        assert saved.keys() == seen[0].keys() and all(torch.equal(saved[name], seen[0][name]) for name in saved)
        assert not all(torch.equal(saved[name], seen[2][name]) for name in saved)


def test_what_is_measured(policy):
    """A random policy gives no valid answer; one that says the truth has the whole reward."""
    items = load_dataset("dots", split="val")
    stage = Stage(2, 1, None, RewardWeights(1, 1, 1), 10, validation_prompts(items, (4, 2), 3))
    assert list(stage.validation) == [2, 4] and {len(s.items) for s in stage.validation[4]} == {4}
    shown = [item for some in stage.validation.values() for sample in some for item in sample.items]
    assert all(item.name.startswith("dots/val/") for item in shown)
    learner = train.Learner(policy, train.start_world("cpu"), train.Settings())
    shares, rows = train.validate(learner, stage)
    assert shares == [0.0] * 6 and rows[2]["valid"] == 0 and rows[4]["n"] == 3


def test_the_share_is_a_mean_over_numbers_of_images(policy, monkeypatch):
    """Exact lists of 2, and for 4 images every value 1 off with delta 2: R_reg 0.75 of 1, so 2.75 / 3."""
    prompts = validation_prompts(load_dataset("dots", split="val"), (2, 4), 3)
    stage = Stage(2, 1, None, RewardWeights(1, 1, 1), 10, prompts)

    def truth(policy, samples, *rest):
        off = 1 if len(samples[0].items) == 4 else 0
        pairs = [sorted((item.label + off, i) for i, item in enumerate(s.items, 1)) for s in samples]
        return [
            train.evaluation.judge(s, data.format_answer((i, str(v)) for v, i in p))
            for s, p in zip(samples, pairs, strict=True)
        ]

    monkeypatch.setattr(train.evaluation, "ask", truth)
    learner = train.Learner(policy, train.start_world("cpu"), train.Settings())
    shares, rows = train.validate(learner, stage)
    assert rows[2]["reward"] == 1 and rows[4]["reward"] == pytest.approx(2.75 / 3) and rows[4]["mae"] == 1
    assert shares == pytest.approx([1] * 3 + [2.75 / 3] * 3)


def test_without_a_val_split_the_last_policy_is_kept(here, signals, capsys):
    names = [f"{i}.png" for i in range(12)]
    make_images(here / "photos", names)
    with open(here / "photos" / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        rows.writerows([name, i, "test" if i % 3 == 0 else "train"] for i, name in enumerate(names))
    train_here(*SHORT, "--steps1", "1", "--data", "csv", "--data-root", "photos", "--question", "How ripe?")
    said = capsys.readouterr().err
    assert "val split of csv is empty: no validation" in said and "best in validation" not in said
    assert not (here / "runs/rarl/validation.jsonl").exists()
    assert validation_prompts(load_dataset("dots", split="val")[:3], (1, 2, 4), 5).keys() == {1, 2}


def test_of_policies_that_chance_may_have_parted_the_later_is_kept(policy):
    """Of four prompts. The second policy is better than the first, the third by chance no worse than the second, the others are worse."""
    best, kept = Best(), []
    for step, shares in enumerate(
        # behind the second by    -          -0.5 each   -0.1 to 0.2, mean 0.05 +- 0.11   0.15 +- 0.05   0.1 each
        [[0.0, 0.1, 0.2, 0.1], [0.5, 0.6, 0.7, 0.6], [0.6, 0.4, 0.6, 0.6], [0.3, 0.5, 0.5, 0.5], [0.4, 0.5, 0.6, 0.5]],
        start=1,
    ):
        best.offer(shares, step, policy)
        kept.append(best.step)
    assert kept == [1, 2, 3, 3, 3] and best.top == [0.5, 0.6, 0.7, 0.6]  # all are held against the one that earned most
    name, weight = next(iter(policy.named_parameters()))
    assert torch.equal(best.weights[name], weight) and best.weights[name].data_ptr() != weight.data_ptr()
