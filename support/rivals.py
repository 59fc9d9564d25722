"""Rivals of the method, which experiments/ compares it with: other advantages, another way out of groups that are alike,
and a weight of R_rank that adapts by itself. A default run uses none of them.

The formulas are in grpo.py; here stands what they need from a step. Shapes: B prompts, G answers each, N = B*G.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import data
import grpo
import rarl
from support.run.settings import Settings
from support.show.tables import mean


def advantages(s: Settings, weights, scored: list, totals: Tensor, most: float, world) -> Tensor:
    """(B, G) from the N rewards, as --advantage says.

    weights: train.RewardWeights    totals: (B, G), theirs    most: the best possible one    world: the processes
    """
    match s.advantage:
        case "gdpo":  # each reward by itself; the last step of TRL's normalize_then_sum, over the batch, is left out
            parts = ((weights.w_reg, "regression"), (weights.w_rank, "ranking"), (weights.w_format, "format"))
            part_of = lambda part: torch.tensor([getattr(r, part) for r in scored], dtype=totals.dtype).view_as(totals)
            by_part = [w * grpo.group_advantages(part_of(part)) for w, part in parts]
            return torch.stack(by_part).sum(0).float()
        case "batch":  # over all processes, so that N of them take the step that one would
            std = torch.cat(world.gather(totals)).std(correction=0)
            return grpo.group_advantages(totals, scale=std + 1e-4).float()
        case "dr-grpo":
            return grpo.group_advantages(totals, scale=1.0).float()
        case "ngrpo":
            return grpo.group_advantages(totals, best=most).float()
        case "corpo":
            return grpo.group_advantages(totals, floor=s.rmo_poor * most, scale=1.0).float()
        case _:  # rl-zvp differs in groups without spread alone, and there by token: see token_advantages
            return grpo.group_advantages(totals).float()


def token_advantages(batch, entropy: Tensor) -> Tensor:
    """(N, T): in groups without spread those of RL-ZVP, in the others the answer's at each token.

    batch: train.Batch    entropy: (N, T)
    """
    G = batch.advantages.shape[1]
    alike, good = (x.repeat_interleave(G).to(entropy.device) for x in (~batch.advantages.any(1), batch.good))  # (N,)
    by_answer = batch.advantages.view(-1, 1).to(entropy.device)  # (N, 1)
    return torch.where(alike[:, None], grpo.entropy_advantages(entropy, batch.mask, good), by_answer)


def resample(roll: Callable, learner, stage, step: int, rolled, keys: list[tuple]) -> tuple[Any, int]:
    """Other prompts in the place of those whose answers all earn the same: DAPO's dynamic sampling (arXiv 2503.14476).

    Again and again for what is still alike, --resample times at most; what remains then stays. The new images are read
    here, not by the workers beforehand, so this is slow where images are large.

    roll    train.roll_out, which answers prompts      rolled  what it gave for the step's own prompts: train.Rolled
    Returns the like of `rolled`, and how many prompts were drawn anew.
    """
    world, G, redrawn = learner.world, learner.settings.group_size, 0
    for attempt in range(1, learner.settings.resample + 1):
        totals = [r.total for r in rolled.rewards]
        alike = [b for b in range(len(rolled.samples)) if len(set(totals[b * G : (b + 1) * G])) == 1]
        if not alike:
            break
        mine = stage.sampler.batch(step, attempt)[world.rank :: world.size]
        samples = [mine[b] for b in alike]
        prompts = data.make_prompts(learner.policy, samples)
        learner.prepare(prompts)
        new = roll(learner, stage, samples, prompts, [(*keys[b], attempt) for b in alike])
        rolled = _put(rolled, new, alike, G, learner.policy.eos_id)
        redrawn += len(alike)
    return rolled, redrawn


def _put(rolled, new, places: list[int], G: int, filler: int):
    """`rolled` with the groups of `new` at these places."""
    N = len(rolled.texts)
    group, row = list(range(len(rolled.samples))), list(range(N))  # places in `rolled` followed by `new`
    for i, b in enumerate(places):
        group[b] = len(rolled.samples) + i
        row[b * G : (b + 1) * G] = range(N + i * G, N + (i + 1) * G)
    take = lambda name, which: [(getattr(rolled, name) + getattr(new, name))[i] for i in which]
    both = rarl.concatenate([rolled.rollout, new.rollout], filler)
    return rolled._replace(
        samples=take("samples", group),
        prompts=take("prompts", group),
        rollout=rarl.Rollout(both.ids[row], both.mask[row], both.logp[row]),
        texts=take("texts", row),
        rewards=take("rewards", row),
    )


def with_adaptive_rank_weight(stage, world, rewards: list):
    """The stage (train.Stage) with w_rank times the mean R_reg of this step's answers, over all processes.

    So the order counts little while the values are wrong, and more as they settle, without a second stage: our answer to
    the paper's "training everything from the start was unstable". It needs no state.
    """
    right = mean(world.gather(mean(r.regression for r in rewards)))  # every process has as many answers
    return dataclasses.replace(stage, weights=dataclasses.replace(stage.weights, w_rank=stage.weights.w_rank * right))
