"""Response Mutation Operations (RMO): in a group that teaches nothing, replace some answers by good ones.

Why. GRPO's advantage is A_i = (r_i - mean) / std within a group of G answers. If all score the same r, every
A_i is 0 and the group has no gradient; if that r is poor, the policy is stuck there. Let k of them be
replaced by answers that score r + d. Then mean = r + d k / G, std = d sqrt(k (G - k)) / G, and d cancels:

    A_mutated = sqrt((G - k) / k)        A_others = -sqrt(k / (G - k))

With G = 8 and k = 1 that is 2.65 and -0.38: a pull towards the good answer and a small push away from each of
the rest. k = G would be 0 again, for want of contrast, and is refused.

The paper (arXiv 2601.20585, by its public summaries) states: when a group is homogeneous and poor, k
low-reward answers are replaced, with some probability, by the ground truth or an earlier high-reward answer.
Not stated, so ours:
1. Homogeneous: the rewards' population std <= `spread`. Poor: the best of them <= `poor`.
2. The k lowest are replaced, ties in random order: a homogeneous group is mostly ties, and position is no
   reason.
3. The source is whatever the caller lists as references. Each is used once before any is used twice.
4. A call draws 1 + G + k random numbers, whatever the group looks like. So one group's rewards do not change
   the luck of the next, and runs with other rewards or references stay comparable.

The caller scores the returned answers again and computes the advantages from those rewards. The policy did
not sample the mutated answers. With one update per rollout they are scored like the others (old_logp=None in
grpo.py: ratio 1, so the gradient is A times that of their log-prob, as in imitation); with several, their
old log-probs are those of the policy before the first.

Shapes: G answers per prompt.
"""

import statistics
from collections.abc import Sequence

import torch


def uniforms(rng, n: int) -> list[float]:
    """n numbers in [0, 1) from a torch.Generator or from anything with .random() (Python's, NumPy's)."""
    if isinstance(rng, torch.Generator):
        return torch.rand(n, generator=rng, device=rng.device, dtype=torch.float64).tolist()
    return [float(rng.random()) for _ in range(n)]


def mutate(
    responses: Sequence,
    rewards: Sequence[float] | torch.Tensor,
    references: Sequence,
    k: int,
    probability: float,
    *,
    spread: float = 0.1,
    poor: float = 0.5,
    rng,
) -> tuple[list, list[bool]]:
    """Replace the k lowest-reward responses of a group that is homogeneous and poor, with the given chance.

    responses    G answers, of any type
    rewards      G finite numbers
    references   good answers to draw from; none: nothing is mutated
    k            how many are replaced, 0 <= k < G; 0 switches RMO off
    probability  that a homogeneous and poor group is mutated, in [0, 1]
    spread, poor bounds for "homogeneous" and "poor" (see the module), in the unit of the rewards; the
                 defaults suit rewards whose best is 1 (train.py gives shares of full marks, as it has more)
    rng          torch.Generator, random.Random or numpy.random.Generator; it advances by 1 + G + k numbers

    Returns (responses, mutated), two new lists of length G; mutated[i]: response i came from the references.
    Raises ValueError if lengths disagree, a reward is not finite, or k or probability is out of range, and
    TypeError if references is one string.

    >>> import random
    >>> mutate(["a", "b", "c"], [0.1, 0.0, 0.1], ["truth"], 1, 1.0, rng=random.Random(0))
    (['a', 'truth', 'c'], [False, True, False])
    >>> mutate(["a", "b", "c"], [0.1, 0.0, 0.9], ["truth"], 1, 1.0, rng=random.Random(0))  # "c" is good
    (['a', 'b', 'c'], [False, False, False])
    """
    responses = list(responses)
    rewards = torch.as_tensor(rewards, dtype=torch.float64)  # (G,)
    group_size = len(responses)
    if rewards.shape != (group_size,):
        raise ValueError(f"rewards must be ({group_size},), one per response, not {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    if isinstance(references, str):
        raise TypeError("references must be a list of answers; of one string, the letters would be drawn")
    if not 0 <= k < group_size:
        raise ValueError(f"k must be in 0..{group_size - 1}, to leave a response for contrast, not {k}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], not {probability}")

    trigger, *rest = uniforms(rng, 1 + group_size + k)
    tie_break, picks = rest[:group_size], rest[group_size:]
    mutated = [False] * group_size
    rewards = rewards.tolist()
    homogeneous = statistics.pstdev(rewards) <= spread  # exact: equal rewards give 0, whatever the rounding
    # trigger is in [0, 1): probability 1 means always, 0 never.
    if not (homogeneous and max(rewards) <= poor and len(references) > 0 and trigger < probability):
        return responses, mutated

    lowest = sorted(range(group_size), key=lambda i: (rewards[i], tie_break[i]))[:k]
    pool: list = []
    for i, pick in zip(lowest, picks, strict=True):
        pool = pool or list(references)
        responses[i] = pool.pop(int(pick * len(pool)))
        mutated[i] = True
    return responses, mutated
