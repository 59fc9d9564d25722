"""experiments/rivals.py: each rival by hand, and that an unknown one is an error."""

import math

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
    assert rivals.dr_grpo(stage, batch).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(rivals.gdpo(stage, batch).float(), torch.tensor([[1.0, -1.0]]), atol=1e-3, rtol=0)
    # OraRL: 1 and 2 have the mean 3/2 and the std 1/2, with the truth's 3 the std sqrt(2/3). So 1/2 becomes sqrt(2/3), and the mean
    # of -1/2 and sqrt(2/3), is taken off. 0 and 0.1 would grow 28 times, which is cut to 4: -0.05 and 0.2, less their mean.
    half = (math.sqrt(2 / 3) + 0.5) / 2
    expected = torch.tensor([[-half, half], [-0.125, 0.125], [0.0, 0.0]])
    orarl = rivals.orarl(stage, by_hand([[1.0, 2.0], [0.0, 0.1], [2.0, 2.0]]))
    torch.testing.assert_close(orarl.float(), expected, atol=1e-4, rtol=0)


def test_outside_its_mean_a_mutated_answer_keeps_its_pull_and_pushes_nobody():
    batch = by_hand([[3.0, 1.0, 1.0, 2.0]], mutated=[True, False, False, False])
    # All four: mean 7/4, std sqrt(11)/4, so 3 has 5/sqrt(11). The sampled three: mean 4/3, std sqrt(2)/3.
    expected = torch.tensor([[5 / math.sqrt(11), -math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2)]])
    torch.testing.assert_close(rivals.outside(None, batch), expected, atol=1e-3, rtol=0)
    # 0.5 is the best that was sampled (the first 0 was replaced). In a mean with the truth its advantage is negative.
    batch = by_hand([[3.0, 0.0, 0.0, 0.5]], sampled=[0.0, 0.0, 0.0, 0.5], mutated=[True, False, False, False])
    assert rivals.numbers(batch)["inverted"] == [False, False, False, True]
    batch.advantages = rivals.outside(None, batch)
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
