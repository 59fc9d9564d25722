"""`update` and what is checked before: micro-batches, ratios, skipped steps, mutated rows, the preflight."""

import copy
import dataclasses
import math

import pytest
import torch
from runs import CPU
from small_data import item
from torch.utils._python_dispatch import TorchDispatchMode

import data
import grpo
import rarl
import train
from support.datasets import load_dataset
from support.learner.learner import Learner, micro_batches
from support.learner.stage import Batch, RewardWeights, Stage
from support.run.preflight import hardest_samples, preflight
from support.run.settings import SettingError, Settings


def make_batch(policy, settings, mutate=0):
    """Prompts of 1, 2 and 4 images, random advantages, answers of uneven length."""
    items = load_dataset("dots")
    samples = [s for n in (4, 1, 2) for s in data.make_samples(items, n, 1)]
    prompts = data.make_prompts(policy, samples)
    rollout = rarl.generate(policy, prompts, settings.group_size, 20, 1.0, torch.Generator().manual_seed(0))
    N = len(rollout.ids)
    mask = rollout.mask & (torch.arange(rollout.ids.shape[1]) < torch.arange(N)[:, None] + 5)
    advantages = grpo.group_advantages(torch.rand(3, settings.group_size, generator=torch.Generator().manual_seed(1)))
    mutated = torch.arange(N) < mutate
    return Batch(prompts, rollout.ids, mask, rollout.logp, mutated, advantages)


def gradients_of_update(learner, batch):
    """-> what an update's optimiser finds, by name, and the update's log"""
    seen = {}

    class Look(torch.optim.SGD):
        def step(self):
            seen.update({n: p.grad.clone() for n, p in learner.policy.named_parameters()})

    return seen, train.update(learner, Look(learner.policy.parameters(), lr=0.1), batch)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_micro_batches_change_nothing(policy, normalize, monkeypatch):
    grads, pack = [], rarl.Packing.__init__
    for limit in (10**6, 400, 1):
        s = Settings(group_size=4, normalize=normalize, max_tokens_per_forward=limit, beta=0.1)
        learner = Learner(copy.deepcopy(policy), CPU, s)
        learner.reference = copy.deepcopy(policy)
        with torch.no_grad():  # a reference that differs
            learner.reference.model.lm_head.weight += 0.01
        batch = make_batch(policy, s)
        lots = micro_batches(batch, [0, 1, 2], limit)
        assert sorted(b for lot in lots for b in lot) == [0, 1, 2] and len(lots) == {10**6: 1, 400: 2, 1: 3}[limit]
        rows = []  # widths of what goes through the language model, policy and reference in turn
        note = lambda self, prompts, answers, device, rows=rows: (
            rows.append(sum(prompts + answers)) or pack(self, prompts, answers, device)
        )
        monkeypatch.setattr(rarl.Packing, "__init__", note)
        grads.append(gradients_of_update(learner, batch))
        # All prompts once, and of every answer the tokens that predict another: no padding.
        assert sum(rows[::2]) == sum(len(p.ids) for p in batch.prompts) + int(batch.mask.sum()) - len(batch.mask)
        assert len(lots) == 3 or max(rows) <= limit
        assert grads[-1][1]["pack_fill"] == pytest.approx(sum(rows[::2]) / (len(lots) * limit))
        monkeypatch.undo()
    for seen, log in grads[1:]:
        for name, grad in grads[0][0].items():
            scale = grad.norm() if "k_proj.bias" not in name else 1.0
            assert (seen[name] - grad).norm() <= 1e-5 * scale, name
        for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm", "logp_gap_mean"):
            assert log[name] == pytest.approx(grads[0][1][name], rel=1e-4, abs=1e-7)


def test_two_threads_give_the_same_bits(policy):
    """Nothing in a rollout or an update, images included, adds in an order that threads decide."""
    s = Settings(group_size=4, beta=0.0)
    torch.set_num_threads(2)
    try:
        first, again = (
            gradients_of_update(Learner(copy.deepcopy(policy), CPU, s), make_batch(policy, s)) for _ in "ab"
        )
    finally:
        torch.set_num_threads(1)
    assert first[1] == again[1] and all(torch.equal(grad, again[0][name]) for name, grad in first[0].items())


