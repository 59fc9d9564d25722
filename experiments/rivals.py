"""What the method is compared with. Each rival is a function that replaces one of train.py's, from outside:

    python -m experiments.rivals imitation --beta 0 --name imitation      # what stands behind the name goes to train.py
    python -m experiments.rivals dynamic-sampling --rmo-k 0

    rarl              the method itself
    imitation         the true answer in the place of sampled ones: supervised fine-tuning
    dynamic-sampling  other prompts in the place of those whose answers all earn the same: DAPO (arXiv 2503.14476)
    dr-grpo           the group's std does not divide: Dr. GRPO (arXiv 2503.20783; its other part is left out)
    gdpo              each weighted reward is standardised by itself, then they are summed: GDPO (the last step of TRL's
                      normalize_then_sum, over the batch, is left out)
    ngrpo             mean and std are also over the best possible reward, so a group of equal, poor answers is pushed away
                      from them: NGRPO (arXiv 2509.18851; its other parts are left out)
    outside           RMO, but its good answer is outside the mean and the std that the sampled ones are compared with
    orarl             the true answer is one more row of every group and never in its mean: OraRL (arXiv 2608.20492)
    orarl-half        the same, and the update takes half of each group, as many good answers as poor ones
    ccc               in the place of R_reg the concordance of a prompt's values with the whole batch's (arXiv 2605.01402)
    rank-values       R_rank is of the order that the values imply, not of the list
    rank-both         R_rank is the mean of both

Prompts, steps, optimizer and evaluation are train.py's; metrics.jsonl has one more number, `inverted` (see `numbers`).
Shapes: B prompts, G answers each, N = B*G; (B, G) is one number for each answer.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import data
import eval as evaluation
import grpo
import rarl
import reward
import rmo
import train
from experiments.lessons import answers_of
from experiments.runs import concordance
from support.learner.learner import Learner
from support.learner.stage import Batch, Stage
from support.show import monitor

# The method's own functions: main() puts others in their places.
standard_collect, standard_update = train.collect, train.update
standard_reward, standard_numbers = Stage.reward, monitor.rollout_numbers

# --------------------------------------------------------------------------------------------------------------------
# Other advantages, in the place of grpo.group_advantages


def totals_of(batch: Batch) -> Tensor:
    """(B, G) R_final, after mutation."""
    return torch.tensor([r.total for r in batch.rewards], dtype=torch.float64).view_as(batch.advantages)


def with_truth(batch: Batch) -> Tensor:
    """(B, G + 1) R_final, and behind it what the true answer would earn."""
    totals = totals_of(batch)
    return torch.cat([totals, torch.full_like(totals[:, :1], batch.max_reward)], 1)


def dr_grpo(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    totals = totals_of(batch)
    return totals - totals.mean(1, keepdim=True)


def gdpo(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    w = stage.weights
    parts = torch.tensor([r[:3] for r in batch.rewards], dtype=torch.float64).T  # (3, N): format, regression, ranking
    standardised = [grpo.group_advantages(part.view_as(batch.advantages)) for part in parts]
    return w.w_format * standardised[0] + w.w_reg * standardised[1] + w.w_rank * standardised[2]


def ngrpo(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    return grpo.group_advantages(with_truth(batch))[:, :-1]


def outside(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    """Sampled answers are compared with each other alone; a mutated one keeps the advantage, and so the pull, that RMO gives it."""
    advantages, totals = batch.advantages.clone(), totals_of(batch)
    for b, mutated in enumerate(batch.mutated.view_as(advantages)):
        advantages[b, ~mutated] = grpo.group_advantages(totals[b, ~mutated][None])[0].float()
    return advantages


# OraRL leaves these to whoever trains; ours. MOST is the paper's.
GAMMA, SCALE, MOST = 1.0, 1.0, 4.0


def orarl(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    """Of sampled answers: r - mean; what is above it grows with the std that the true answer would add; centred again.

    a = r - mean(r);  a = a * min(4, max(1, (std with the truth / std)^gamma)) where a > 0;  A = a - mean(a)
    """
    totals = totals_of(batch)
    above = totals - totals.mean(1, keepdim=True)
    std, wider = (x.std(1, correction=0, keepdim=True) for x in (totals, with_truth(batch)))
    gain = (wider / std.clamp(min=1e-4)).pow(GAMMA).clamp(1, MOST)
    above = torch.where(above > 0, above * gain, above)
    return above - above.mean(1, keepdim=True)


def pull_of_truth(batch: Batch) -> Tensor:
    """(B, 1) OraRL's advantage of the true answer: scale * clip((r_truth - mean) / r_truth, 0, 1)^2. It fades as answers get good."""
    missing = 1 - totals_of(batch).mean(1, keepdim=True) / batch.max_reward
    return SCALE * missing.clamp(0, 1) ** 2


