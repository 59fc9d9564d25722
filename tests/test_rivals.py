"""experiments/rivals.py: each rival by hand, and that an unknown one is an error."""

import math

import pytest
import torch
from test_collect import CPU, G, answer, collect, items, make_learner, make_stage, says  # noqa: F401

import data
import rarl
import reward
import train
from experiments import rivals
from support.learner.stage import Batch, RewardWeights, Stage
from support.learner.world import World


class Two(World):
    """Rank 0 of two; the other one has `theirs`."""

    def gather(self, thing):
        return [thing, self.theirs]


def two(theirs):
    world = Two(0, 2, torch.device("cpu"))
    object.__setattr__(world, "theirs", theirs)
    return world


def advantages(policy, name, rewards, world=CPU, w_rank=1.0, **settings):
    """Of groups of two answers with these rewards."""
    learner = make_learner(policy, **settings)
    learner.world = world
    stage = Stage(2, 1, None, RewardWeights(1, w_rank, 1), 10)
    N = len(rewards)
    batch = Batch([], torch.zeros(N, 1), torch.ones(N, 1), torch.zeros(N, 1), torch.zeros(N), torch.zeros(N // 2, 2),
                  rewards=rewards, max_reward=2 + w_rank)  # fmt: skip
    return getattr(rivals, name)(learner, stage, batch).float()


def test_advantages_by_hand(policy):
    # regression 0, 1 and ranking 1, 0: the sum has no spread, each part has. Weighted by 1 and 2: -1 + 2 and 1 - 2.
    rewards = [reward.Reward(1.0, 0.0, 1.0, 2.0), reward.Reward(1.0, 1.0, 0.0, 2.0)]
    assert advantages(policy, "dr_grpo", rewards).tolist() == [[0.0, 0.0]]
    gdpo = advantages(policy, "gdpo", rewards, w_rank=2.0)
    torch.testing.assert_close(gdpo, torch.tensor([[1.0, -1.0]]), atol=1e-3, rtol=0)
    # 2, 2 and the best, 3: mean 7/3, std sqrt(2)/3, A = -1/sqrt(2)
    ngrpo = advantages(policy, "ngrpo", rewards)
    torch.testing.assert_close(ngrpo, torch.full((1, 2), -math.sqrt(0.5)), atol=1e-3, rtol=0)
    assert advantages(policy, "ngrpo", rewards, w_rank=0.0).tolist() == [[0.0, 0.0]]  # 2 is then the most that there is
    # The best possible is 3 and poor is up to 0.8 of it, 2.4: that is the baseline of two answers that earn 2.
    torch.testing.assert_close(advantages(policy, "corpo", rewards, rmo_poor=0.8), torch.full((1, 2), -0.4))
    assert advantages(policy, "corpo", rewards, rmo_poor=0.5).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("world", [CPU, two(torch.tensor([[0.0, 8.0]], dtype=torch.float64))])
def test_the_batch_s_std_is_over_all_processes(policy, world):
    rewards = [reward.Reward(0.0, 0.0, 0.0, total) for total in (1.0, 3.0, 2.0, 2.0)]
    everything = torch.tensor([1.0, 3.0, 2.0, 2.0] + ([0.0, 8.0] if world.size == 2 else []))
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / everything.std(correction=0)
    torch.testing.assert_close(advantages(policy, "batch_std", rewards, world), expected, atol=1e-3, rtol=0)


def test_advantages_take_the_place_of_the_method_s(policy, items, monkeypatch):  # noqa: F811
    stage = make_stage(items)
    samples = stage.sampler.batch(0)
    says(monkeypatch, lambda b, g: answer((1, 0.0), (2, 0.0)) if g else "no")
    monkeypatch.setattr(train, "collect", rivals.with_advantages(rivals.dr_grpo))
    batch = collect(make_learner(policy, rmo_k=0), stage, samples=samples)
    totals = torch.tensor([r.total for r in batch.rewards]).view(3, G)
    torch.testing.assert_close(batch.advantages, totals - totals.mean(1, keepdim=True))


def test_a_crossing_has_the_values_of_one_answer_and_the_order_of_another(policy, items, monkeypatch):  # noqa: F811
    stage = make_stage(items)
    samples = stage.sampler.batch(0)
    low = [[1, 2] if s.labels[0] < s.labels[1] else [2, 1] for s in samples]  # the true order
    at = lambda b, order, off: answer(*((i, samples[b].labels[i - 1] + off) for i in order))
    # Of each group: nothing valid; good values in the wrong order; useless ones in the right order; neither.
    says(monkeypatch, lambda b, g: ["no", at(b, low[b][::-1], 1), at(b, low[b], 9), at(b, low[b][::-1], 9)][g])
    monkeypatch.setattr(train, "references_for", rivals.crossed_references)
    learner = make_learner(policy, rmo_spread=1.0, rmo_poor=1.0)
    batch = collect(learner, stage, samples=samples)
    assert batch.mutated.view(3, G).tolist() == [[True, False, False, False]] * 3  # "no" earned least
    for b in range(3):
        assert batch.texts[b * G] == at(b, low[b], 1).replace(".0", "")
        assert batch.rewards[b * G].total == 1 - 1 / 4 + 1 + 1
    # A child that earns no more than what it would replace is none; of answers that are no answers there is no child.
    says(monkeypatch, lambda b, g: at(b, low[b], 9))
    assert not collect(learner, stage, samples=samples).mutated.any()
    says(monkeypatch, lambda b, g: "no" if g else at(b, low[b], 9))
    assert collect(learner, stage, samples=samples).mutated.any()
    says(monkeypatch, lambda b, g: "no")
    assert not collect(learner, stage, samples=samples).mutated.any()


def test_prompts_whose_answers_are_alike_are_drawn_anew(policy, items, monkeypatch):  # noqa: F811
    """Of three prompts, the first and the last are: the first is mended by the second draw, the last one never."""
    answers, asked = [], []

    def decode(policy, ids, mask):  # "g" earns nothing; the true answer of anything earns the format
        answers.append(ids.clone())
        groups = [[True, False, True], [False, True], [True]][len(answers) - 1]
        good = '[{"image_id": 1, "value": 1}, {"image_id": 2, "value": 2}]'
        return ["no" if alike or g else good for alike in groups for g in range(G)]

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
    assert (batch.advantages[:2].amax(1) > 1).all() and not batch.advantages[2].any()
    assert rivals.numbers_with_redrawn(batch)["redrawn"] == [1.0]


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
    monkeypatch.setattr(train, "collect", train.collect)  # to be put back
    rivals.main(["imitation", "--beta", "0"])
    assert train.collect is rivals.imitate
