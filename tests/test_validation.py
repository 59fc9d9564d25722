"""Validation while a stage trains: what is measured, on which prompts, and that the stage ends with the best policy."""

import csv

import pytest
import torch
from runs import lines, train_here, train_until_killed
from small_data import make_images

import data
import rarl
import train
from support.datasets import load_dataset
from support.learner.stage import RewardWeights, Stage
from support.run.checkpoints import Best
from support.run.preflight import validation_prompts

SHORT = ["--stage", "1", "--eval-samples", "1", "--watch-every", "0"]


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A run here whose validations give these shares in turn. -> function: shares -> the weights that each one saw"""
    monkeypatch.chdir(tmp_path)

    def script(*shares):
        seen = {}

        def validate(learner, stage):
            step = 1 + len(lines(tmp_path / "runs/rarl/validation.jsonl"))
            seen[step] = {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}
            return [shares[step - 1]] * 4, {}

        monkeypatch.setattr(train, "validate", validate)
        return seen

    return script


def assert_ends_with(folder, weights):
    saved = dict(rarl.load_policy(folder / "stage1").model.named_parameters())
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)


@pytest.mark.parametrize("shares, best", [((0.3, 0.5, 0.4), 2), ((0.3, 0.4, 0.5), 3)])
def test_a_stage_ends_with_its_best_policy(scripted, tmp_path, capsys, shares, best):
    seen = scripted(*shares)
    train_here(*SHORT)
    assert_ends_with(tmp_path / "runs/rarl", seen[best])
    assert f"the stage ends with its policy after step {best}," in capsys.readouterr().err
    assert [l["reward"] for l in lines(tmp_path / "runs/rarl/validation.jsonl")] == list(shares)


def test_the_best_policy_survives_a_kill(scripted, tmp_path):
    """Killed in step 2 after a checkpoint whose best policy is an older one than its last."""
    seen = scripted(0.5, 0.3, 0.4)
    train_until_killed(1, 2, *SHORT)
    best = seen.pop(1)
    train_here(*SHORT, "--resume")
    assert seen.keys() == {2, 3}
    assert_ends_with(tmp_path / "runs/rarl", best)


def test_what_is_measured(policy):
    """A random policy gives no valid answer; one that says the truth has the whole reward."""
    items = load_dataset("dots", split="val")
    stage = Stage(2, 1, None, RewardWeights(1, 1, 1), 10, validation_prompts(items, (4, 2), 3))
    assert list(stage.validation) == [2, 4] and {len(s.items) for s in stage.validation[4]} == {4}
    assert all(
        item.name.startswith("dots/val/") for some in stage.validation.values() for s in some for item in s.items
    )
    learner = train.Learner(policy, train.start_world("cpu"), train.Settings())
    shares, rows = train.validate(learner, stage)
    assert shares == [0.0] * 6 and rows[2]["valid"] == 0 and rows[4]["n"] == 3


def test_the_share_is_a_mean_over_numbers_of_images(policy, monkeypatch):
    """Exact lists of 2, and for 4 images every value 2 off with delta 4: R_reg 0.75 of 1, so 2.75 / 3."""
    stage = Stage(
        2,
        1,
        None,
        RewardWeights(1, 1, 1),
        10,
        validation_prompts(load_dataset("dots", split="val"), (2, 4), 3),
    )

    def truth(policy, samples, *rest):
        off = 2 if len(samples[0].items) == 4 else 0
        pairs = [sorted((item.label + off, i) for i, item in enumerate(s.items, 1)) for s in samples]
        return [
            train.evaluation.judge(s, data.format_answer((i, str(v)) for v, i in p))
            for s, p in zip(samples, pairs, strict=True)
        ]

    monkeypatch.setattr(train.evaluation, "ask", truth)
    learner = train.Learner(policy, train.start_world("cpu"), train.Settings())
    shares, rows = train.validate(learner, stage)
    assert rows[2]["reward"] == 1 and rows[4]["reward"] == pytest.approx(2.75 / 3) and rows[4]["mae"] == 2
    assert shares == pytest.approx([1] * 3 + [2.75 / 3] * 3)


def test_without_a_val_split_the_last_policy_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [f"{i}.png" for i in range(12)]
    make_images(tmp_path / "photos", names)
    with open(tmp_path / "photos" / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        rows.writerows([name, i, "test" if i % 3 == 0 else "train"] for i, name in enumerate(names))
    train_here(
        *SHORT,
        "--data",
        "csv",
        "--data-root",
        "photos",
        "--question",
        "How ripe?",
        "--images",
        "2",
        "--batch-size",
        "2",
    )
    said = capsys.readouterr().err
    assert "val split of csv is empty: no validation" in said and "the best in validation" not in said
    assert lines(tmp_path / "runs/rarl/validation.jsonl") == []
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