class RepeatedSums(TorchDispatchMode):
    """Notes sums into repeated places, which threads share out as they come. The sums of a small policy rarely show it."""

    def __init__(self):
        super().__init__()
        self.seen, self.unique = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("index_put", "index_put_", "_index_put_impl_") and len(args) > 3 and args[3]:
            indices = [x.nonzero().T if x.dtype == torch.bool else x[None] for x in args[1] if x is not None]
            places = torch.cat([x.flatten(1) for x in torch.broadcast_tensors(*indices)])  # a column for each
            repeated = places.unique(dim=1).shape[1] < places.shape[1]
            self.seen += [name] * repeated
            self.unique += not repeated
        self.seen += [name] * name.startswith("index_add")
        return function(*args, **(kwargs or {}))


def test_no_gradient_is_summed_in_an_order_that_threads_decide(policy):
    s = Settings(group_size=4, beta=0.0)
    learner, batch = Learner(copy.deepcopy(policy), CPU, s), make_batch(policy, s)
    with RepeatedSums() as sums:
        gradients_of_update(learner, batch)
    assert not sums.seen and sums.unique  # the latter: it did look at some


def test_groups_without_gradient_are_not_run(policy, monkeypatch):
    s = Settings(group_size=4, beta=0.0)
    learner = Learner(copy.deepcopy(policy), CPU, s)
    batch = make_batch(policy, s)
    batch.advantages[1] = 0.0
    ran = []
    original = rarl.logprobs
    monkeypatch.setattr(
        rarl, "logprobs", lambda p, prompts, *rest: ran.append(len(prompts)) or original(p, prompts, *rest)
    )
    optimizer = torch.optim.SGD(learner.policy.parameters(), lr=0.1)
    train.update(learner, optimizer, batch)
    assert sum(ran) == 2
    batch.advantages[:] = 0.0
    before = copy.deepcopy(learner.policy.state_dict())
    log = train.update(learner, optimizer, batch)
    assert sum(ran) == 2 and log["grad_norm"] == 0.0 and not log["bad"]
    assert all(torch.equal(before[k], v) for k, v in learner.policy.state_dict().items())


def test_later_updates_are_off_policy(policy):
    # After the first update the ratio of the second is exp(new - old): different from 1, and clipped shares show up.
    s = Settings(group_size=4, beta=0.0, updates=2)
    learner = Learner(copy.deepcopy(policy), CPU, s)
    log = train.update(learner, torch.optim.SGD(learner.policy.parameters(), lr=3.0), make_batch(policy, s))
    assert abs(log["ratio"] - 1) > 1e-4 and log["clip_low"] + log["clip_high"] > 0


def test_a_step_that_is_not_finite_is_skipped(policy):
    s = Settings(group_size=4, beta=0.0)
    learner = Learner(copy.deepcopy(policy), CPU, s)
    batch = make_batch(policy, s)
    batch.advantages[0, 0] = math.nan
    before = copy.deepcopy(learner.policy.state_dict())
    log = train.update(learner, torch.optim.SGD(learner.policy.parameters(), lr=0.1), batch)
    assert log["bad"]
    assert all(torch.equal(before[k], v) for k, v in learner.policy.state_dict().items())
    assert all(p.grad is None for p in learner.policy.parameters())  # nothing of it is left for the next step


def test_mutated_answers_replace_tokens_mask_and_logp(policy):
    s = Settings(group_size=4)
    batch = make_batch(policy, s)
    rollout = rarl.Rollout(batch.ids, batch.mask, batch.sampled_logp)
    rows = torch.zeros(12, dtype=torch.bool)
    rows[[2, 7]] = True
    texts = ['[{"image_id": 1, "value": 3}]', '[{"image_id": 2, "value": 13}, {"image_id": 1, "value": 20}]']
    said = ["sampled"] * 12
    said[2], said[7] = texts
    answers = train.with_mutated(policy, rollout, rows.tolist(), said)
    ids, mask, logp = answers.ids, answers.mask, answers.logp
    assert rarl.decode(policy, ids[rows], mask[rows]) == texts
    assert (ids[rows].gather(1, mask[rows].sum(1, keepdim=True) - 1) == policy.eos_id).all()  # they teach to stop
    assert (logp[rows] == 0).all()
    T = batch.ids.shape[1]
    assert torch.equal(ids[~rows][:, :T], batch.ids[~rows]) and not mask[~rows][:, T:].any()
    assert torch.equal(batch.ids, rollout.ids)  # the rollout itself is untouched


