"""What the method is compared with. Each rival is a function that replaces one of train.py's, from outside:

    python -m experiments.rivals imitation --beta 0 --name imitation      # what stands behind the name goes to train.py
    python -m experiments.rivals dynamic-sampling --rmo-k 0

    imitation         the true answer in the place of sampled ones: supervised fine-tuning
    dynamic-sampling  other prompts in the place of those whose answers all earn the same: DAPO (arXiv 2503.14476)
    crossed           RMO's good answer has the values of one answer of the group in the order of another
    dr-grpo           the group's std does not divide: Dr. GRPO (arXiv 2503.20783; its other part is left out)
    batch-std         the std of the whole batch divides, not the group's
    gdpo              each weighted reward is standardised by itself, then they are summed: GDPO (the last step of TRL's
                      normalize_then_sum, over the batch, is left out)
    ngrpo             mean and std are also over the best possible reward, so a group of equal, poor answers is pushed away
                      from them: NGRPO (arXiv 2509.18851; its other parts are left out)
    corpo             the baseline is at least what a poor answer earns, and no std divides: CoRPO (arXiv 2511.04439)

Prompts, steps, optimizer and evaluation are train.py's. Shapes: B prompts, G answers each, N = B*G; (B, G) is one number for
each answer.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import data
import grpo
import rarl
import reward
import rmo
import train
from experiments.lessons import answers_of
from support.learner.learner import Learner
from support.learner.stage import Batch, Stage
from support.run.settings import Settings
from support.show import monitor

# The method's own functions: main() puts others in their places.
standard_collect, standard_numbers = train.collect, monitor.rollout_numbers

# --------------------------------------------------------------------------------------------------------------------
# Other advantages, in the place of grpo.group_advantages


def totals_of(batch: Batch) -> Tensor:
    """(B, G) R_final, after mutation."""
    return torch.tensor([r.total for r in batch.rewards], dtype=torch.float64).view_as(batch.advantages)


def dr_grpo(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    totals = totals_of(batch)
    return totals - totals.mean(1, keepdim=True)


def batch_std(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    everything = torch.cat(learner.world.gather(totals_of(batch)))  # of all processes, so that N take the step of one
    return dr_grpo(learner, stage, batch) / (everything.std(correction=0) + 1e-4)


def gdpo(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    w = stage.weights
    parts = torch.tensor([r[:3] for r in batch.rewards], dtype=torch.float64).T  # (3, N): format, regression, ranking
    standardised = [grpo.group_advantages(part.view_as(batch.advantages)) for part in parts]
    return w.w_format * standardised[0] + w.w_reg * standardised[1] + w.w_rank * standardised[2]


def ngrpo(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    totals = totals_of(batch)
    with_best = torch.cat([totals, torch.full_like(totals[:, :1], batch.max_reward)], 1)  # (B, G + 1)
    return grpo.group_advantages(with_best)[:, :-1]


def corpo(learner: Learner, stage: Stage, batch: Batch) -> Tensor:
    totals = totals_of(batch)
    return totals - totals.mean(1, keepdim=True).clamp(min=learner.settings.rmo_poor * batch.max_reward)


def with_advantages(advantages: Callable[[Learner, Stage, Batch], Tensor]) -> Callable[..., Batch]:
    """train.collect, with the advantages (B, G) that `advantages` makes of its batch."""

    def collect(learner: Learner, stage: Stage, *rest: Any) -> Batch:
        batch = standard_collect(learner, stage, *rest)
        batch.advantages = advantages(learner, stage, batch).float()
        return batch

    return collect


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


def crossed_references(
    s: Settings, stage: Stage, sample: data.Sample, history: rmo.History, group: list[reward.Reward]
) -> list[str]:
    """In the place of train.references_for: the values of one answer of the group in the order of another.

    An answer holds both, they are scored apart, and so the child earns the R_reg of the one and the R_rank of the other. It
    is used if it earns more than what it would replace.
    """
    valid = [(r, r.answer) for r in group if r.answer]
    if not valid:
        return []
    _, best_values = max(valid, key=lambda pair: pair[0].regression)
    _, best_order = max(valid, key=lambda pair: pair[0].ranking)
    text = data.format_answer((image, f"{dict(best_values)[image]:.12g}") for image, _ in best_order)
    replaced = sorted(r.total for r in group)[: s.rmo_k]
    return [text] if stage.reward(text, sample).total > max(replaced, default=0.0) else []


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
        alike = [b for b, totals in enumerate(groups) if len(set(totals)) == 1]
        if not alike:
            break
        rngs = [random.Random(repr(("redrawn", attempt, keys[b]))) for b in alike]
        others = [data.draw_sample(sampler.pools, n, rng, sampler.weights) for rng in rngs]
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


def numbers_with_redrawn(batch: RedrawnBatch) -> dict[str, list]:
    """In the place of monitor.rollout_numbers, with `redrawn`: prompts drawn anew, per prompt of the step."""
    return standard_numbers(batch) | {"redrawn": [batch.redrawn / len(batch.samples)]}


# --------------------------------------------------------------------------------------------------------------------

ADVANTAGES = {"dr-grpo": dr_grpo, "batch-std": batch_std, "gdpo": gdpo, "ngrpo": ngrpo, "corpo": corpo}

# name -> what it replaces: (module, name of the function, the function that takes its place)
RIVALS: dict[str, list[tuple[Any, str, Callable]]] = {
    "imitation": [(train, "collect", imitate)],
    "dynamic-sampling": [(train, "collect", collect_with_spread), (monitor, "rollout_numbers", numbers_with_redrawn)],
    "crossed": [(train, "references_for", crossed_references)],
    **{name: [(train, "collect", with_advantages(function))] for name, function in ADVANTAGES.items()},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.rivals", description="Train with a rival of the method.")
    parser.add_argument("rival", choices=RIVALS, help="see the top of experiments/rivals.py")
    argv = sys.argv[1:] if argv is None else argv
    for module, name, function in RIVALS[parser.parse_args(argv[:1]).rival]:
        setattr(module, name, function)
    train.main(argv[1:])


if __name__ == "__main__":
    main()