def ccc(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    """R_reg is (1 + CCC) / 2 of an answer's values among those of the whole batch (runs.concordance; 1 where it is undefined).

    The pairs (value, label) are those of the answer for its own images, and for the images of all other prompts, of all processes,
    the mean over the valid answers. How several images share a prompt, and the scale, are ours.
    """
    answers = batch.groups([r.answer for r in batch.rewards])
    means: list[list[tuple[float, float]]] = []  # of each prompt, for each of its images
    for sample, group in zip(batch.samples, answers, strict=True):
        said = defaultdict(list)
        for image, value in (pair for answer in group for pair in answer or ()):
            said[image].append(value)
        means.append([(sum(values) / len(values), sample.labels[i - 1]) for i, values in said.items()])
    elsewhere = [pair for rank, theirs in enumerate(learner.world.gather(means)) for some in theirs for pair in some
                 if rank != learner.world.rank]  # fmt: skip
    totals, w = totals_of(batch), stage.weights
    for b, (sample, group) in enumerate(zip(batch.samples, batch.groups(batch.rewards), strict=True)):
        others = elsewhere + [pair for i, some in enumerate(means) if i != b for pair in some]
        for g, r in enumerate(group):
            if r.answer:
                own = [(value, sample.labels[image - 1]) for image, value in r.answer]
                agreement = concordance(*zip(*own, *others, strict=True))
                earned = 1.0 if math.isnan(agreement) else (1 + agreement) / 2
                totals[b, g] += w.w_reg * (earned - r.regression)
    return grpo.group_advantages(totals)


def with_advantages(advantages: Callable[[Learner, Stage, Batch], Tensor]) -> Callable[..., Batch]:
    """train.collect, with the advantages (B, G) that `advantages` makes of its batch."""

    def collect(learner: Learner, stage: Stage, *rest: Any) -> Batch:
        batch = standard_collect(learner, stage, *rest)
        batch.advantages = advantages(learner, stage, batch).float()
        return batch

    return collect


# --------------------------------------------------------------------------------------------------------------------
# Other updates


def update_with_truth(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, Any]:
    """In the place of train.update: the true answer is one more row of every group."""
    texts = [data.reference_answer(sample) for sample in batch.samples]
    ids, mask = (x.to(batch.ids.device) for x in answers_of(learner.policy, texts))  # (B, T) each
    truth = rarl.Rollout(ids, mask, torch.zeros(ids.shape, device=ids.device))
    sampled = rarl.Rollout(batch.ids, batch.mask, batch.sampled_logp)
    both = rarl.concatenate([sampled, truth], learner.policy.eos_id)
    B, G = batch.advantages.shape
    rows = torch.cat([torch.arange(B * G).view(B, G), torch.arange(B * G, B * G + B)[:, None]], 1).flatten()
    mutated = torch.cat([batch.mutated, torch.ones(B, dtype=torch.bool)])
    advantages = torch.cat([batch.advantages, pull_of_truth(batch).float()], 1)  # (B, G + 1)
    wide = Batch(batch.prompts, both.ids[rows], both.mask[rows], both.logp[rows], mutated[rows], advantages)
    return standard_update(learner, optimizer, wide)


def update_half_with_truth(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, Any]:
    """The same of the G/4 answers of each group with the highest and the G/4 with the lowest advantages."""
    B, G = batch.advantages.shape
    order, few = batch.advantages.argsort(dim=1, stable=True), max(1, G // 4)
    kept = torch.cat([order[:, :few], order[:, -few:]], 1)  # (B, G/2)
    rows = (torch.arange(B)[:, None] * G + kept).flatten()
    rewards = [batch.rewards[row] for row in rows.tolist()]
    return update_with_truth(learner, optimizer, replace(
        batch, ids=batch.ids[rows], mask=batch.mask[rows], sampled_logp=batch.sampled_logp[rows], mutated=batch.mutated[rows],
        advantages=batch.advantages.gather(1, kept), rewards=rewards,
    ))  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Other rewards


def ranked_by_values(share: float) -> Callable[..., reward.Reward]:
    """Stage.reward, with this share of R_rank from the order that the values imply, the rest from the list."""

    def score(stage: Stage, text: str, sample: data.Sample) -> reward.Reward:
        usual, w = standard_reward(stage, text, sample), stage.weights
        if usual.answer is None or len(sample.items) == 1:
            return usual
        tau = evaluation.tau_of_values([value for _, value in sorted(usual.answer)], sample.labels)
        ranking = (1 - share) * usual.ranking + share * (1.0 if math.isnan(tau) else (1 + tau) / 2)
        total = w.w_reg * usual.regression + w.w_rank * ranking + w.w_format * usual.format
        changed = reward.Reward(usual.format, usual.regression, ranking, total)
        changed.answer = usual.answer
        return changed

    return score


# --------------------------------------------------------------------------------------------------------------------
# Other answers, other prompts


def imitate(learner: Learner, stage: Stage, step: int, samples: list, prompts: list, history: rmo.History) -> Batch:
    """In the place of train.collect: the true answer to each of B prompts, with advantage 1.

    The ratio is 1 (one update per rollout), so the gradient is that of -mean_t log pi(o_t). With --beta 0 nothing is added.
    """
    texts = [data.reference_answer(sample) for sample in samples]
    ids, mask = (x.to(learner.policy.device) for x in answers_of(learner.policy, texts))  # (B, T) each
    B, logp = len(texts), torch.zeros(ids.shape, device=ids.device)  # of answers that nobody sampled
    rewards = [stage.reward(text, sample) for text, sample in zip(texts, samples, strict=True)]
    return Batch(
        prompts, ids, mask, logp, torch.ones(B, dtype=torch.bool), torch.ones(B, 1), samples=samples, texts=texts,
        sampled_rewards=rewards, rewards=rewards, sampled_tokens=mask.sum(1),
        max_reward=stage.weights.max_reward(len(samples[0].items)),
    )  # fmt: skip


TRIES = 2  # times that a prompt is drawn anew; what is still alike then stays


@dataclass
class RedrawnBatch(Batch):
    redrawn: int = 0  # prompts that were drawn anew


def collect_with_spread(
    learner: Learner, stage: Stage, step: int, samples: list, prompts: list, history: rmo.History
) -> RedrawnBatch:  # fmt: skip
    """In the place of train.collect: prompts whose answers all earn the same are replaced by others, again and again.

    The new images are read here, not beforehand, so this is slow where images are large.
    """
    batch, redrawn = standard_collect(learner, stage, step, samples, prompts, history), 0
    keys, sampler, n = learner.random_keys(stage.number, step, len(samples)), stage.sampler, len(samples[0].items)
    for attempt in range(1, TRIES + 1):
        groups = batch.groups([r.total for r in batch.sampled_rewards])
        alike = [b for b, totals in enumerate(groups) if max(totals) - min(totals) <= monitor.SAME]
        if not alike:
            break
        rngs = [random.Random(repr(("redrawn", attempt, keys[b]))) for b in alike]
        others = [data.draw_sample(sampler.pools, n, rng, sampler.cumulative) for rng in rngs]
        their_prompts = data.make_prompts(learner.policy, others)
        learner.prepare(their_prompts)
        # Its random generators are seeded by the step: one that no step has.
        new = standard_collect(learner, stage, step + attempt * 10**6, others, their_prompts, history)
        batch = replaced(batch, new, alike, learner.policy.eos_id)
        redrawn += len(alike)
    return RedrawnBatch(**vars(batch), redrawn=redrawn)


def replaced(batch: Batch, new: Batch, places: list[int], filler: int) -> Batch:
    """The batch with the groups of `new` at these places."""
    B, G = batch.advantages.shape
    groups = list(range(B))  # places in the batch followed by `new`
    for i, b in enumerate(places):
        groups[b] = B + i
    rows = [b * G + g for b in groups for g in range(G)]
    answers = rarl.concatenate([rarl.Rollout(x.ids, x.mask, x.sampled_logp) for x in (batch, new)], filler)

    def chosen(name: str, at: list[int]) -> Any:
        ours, theirs = getattr(batch, name), getattr(new, name)
        return [(ours + theirs)[i] for i in at] if isinstance(ours, list) else torch.cat([ours, theirs])[at]

    by_group = {name: chosen(name, groups) for name in ("prompts", "samples", "advantages")}
    by_row = {n: chosen(n, rows) for n in ("mutated", "texts", "sampled_rewards", "rewards", "sampled_tokens")}
    return Batch(
        ids=answers.ids[rows], mask=answers.mask[rows], sampled_logp=answers.logp[rows], max_reward=batch.max_reward,
        **by_group, **by_row,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------


def numbers(batch: Batch) -> dict[str, list]:
    """In the place of monitor.rollout_numbers, with `inverted`: the share of sampled answers that earn more than the mean of their
    group's sampled ones and yet have a negative advantage. And `redrawn`: prompts drawn anew, per prompt of the step."""
    totals = torch.tensor([r.total for r in batch.sampled_rewards], dtype=torch.float64).view_as(batch.advantages)
    better = (totals > totals.mean(1, keepdim=True) + monitor.SAME).flatten()
    inverted = better & (batch.advantages.flatten() < 0)
    redrawn = {"redrawn": [batch.redrawn / len(batch.samples)]} if isinstance(batch, RedrawnBatch) else {}
    return standard_numbers(batch) | {"inverted": inverted.tolist()} | redrawn


MEASURED = (monitor, "rollout_numbers", numbers)  # replaced whichever rival trains
# name -> what it replaces: (module, name of the function, the function that takes its place)
RIVALS: dict[str, list[tuple[Any, str, Callable]]] = {
    "rarl": [],
    "imitation": [(train, "collect", imitate)],
    "dynamic-sampling": [(train, "collect", collect_with_spread)],
    "dr-grpo": [(train, "collect", with_advantages(dr_grpo))],
    "gdpo": [(train, "collect", with_advantages(gdpo))],
    "ngrpo": [(train, "collect", with_advantages(ngrpo))],
    "outside": [(train, "collect", with_advantages(outside))],
    "orarl": [(train, "collect", with_advantages(orarl)), (train, "update", update_with_truth)],
    "orarl-half": [(train, "collect", with_advantages(orarl)), (train, "update", update_half_with_truth)],
    "ccc": [(train, "collect", with_advantages(ccc))],
    "rank-values": [(Stage, "reward", ranked_by_values(1.0))],
    "rank-both": [(Stage, "reward", ranked_by_values(0.5))],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.rivals", description="Train with a rival of the method.")
    parser.add_argument("rival", choices=RIVALS, help="see the top of experiments/rivals.py")
    argv = sys.argv[1:] if argv is None else argv
    for module, name, function in [MEASURED, *RIVALS[parser.parse_args(argv[:1]).rival]]:
        setattr(module, name, function)
    train.main(argv[1:])


if __name__ == "__main__":
    main()
