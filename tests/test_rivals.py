"""experiments/rivals.py: each rival by hand, and that an unknown one is an error."""

import math
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_data import item
from test_collect import G, answer, collect, items, make_learner, make_stage, says  # noqa: F401

import data
import grpo
import rarl
import reward
import train
from experiments import rivals
from support.learner.stage import Batch, RewardWeights, Stage


def by_hand(rewards, sampled=None, mutated=None):
    """A batch of these rewards, (B, G); numbers are totals."""
    scored = [
        r if isinstance(r, reward.Reward) else reward.Reward(1.0, 0.0, 0.0, r) for group in rewards for r in group
    ]
    totals = torch.tensor([r.total for r in scored])
    N = len(scored)
    return Batch([], torch.zeros(N, 1), torch.ones(N, 1), torch.zeros(N, 1), torch.tensor(mutated or [False] * N),
                 grpo.group_advantages(totals.view(len(rewards), -1)), rewards=scored, max_reward=3.0,
                 samples=[data.Sample([item("a", 1)])] * len(rewards),
                 sampled_rewards=[reward.Reward(1.0, 0.0, 0.0, x) for x in sampled or totals.tolist()])  # fmt: skip


def test_advantages_by_hand():
    stage = Stage(2, 1, None, RewardWeights(1, 2, 1), 10)  # w_rank = 2
    # regression 0, 1 and ranking 1, 0: the sum has no spread, each part has. Weighted by 1 and 2: -1 + 2 and 1 - 2.
    batch = by_hand([[reward.Reward(1.0, 0.0, 1.0, 2.0), reward.Reward(1.0, 1.0, 0.0, 2.0)]])
    assert rivals.dr_grpo(None, stage, batch).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(rivals.gdpo(None, stage, batch).float(), torch.tensor([[1.0, -1.0]]), atol=1e-3, rtol=0)
    # 2, 2 and the best, 3: mean 7/3, std sqrt(2)/3, A = -1/sqrt(2)
    torch.testing.assert_close(
        rivals.ngrpo(None, stage, batch).float(), torch.full((1, 2), -math.sqrt(0.5)), atol=1e-3, rtol=0
    )
    # OraRL: 1 and 2 have the mean 3/2 and the std 1/2, with the truth's 3 the std sqrt(2/3). So 1/2 becomes sqrt(2/3), and the mean
    # of -1/2 and sqrt(2/3), is taken off. 0 and 0.1 would grow 28 times, which is cut to 4: -0.05 and 0.2, less their mean.
    half = (math.sqrt(2 / 3) + 0.5) / 2
    expected = torch.tensor([[-half, half], [-0.125, 0.125], [0.0, 0.0]])
    orarl = rivals.orarl(None, stage, by_hand([[1.0, 2.0], [0.0, 0.1], [2.0, 2.0]]))
    torch.testing.assert_close(orarl.float(), expected, atol=1e-4, rtol=0)


def test_outside_its_mean_a_mutated_answer_keeps_its_pull_and_pushes_nobody():
    batch = by_hand([[3.0, 1.0, 1.0, 2.0]], mutated=[True, False, False, False])
    # All four: mean 7/4, std sqrt(11)/4, so 3 has 5/sqrt(11). The sampled three: mean 4/3, std sqrt(2)/3.
    expected = torch.tensor([[5 / math.sqrt(11), -math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2)]])
    torch.testing.assert_close(rivals.outside(None, None, batch), expected, atol=1e-3, rtol=0)
    # 0.5 is the best that was sampled (the first 0 was replaced). In a mean with the truth its advantage is negative.
    batch = by_hand([[3.0, 0.0, 0.0, 0.5]], sampled=[0.0, 0.0, 0.0, 0.5], mutated=[True, False, False, False])
    assert rivals.numbers(batch)["inverted"] == [False, False, False, True]
    batch.advantages = rivals.outside(None, None, batch)
    assert not any(rivals.numbers(batch)["inverted"])


