"""A step, seen from inside: what `collect` hands to the update, and which old log-probs the update uses."""

import copy
import json
import math

import pytest
import torch
from runs import CPU

import data
import grpo
import rarl
import reward
import train
from support.datasets import load_dataset
from support.learner.learner import Learner, micro_batches
from support.learner.stage import RewardWeights, Stage
from support.run.settings import Settings
from support.run.stage_run import remembered

G = 4


def make_learner(policy, **settings):
    settings = {"group_size": G, "rmo_probability": 1.0, "lr": 0.1, "beta": 0.0} | settings
    return Learner(copy.deepcopy(policy), CPU, Settings(**settings))


def make_stage(items, number=2, weights=(1, 1, 1), images=(2,)):
    sampler = data.Sampler(items, images, 3, seed=0)
    return Stage(number, 5, sampler, RewardWeights(*weights), max_new_tokens=12)


@pytest.fixture(scope="module")
def items():
    return load_dataset("dots")


def collect(learner, stage, step=0, history=None, samples=None):
    samples = samples or stage.sampler.batch(step)
    prompts = data.make_prompts(learner.policy, samples)
    learner.prepare(prompts)
    return train.collect(learner, stage, step, samples, prompts, history or {})


def says(monkeypatch, text_of):
    """From now on the policy's answer g to sample b reads text_of(b, g), whatever its tokens are."""
    monkeypatch.setattr(rarl, "decode", lambda policy, ids, mask: [text_of(*divmod(i, G)) for i in range(len(ids))])


def answer(*pairs):
    return json.dumps([{"image_id": image, "value": value} for image, value in pairs])


