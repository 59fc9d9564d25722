"""Rivals of the method, each by hand: other advantages, drawing prompts anew, a weight of R_rank that adapts by itself."""

import copy
import dataclasses
import math

import pytest
import torch

import data
import rarl
import reward
import train
from support import rivals
from support.datasets import load_dataset
from support.learner.distributed import Learner, World
from support.run.settings import Settings

CPU = World(0, 1, torch.device("cpu"))


class Two(World):
    """Rank 0 of two; the other one has `theirs`."""

    def gather(self, thing):
        return [thing, self.theirs]


def two(theirs):
    world = Two(0, 2, torch.device("cpu"))
    object.__setattr__(world, "theirs", theirs)
    return world


def advantages(how, rewards, world=CPU, w_rank=1.0, **more):
    s = Settings(group_size=2, advantage=how, **more)
    totals = torch.tensor([r.total for r in rewards], dtype=torch.float64).view(-1, 2)
    return rivals.advantages(s, train.RewardWeights(1, w_rank, 1), rewards, totals, 2 + w_rank, world)


def test_advantages_by_hand():
    # regression 0, 1 and ranking 1, 0: the sum has no spread, each part has. Weighted by 1 and 2: -1 + 2 and 1 - 2.
    scored = [reward.Reward(1.0, 0.0, 1.0, 2.0), reward.Reward(1.0, 1.0, 0.0, 2.0)]
    assert advantages("dr-grpo", scored).tolist() == advantages("rl-zvp", scored).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(advantages("gdpo", scored, w_rank=2.0), torch.tensor([[1.0, -1.0]]), atol=1e-3, rtol=0)
    # 2, 2 and the best, 3: mean 7/3, std sqrt(2)/3, A = -1/sqrt(2)
    torch.testing.assert_close(advantages("ngrpo", scored), torch.full((1, 2), -math.sqrt(0.5)), atol=1e-3, rtol=0)
    assert advantages("ngrpo", scored, w_rank=0.0).tolist() == [[0.0, 0.0]]  # 2 is then the most that there is
    # The best possible is 3 and poor is up to 0.8 of it, 2.4: that is the baseline of two answers that earn 2.
    torch.testing.assert_close(advantages("corpo", scored, rmo_poor=0.8), torch.full((1, 2), -0.4))
    assert advantages("corpo", scored, rmo_poor=0.5).tolist() == [[0.0, 0.0]]
    spread = [reward.Reward(1.0, 0.0, 0.0, 1.0), reward.Reward(1.0, 1.0, 1.0, 3.0)]  # RL-ZVP's are then GRPO's
    torch.testing.assert_close(advantages("rl-zvp", spread), torch.tensor([[-1.0, 1.0]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("world", [CPU, two(torch.tensor([[0.0, 8.0]], dtype=torch.float64))])
def test_the_batch_s_std_is_over_all_processes(world):
    scored = [reward.Reward(0.0, 0.0, 0.0, total) for total in (1.0, 3.0, 2.0, 2.0)]
    everything = torch.tensor([1.0, 3.0, 2.0, 2.0] + ([0.0, 8.0] if world.size == 2 else []))
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / everything.std(correction=0)
    torch.testing.assert_close(advantages("batch", scored, world), expected, atol=1e-3, rtol=0)


def test_the_rank_weight_follows_r_reg_of_all_processes():
    stage = train.Stage(2, 5, None, train.RewardWeights(1, 2, 1), 12)
    answers = [reward.Reward(1.0, right, 0.5, 0.0) for right in (0.0, 0.5)]  # mean 1/4 here, 3/4 there
    adapted = rivals.with_adaptive_rank_weight(stage, two(0.75), answers)
    assert adapted.weights == train.RewardWeights(1, 2 * 0.5, 1) and stage.weights.w_rank == 2


@pytest.fixture(scope="module")
def items():
    return load_dataset("dots")


def collect(policy, items, **settings):
    learner = Learner(copy.deepcopy(policy), CPU, Settings(**{"group_size": 4, "rmo_k": 0} | settings))
    stage = train.Stage(2, 5, data.Sampler(items, (2,), 3, seed=0), train.RewardWeights(1, 1, 1), 12)
    samples = stage.sampler.batch(0)
    prompts = data.make_prompts(policy, samples)
    return learner, stage, train.collect(learner, stage, 0, samples, prompts, {})


def test_an_adaptive_rank_weight_enters_the_rewards(policy, items, monkeypatch):
    # Values 2 off (R_reg 3/4), in the order of the prompt.
    names = {}

    def decode(policy, ids, mask):
        samples = data.Sampler(items, (2,), 3, seed=0).batch(0)
        names.update(samples=samples)
        say = lambda s: data.format_answer((i, str(label + 2)) for i, label in enumerate(s.labels, 1))
        return [say(s) for s in samples for _ in range(4)]

    monkeypatch.setattr(rarl, "decode", decode)
    _, stage, batch = collect(policy, items, w_rank_schedule="adaptive")
    for i, r in enumerate(batch.rewards):
        assert r.ranking == (names["samples"][i // 4].labels[0] < names["samples"][i // 4].labels[1])
        assert r.total == 0.75 + 0.75 * r.ranking + 1
    assert stage.weights.w_rank == 1  # the next step begins from the setting again
    assert batch.max_reward == 2.75
    # They earn 1.75 or 2.5. Poor is up to 0.7 of the best possible: of 2.75, 1.93; were it of 3, 2.1.
    _, _, batch = collect(policy, items, w_rank_schedule="adaptive", rmo_k=1, rmo_probability=1.0, rmo_poor=2.4 / 2.75)
    wrong = [s.labels[0] > s.labels[1] for s in names["samples"]]
    assert batch.mutated.view(3, 4).sum(1).tolist() == [int(w) for w in wrong]


def test_prompts_whose_answers_are_alike_are_drawn_anew(policy, items, monkeypatch):
    """Of three prompts, the first and the last are: the first is mended by the second draw, the last one never."""
    answers, asked = [], []

    def decode(policy, ids, mask):  # "g" earns nothing; the true answer of anything earns the format
        answers.append(ids.clone())
        groups = [[True, False, True], [False, True], [True]][len(answers) - 1]
        good = '[{"image_id": 1, "value": 1}, {"image_id": 2, "value": 2}]'
        return ["no" if alike or g else good for alike in groups for g in range(4)]

    monkeypatch.setattr(rarl, "decode", decode)
    make_prompts = data.make_prompts
    monkeypatch.setattr(data, "make_prompts", lambda policy, some: asked.append(some) or make_prompts(policy, some))
    learner, stage, batch = collect(policy, items, resample=2)
    first, second, third = (stage.sampler.batch(0, attempt) for attempt in (0, 1, 2))
    assert asked == [first, [second[0], second[2]], [third[2]]]
    assert batch.samples == [second[0], first[1], third[2]] and batch.redrawn == 3
    # Everything of a prompt moves with it: its tokens, texts, rewards, log-probs.
    assert torch.equal(batch.prompts[0].ids, make_prompts(policy, [second[0]])[0].ids)
    for b, rows in enumerate((answers[1][:4], answers[0][4:8], answers[2][:4])):
        ours, width = slice(4 * b, 4 * b + 4), rows.shape[1]
        assert torch.equal(batch.ids[ours, :width], rows) and (batch.ids[ours, width:] == policy.eos_id).all()
        assert [r.format for r in batch.rewards[ours]] == ([1.0, 0.0, 0.0, 0.0] if b < 2 else [0.0] * 4)
    logp, _ = rarl.logprobs(policy, batch.prompts, batch.ids, batch.mask)
    torch.testing.assert_close(batch.sampled_logp, logp.detach(), atol=1e-4, rtol=0)
    assert (batch.advantages[:2].amax(1) > 1).all() and not batch.advantages[2].any()


def test_each_process_draws_its_own_prompts_anew_with_random_streams_of_their_own(policy, items, monkeypatch):
    """The second of two processes: of the six prompts of a batch it has 1, 3 and 5."""
    world, drawn, prepared = World(1, 2, torch.device("cpu")), [], []
    learner = Learner(copy.deepcopy(policy), CPU, Settings(group_size=2, resample=2))
    learner.world = world
    monkeypatch.setattr(learner, "prepare", lambda prompts: prepared.append(len(prompts)))
    stage = train.Stage(2, 5, data.Sampler(items, (2,), 6, seed=0), train.RewardWeights(1, 1, 1), 12)

    def roll(learner, stage, samples, prompts, keys):
        drawn.append((samples, keys))
        ids = torch.zeros(2 * len(samples), 1, dtype=torch.long)
        nothing = [reward.Reward(0.0, 0.0, 0.0, 0.0)] * (2 * len(samples))
        return train.Rolled(samples, prompts, rarl.Rollout(ids, ids > 0, ids.float()), [""] * len(nothing), nothing)

    mine, keys = stage.sampler.batch(0)[1::2], [(0, 2, 0, number) for number in (1, 3, 5)]
    rolled, redrawn = rivals.resample(roll, learner, stage, 0, roll(learner, stage, mine, [None] * 3, keys), keys)
    assert redrawn == 6 and prepared == [3, 3] and rolled.samples == drawn[2][0]
    for attempt, (samples, keys_of) in enumerate(drawn[1:], start=1):
        assert samples == stage.sampler.batch(0, attempt)[1::2]
        assert keys_of == [(*key, attempt) for key in keys]


def test_the_preflight_walks_through_every_prompt_that_may_be_drawn(policy, items):
    few = items[:3]
    asked = []
    sampler_batch = data.Sampler.batch
    with pytest.MonkeyPatch.context() as patched:
        note = lambda self, step, attempt=0: asked.append((step, attempt)) or sampler_batch(self, step, attempt)
        patched.setattr(data.Sampler, "batch", note)
        train.make_stage(2, policy, few, [], Settings(steps2=2, images=(2,), batch_size=2, resample=1))
    assert set(asked) >= {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_labels_of_files_are_drawn_as_they_are_if_the_user_says_so(policy, items, tmp_path):
    files = [dataclasses.replace(item, path=tmp_path / item.name) for item in items[:50]]
    s = Settings(steps1=1, images=(1,), batch_size=2)
    stages = [train.make_stage(1, policy, files, [], dataclasses.replace(s, balance=b)) for b in (True, False)]
    assert [stage.sampler.weights is None for stage in stages] == [False, True]


def test_entropy_moves_what_has_no_spread(policy, items):
    """An untaught policy earns nothing, so GRPO has no gradient; RL-ZVP takes tokens down, the surest ones most."""
    norms = {}
    for how in ("group", "rl-zvp"):
        learner, _, batch = collect(policy, items, advantage=how, beta=0.0)
        assert not batch.advantages.any() and not batch.good.any()
        before, entropy = rarl.logprobs(learner.policy, batch.prompts, batch.ids, batch.mask)
        optimizer = torch.optim.SGD(learner.policy.parameters(), lr=1e-3)
        norms[how] = train.update(learner, optimizer, batch)["grad_norm"]
    assert norms["group"] == 0 < norms["rl-zvp"]
    by_token = rivals.token_advantages(batch, entropy)
    assert by_token.shape == batch.mask.shape and (by_token <= 0).all() and (by_token[batch.mask] < 0).any()
    batch.good[1], batch.advantages[2] = True, torch.tensor([1.0, -1.0, 2.0, -2.0])
    by_token = rivals.token_advantages(batch.take([1, 2]), entropy[4:])  # micro-batches carry it too
    assert (by_token[:4] >= 0).all() and torch.equal(by_token[4:, 0], batch.advantages[2])