def test_orarl_updates_on_the_truth_beside_every_group_and_on_half_of_it(policy, items, monkeypatch):  # noqa: F811
    stage, learner = make_stage(items), make_learner(policy, rmo_k=0)
    samples = stage.sampler.batch(0)
    true = [data.reference_answer(sample) for sample in samples]
    says(monkeypatch, lambda b, g: true[b] if g == 2 else "no")
    batch, updated = collect(learner, stage, samples=samples), []
    monkeypatch.undo()
    monkeypatch.setattr(rivals, "standard_update", lambda learner, optimizer, batch: updated.append(batch))
    rivals.update_with_truth(learner, None, batch)
    rivals.update_half_with_truth(learner, None, batch)
    for wide, kept in zip(updated, ([0, 1, 2, 3], [0, 2]), strict=True):  # of 4, the lowest and the highest
        rows = len(kept) + 1
        assert (
            wide.advantages.shape == (3, rows)
            and wide.mutated.view(3, rows).tolist() == [[False] * len(kept) + [True]] * 3
        )
        # One of four earns 3: the mean is 3/4, 3/4 of what the truth earns is missing. Of two: 1/2.
        torch.testing.assert_close(wide.advantages[:, -1], torch.full((3,), (1 - 1 / len(kept)) ** 2))
        assert torch.equal(wide.advantages[:, :-1], batch.advantages[:, kept])
        texts = rarl.decode(policy, wide.ids, wide.mask)
        assert [texts[rows * b + len(kept)] for b in range(3)] == true
        for b in range(3):
            sampled = [batch.ids[b * G + g][batch.mask[b * G + g]] for g in kept]
            ours = [wide.ids[b * rows + i][wide.mask[b * rows + i]] for i in range(len(kept))]
            assert all(map(torch.equal, sampled, ours))


def test_advantages_take_the_place_of_the_method_s(policy, items, monkeypatch):  # noqa: F811
    stage = make_stage(items)
    samples = stage.sampler.batch(0)
    says(monkeypatch, lambda b, g: answer((1, 0.0), (2, 0.0)) if g else "no")
    monkeypatch.setattr(train, "collect", rivals.with_advantages(rivals.dr_grpo))
    batch = collect(make_learner(policy, rmo_k=0), stage, samples=samples)
    totals = torch.tensor([r.total for r in batch.rewards]).view(3, G)
    torch.testing.assert_close(batch.advantages, totals - totals.mean(1, keepdim=True))