def test_mutated_answers_are_scored_again(policy, items):
    # An untaught policy writes garbage: all rewards 0, so every group is mutated, k = 1. Rewards 3, 0, 0, 0:
    # mean 3/4, std 3 sqrt(3) / 4, so A = sqrt(3) for the mutated answer and -1 / sqrt(3) for the others.
    learner, stage = make_learner(policy), make_stage(items)
    batch = collect(learner, stage)
    mutated = batch.mutated.view(3, G)
    assert mutated.sum(1).tolist() == [1, 1, 1]
    torch.testing.assert_close(batch.advantages[mutated], torch.full((3,), 3**0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(batch.advantages[~mutated], torch.full((9,), -(3**-0.5)), rtol=1e-3, atol=0)
    assert [r.total for r in batch.sampled_rewards] == [0] * 12  # the log's are those of the sampled answers
    # What the update will score is the ground truth, its EOS included, and nothing of it was sampled.
    texts = rarl.decode(policy, batch.ids, batch.mask)
    truth = [data.reference_answer(sample) for sample in batch.samples]
    rows = batch.mutated.nonzero().flatten().tolist()
    assert [texts[row] for row in rows] == [batch.texts[row] for row in rows] == truth
    last = batch.mask.sum(1, keepdim=True) - 1
    assert (batch.ids.gather(1, last)[rows] == policy.eos_id).all()
    assert (batch.sampled_logp[rows] == 0).all() and (batch.sampled_logp[~batch.mutated].sum(1) < 0).all()


def test_without_rmo_a_group_that_is_all_alike_has_no_advantage(policy, items):
    batch = collect(make_learner(policy, rmo_k=0), make_stage(items))
    assert not batch.mutated.any() and (batch.advantages == 0).all()


def test_groups_that_learn_by_themselves_are_left_alone(policy, items, monkeypatch):
    stage = make_stage(items)
    samples = stage.sampler.batch(0)
    right = [[(i + 1, label) for i, label in enumerate(s.labels)] for s in samples]
    right = [sorted(pairs, key=lambda pair: pair[1]) for pairs in right]
    # Group 0: one right answer among garbage. Group 1: all right. Group 2: all garbage.
    says(monkeypatch, lambda b, g: answer(*right[b]) if b == 1 or (b, g) == (0, 2) else "no")
    batch = collect(make_learner(policy), stage, samples=samples)
    assert batch.mutated.view(3, G).sum(1).tolist() == [0, 0, 1]
    assert batch.advantages[0].argmax() == 2 and (batch.advantages[1] == 0).all()


def test_rewards_are_those_of_the_answer_s_own_prompt(policy, items, monkeypatch):
    # Every answer is right for the sample with its own number, so a mix-up of rows would cost reward.
    stage = make_stage(items, weights=(1, 0, 1))
    samples = stage.sampler.batch(0)
    off = [0.0, 0.5, 1.0, 1.5]  # delta is 2: rewards 1 - e^2 / 4, and 1 for the format
    says(monkeypatch, lambda b, g: answer(*((i + 1, label + off[g]) for i, label in enumerate(samples[b].labels))))
    batch = collect(make_learner(policy, rmo_k=0), stage, samples=samples)
    expected = torch.tensor([[2 - e * e / 4 for e in off]] * 3)
    assert torch.tensor([r.total for r in batch.rewards]).view(3, G).tolist() == expected.tolist()
    torch.testing.assert_close(batch.advantages, grpo.group_advantages(expected))


def test_rollout_batches_change_nothing(policy, items):
    whole, parts = (collect(make_learner(policy, rollout_batch=n), make_stage(items)) for n in (64, 2))
    assert whole.texts == parts.texts and torch.equal(whole.ids, parts.ids) and torch.equal(whole.mask, parts.mask)
    torch.testing.assert_close(whole.sampled_logp, parts.sampled_logp, atol=1e-5, rtol=0)
    assert torch.equal(whole.advantages, parts.advantages)


def test_history_gives_what_earlier_answers_found_and_only_if_it_is_better(policy, items, monkeypatch):
    stage = make_stage(items, number=1, weights=(1, 0, 1), images=(1,))
    samples = stage.sampler.batch(0)
    labels = [sample.labels[0] for sample in samples]
    names = [sample.items[0].name for sample in samples]
    says(monkeypatch, lambda b, g: answer((1, labels[b] + 3)))  # reward 1 + 1 - 9/16
    learner = make_learner(policy, rmo_source="history", rmo_poor=1.0)
    batch = collect(learner, stage, samples=samples)
    assert not batch.mutated.any()  # nothing is known yet
    assert remembered(batch) == {name: (3.0, label + 3) for name, label in zip(names, labels, strict=True)}
    # Image 0: an earlier answer was 1 off. Image 1: 3.5 off, worse than what is there. Image 2: as good as that.
    history = {names[0]: (1.0, labels[0] - 1), names[1]: (3.5, labels[1] - 3.5), names[2]: (3.0, labels[2] - 3)}
    batch = collect(learner, stage, samples=samples, history=history)
    assert batch.mutated.view(3, G).sum(1).tolist() == [1, 0, 0]
    row = int(batch.mutated.nonzero())
    assert reward.parse_response(batch.texts[row], 1) == [(1, labels[0] - 1)]
    assert batch.advantages[0].max() > 1 and (batch.advantages[1:] == 0).all()


def test_several_images_from_history_stand_in_the_order_of_their_values(policy, items):
    stage = make_stage(items)
    sample = stage.sampler.batch(0)[0]
    history = {item.name: (1.0, item.label + 1) for item in sample.items}
    s, earned = Settings(rmo_source="history"), lambda total: [reward.Reward(1.0, 0.0, 0.0, total)] * G
    (text,) = train.references_for(s, stage, sample, history, earned(0.0))
    assert reward.compute_reward(text, sample.labels, 4).ranking == 1
    assert train.references_for(s, stage, sample, {}, earned(0.0)) == []
    assert train.references_for(s, stage, sample, history, earned(3.0)) == []


def test_old_logp_of_every_answer_is_that_before_the_first_update(policy, items, monkeypatch):
    """Also of the mutated ones, which nobody sampled: two updates, the second against the policy before the first."""
    learner, stage = make_learner(policy, updates=2), make_stage(items)
    batch = collect(learner, stage)
    before = copy.deepcopy(learner.policy)
    seen = []
    honest = grpo.grpo_loss
    monkeypatch.setattr(
        grpo, "grpo_loss", lambda logp, old, *rest, **kw: seen.append(old) or honest(logp, old, *rest, **kw)
    )
    train.update(learner, torch.optim.SGD(learner.policy.parameters(), lr=0.5), batch)
    assert seen[0] is None and len(seen) == 2  # on-policy first: ratio 1, also for mutated answers
    order = [b for lot in micro_batches(batch, [0, 1, 2], 10**6) for b in lot]
    again = batch.take(order)
    expected, _ = rarl.logprobs(before, again.prompts, again.ids, again.mask)
    torch.testing.assert_close(seen[1], expected.detach(), atol=1e-5, rtol=0)
    assert again.mutated.any() and (seen[1][again.mutated].sum(1) < 0).all()


def test_a_frozen_tower_is_asked_once_and_not_trained(policy, items, monkeypatch):
    frozen = copy.deepcopy(policy)
    frozen.model.model.visual.requires_grad_(False)  # as --freeze-vision loads it
    learner, stage = make_learner(frozen, beta=0.1), make_stage(items)
    learner.begin_stage()
    samples = stage.sampler.batch(0)
    prompts = data.make_prompts(learner.policy, samples)
    learner.prepare(prompts)
    monkeypatch.setattr(learner.policy.model.model.visual, "forward", None)  # whoever asks it again, fails
    batch = train.collect(learner, stage, 0, samples, prompts, {})
    vision = copy.deepcopy(learner.policy.model.model.visual.state_dict())
    head = learner.policy.model.lm_head.weight.clone()
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    log = train.update(learner, torch.optim.SGD(trained, lr=0.1), batch)
    assert log["grad_norm"] > 0 and not torch.equal(head, learner.policy.model.lm_head.weight)
    assert all(torch.equal(vision[k], v) for k, v in learner.policy.model.model.visual.state_dict().items())


def test_steps_and_prompts_have_random_streams_of_their_own(policy, items):
    learner, stage = make_learner(policy), make_stage(items)
    samples = stage.sampler.batch(0)
    first, again, other = (collect(learner, stage, step, samples=samples) for step in (0, 0, 1))
    assert first.texts == again.texts and first.texts != other.texts
    twice = collect(learner, stage, samples=[samples[0]] * 3)  # the same prompt three times: not the same answers
    assert len(set(twice.texts)) > G
    assert math.isfinite(first.sampled_logp.sum())