def test_bf16_scoring_agrees_with_bf16_sampling(policy):
    # The rollout policy samples with bf16 weights, the update scores with float32 weights under bf16 autocast.
    rollout_policy = rarl.cast_copy(policy, torch.bfloat16)
    prompts = make_batch(policy, Settings(group_size=2)).prompts
    rollout = rarl.generate(rollout_policy, prompts, 4, 20, 1.0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = rarl.logprobs(policy, prompts, rollout.ids, rollout.mask)
    gap = (logp - rollout.logp).abs()[rollout.mask]
    assert logp.dtype == torch.float32 and gap.mean() < 0.03 and gap.max() < 0.3


def test_under_autocast_a_reference_with_bf16_linear_layers_is_the_policy_to_the_last_bit(policy):
    # As on one GPU. With all weights in bf16 the hidden states would be bf16 too, and the KL would begin above 0.
    prompts = make_batch(policy, Settings(group_size=2)).prompts
    rollout = rarl.generate(policy, prompts, 4, 20, 1.0, torch.Generator().manual_seed(0))
    reference, half = (rarl.cast_copy(policy, torch.bfloat16, kind) for kind in (torch.nn.Linear, torch.nn.Module))
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16, torch.float32}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logp, same, other = (rarl.logprobs(x, prompts, rollout.ids, rollout.mask)[0] for x in (policy, reference, half))
    assert torch.equal(logp, same) and not torch.equal(logp, other)


def test_activation_checkpointing_gives_the_same_gradients(policy):
    grads = []
    for on in (False, True):
        learner = Learner(copy.deepcopy(policy), CPU, Settings(group_size=4, activation_checkpointing=on))
        batch = make_batch(policy, learner.settings)
        # The rollout comes from the same modules, and needs their cache, which checkpointed layers do not fill.
        rarl.generate(learner.rollout_policy, batch.prompts, 2, 3)
        seen, _ = gradients_of_update(learner, batch)
        rarl.generate(learner.rollout_policy, batch.prompts, 2, 3)
        grads.append(list(seen.values()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_what_the_preflight_checks_does_not_grow_with_the_data():
    """Two tasks. Every label once, the highest twice; where they are as long, an answer has different labels first."""
    half, one = data.Task("a", "?", "up", 4), data.Task("b", "?", "up", 4, decimals=1)
    of = lambda task, *labels: [item(f"{task.name}{i}", label, task) for i, label in enumerate(labels)]
    items = of(half, 3, 12, 12, 100, 9) + of(one, -1.5, 2)
    found = [sample.labels for sample in hardest_samples(items, (1, 2, 4))]
    assert [x for x in found if len(x) == 1] == [[3], [9], [12], [100], [100], [-1.5], [2], [2]]
    assert [x for x in found if len(x) > 1] == [[100, 12], [100, 12, 12, 3], [-1.5, 2]]  # b has no four images
    many = of(half, *range(5000), *range(5000))
    assert len(hardest_samples(many, (1, 8))) <= 1002
    assert [sample.labels for sample in hardest_samples(of(half, 5, 5, 7), (2, 3))][-2:] == [[5, 7], [5, 7, 5]]


def test_preflight_refuses_what_would_corrupt_gradients(policy, monkeypatch):
    samples = data.make_samples(load_dataset("dots"), 4, 20)
    stage = Stage(2, 1, None, RewardWeights(1, 1, 1), 100)
    preflight(policy, samples, stage)
    reference = data.reference_answer
    broken = {
        "swapped ids": lambda s: reference(s).replace('"image_id": 1,', "@").replace('"image_id": 2,', '"image_id": 1,').replace("@", '"image_id": 2,'),
        "other key": lambda s: reference(s).replace("value", "count"),
        "highest first": lambda s: "[" + ", ".join(reversed(reference(s)[1:-1].split(", {"))) + "]",
        "values off": lambda s: reference(data.Sample(tuple(dataclasses.replace(i, label=i.label + 1) for i in s.items))),
    }  # fmt: skip
    for what, answer in broken.items():
        monkeypatch.setattr(data, "reference_answer", answer)
        with pytest.raises(SettingError, match="does not earn the highest reward"):
            preflight(policy, samples, stage)
            pytest.fail(what)


def test_learning_rate_by_hand():
    # warm-up over 4 steps: 1/5 .. 4/5, then from 1 down to a tenth: halfway (6 of 12 steps later) 0.55
    assert [train.learning_rate(i, 16, 4) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert train.learning_rate(10, 16, 4) == pytest.approx(0.55)