def test_imitation_raises_the_probability_of_the_truth_with_the_gradient_of_the_likelihood(policy, items):  # noqa: F811
    stage, learner = make_stage(items), make_learner(policy)
    samples = stage.sampler.batch(0)
    prompts = data.make_prompts(learner.policy, samples)
    learner.prepare(prompts)
    batch = rivals.imitate(learner, stage, 0, samples, prompts, {})
    assert [r.total for r in batch.rewards] == [3.0] * 3
    assert rarl.decode(learner.policy, batch.ids, batch.mask) == [data.reference_answer(sample) for sample in samples]
    logp, _ = rarl.logprobs(learner.policy, prompts, batch.ids, batch.mask)
    (-(logp * batch.mask).sum(1) / batch.mask.sum(1)).mean().backward()
    norm = torch.stack([p.grad.norm() for p in learner.policy.parameters() if p.grad is not None]).norm().item()
    learner.policy.zero_grad()
    optimizer = torch.optim.SGD(learner.policy.parameters(), lr=0.0)
    assert train.update(learner, optimizer, batch)["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_an_unknown_rival_is_an_error_and_a_known_one_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", lambda argv: (argv, train.collect))
    with pytest.raises(SystemExit):
        rivals.main(["grp0"])
    assert "invalid choice: 'grp0'" in capsys.readouterr().err
    for module, name in ((train, "collect"), (rivals.monitor, "rollout_numbers")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    rivals.main(["imitation", "--beta", "0"])
    assert train.collect is rivals.imitate and rivals.monitor.rollout_numbers is rivals.numbers


def test_a_batch_s_concordance_is_an_answer_s_among_the_means_of_the_other_prompts():
    batch = by_hand([[1.0, 1.0, 0.0]] * 2)  # the format earned 1, R_reg nothing
    batch.samples = [data.Sample([item("a", 1)]), data.Sample([item("b", 5)])]
    for r, value in zip(batch.rewards, (1.0, 3.0, None, 4.0, 6.0, None), strict=True):
        r.answer = value and [(1, value)]
    stage, elsewhere = Stage(1, 1, None, RewardWeights(1, 0, 1), 10), []
    learner = SimpleNamespace(world=SimpleNamespace(rank=0, gather=lambda ours: [ours, elsewhere]))
    # (1, 1) beside (5, 5) is 1. (3, 1) beside (5, 5): means 4 and 3, variances 1 and 4, covariance 2, so 4 / 6. (1 + 4/6) / 2 = 5/6.
    expected = grpo.group_advantages(torch.tensor([[2.0, 1 + 5 / 6, 0.0]], dtype=torch.float64))[0]
    torch.testing.assert_close(rivals.ccc(learner, stage, batch)[0], expected)
    # Another process has an image with label 9, whose mean is 9: (3, 1), (5, 5), (9, 9) in the place of two pairs.
    elsewhere.append([(9.0, 9)])
    x, y = np.array([3.0, 5, 9]), np.array([1.0, 5, 9])
    c = 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    expected = grpo.group_advantages(torch.tensor([[2.0, 1 + (1 + c) / 2, 0.0]], dtype=torch.float64))[0]
    torch.testing.assert_close(rivals.ccc(learner, stage, batch)[0], expected)


def test_r_rank_of_the_order_that_the_values_imply():
    stage, sample = Stage(2, 1, None, RewardWeights(1, 2, 1), 10), data.Sample([item("a", 1), item("b", 2)])
    text = answer((2, 2), (1, 1))  # right values, listed the wrong way round
    assert rivals.ranked_by_values(1.0)(stage, text, sample) == (1.0, 1.0, 1.0, 1 + 2 + 1)
    assert rivals.ranked_by_values(0.5)(stage, text, sample) == (1.0, 1.0, 0.5, 1 + 1 + 1)
    assert rivals.ranked_by_values(0.5)(stage, text, sample).answer == [(2, 2.0), (1, 1.0)]
    assert rivals.ranked_by_values(1.0)(stage, answer((1, 2), (2, 2)), sample).ranking == 0.5  # equal values: tau 0
    assert rivals.ranked_by_values(1.0)(stage, "no", sample).total == 0
    alone = data.Sample([item("a", 1)])
    assert rivals.ranked_by_values(1.0)(stage, answer((1, 1)), alone) == stage.reward(answer((1, 1)), alone)


def test_prompts_whose_answers_are_alike_are_drawn_anew(policy, items, monkeypatch):  # noqa: F811
    """Of three prompts, the first and the last are: the first is mended by the second draw, the last one never."""
    answers, asked = [], []

    def decode(policy, ids, mask):  # "g" earns nothing; the true answer of anything earns the format
        answers.append(ids.clone())
        groups = [[True, False, True], [False, True], [True]][len(answers) - 1]
        good = '[{"image_id": 1, "value": 1}, {"image_id": 2, "value": 2}]'
        return ["no" if alike or g else good for alike in groups for g in range(G)]

    earned, tiny = Stage.reward, count()

    def nearly(stage, text, sample):  # sums of the same parts in another order differ in their last digit
        r = earned(stage, text, sample)
        changed = reward.Reward(*r[:3], r.total + 1e-13 * next(tiny))
        changed.answer = r.answer
        return changed

    monkeypatch.setattr(Stage, "reward", nearly)
    monkeypatch.setattr(rarl, "decode", decode)
    make_prompts = data.make_prompts
    monkeypatch.setattr(data, "make_prompts", lambda policy, some: asked.append(some) or make_prompts(policy, some))
    monkeypatch.setattr(train, "collect", rivals.collect_with_spread)
    stage = make_stage(items)
    batch = collect(make_learner(policy, rmo_k=0), stage)
    first, second, third = asked
    assert first == stage.sampler.batch(0) and (len(second), len(third)) == (2, 1)
    assert {len(sample.items) for some in asked for sample in some} == {2}
    assert batch.samples == [second[0], first[1], third[0]] and batch.redrawn == 3
    assert third[0] != second[1] != first[2]
    # Everything of a prompt moves with it: its tokens, texts, rewards, log-probs.
    assert torch.equal(batch.prompts[0].ids, make_prompts(policy, [second[0]])[0].ids)
    for b, rows in enumerate((answers[1][:G], answers[0][G : 2 * G], answers[2][:G])):
        ours, width = slice(G * b, G * b + G), rows.shape[1]
        assert torch.equal(batch.ids[ours, :width], rows) and (batch.ids[ours, width:] == policy.eos_id).all()
        assert [r.format for r in batch.sampled_rewards[ours]] == ([1.0, 0.0, 0.0, 0.0] if b < 2 else [0.0] * G)
    logp, _ = rarl.logprobs(policy, batch.prompts, batch.ids, batch.mask)
    torch.testing.assert_close(batch.sampled_logp, logp.detach(), atol=1e-4, rtol=0)
    assert (batch.advantages[:2].amax(1) > 1).all() and batch.advantages[2].abs().max() < 1e-6
    assert rivals.numbers(batch)["redrawn"] == [1.0]
