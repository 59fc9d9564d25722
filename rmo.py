"""Response Mutation Operations (RMO): in a group that teaches nothing, replace some answers by good ones.

Version 2026.11 of "RARL, by hand"; runs with Python 3.11, torch 2.13.

Why. GRPO's advantage is A_i = (r_i - mean) / std within a group of G answers. If all score the same r, every
A_i is 0 and the group has no gradient; if that r is poor, the policy is stuck there. Let k of them be
replaced by answers that score r + d. Then mean = r + d k / G, std = d sqrt(k (G - k)) / G, and d cancels:

    A_mutated = sqrt((G - k) / k)        A_others = -sqrt(k / (G - k))

With G = 8 and k = 1 that is 2.65 and -0.38: a pull towards the good answer and a small push away from each of
the rest. With k = G there would be no contrast and the advantages would be 0 again, so that is refused.

The paper (arXiv 2601.20585, by its public summaries) states: when a group is homogeneous and poor, k
low-reward answers are replaced, with some probability, by the ground truth or an earlier high-reward answer.
Not stated, so ours:
1. Homogeneous: the rewards' population std is at most `spread`. Poor: the best of them is at most `poor`.
2. The k lowest are replaced, ties in random order: most answers of a homogeneous group are tied, and an
   answer's place in the group is no reason to replace it.
3. The source is whatever the caller lists as references. Each is used once before any is used twice.
4. A call draws 1 + G + k random numbers, whatever the group looks like. So one group's rewards do not change
   the luck of the next, and runs with other rewards or references stay comparable.
5. Earlier high-reward answers: a prompt of several random images hardly ever comes twice, so whole earlier
   answers would not serve. The history keeps the best value that an earlier answer gave for each image
   (`remember`, `merge`), and `recall` makes an answer of them, in the order of these values.

The caller scores the returned answers again and computes the advantages from those rewards. The policy did
not sample the mutated answers. With one update per rollout they are scored like the others (old_logp=None in
grpo.py: ratio 1, so the gradient is A times that of their log-prob, as in imitation); with several updates,
their old log-probs are those of the policy before the first. Learning from answers of another source beside
one's own is what LUFFY does too (arXiv 2504.14945).

Shapes: G answers per prompt.
"""

import math
import statistics
from collections.abc import Sequence

import torch

SPREAD, POOR = 0.05, 0.7  # shares of the best possible reward: see `mutate`


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
    spread: float = SPREAD,
    poor: float = POOR,
    max_reward: float = 1.0,
    rng,
) -> tuple[list, list[bool]]:
    """Replace the k lowest-reward responses of a group that is homogeneous and poor, with the given chance.

    responses     G answers, of any type
    rewards       G finite numbers
    references    good answers to draw from; none: nothing is mutated
    k             how many are replaced, 0 <= k < G; 0 switches RMO off
    probability   that a homogeneous and poor group is mutated, in [0, 1]
    spread, poor  bounds for "homogeneous" and "poor" (see the module), as shares of max_reward
    max_reward    the most that a response can earn: with reward.py w_reg + w_rank + w_format, so 3 by its defaults (2 for
                  one image). With too low a value no group ever counts as poor
    rng           torch.Generator, random.Random or numpy.random.Generator; it advances by 1 + G + k numbers

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
    # pstdev is exact: equal rewards give 0, where a mean in floating point may miss them by a rounding step.
    homogeneous = statistics.pstdev(rewards) <= spread * max_reward
    is_poor = max(rewards) <= poor * max_reward
    # trigger is in [0, 1): probability 1 means always, 0 never.
    if not (homogeneous and is_poor and len(references) > 0 and trigger < probability):
        return responses, mutated

    lowest = sorted(range(group_size), key=lambda i: (rewards[i], tie_break[i]))[:k]
    pool: list = []
    for i, pick in zip(lowest, picks, strict=True):
        pool = pool or list(references)
        responses[i] = pool.pop(int(pick * len(pool)))
        mutated[i] = True
    return responses, mutated


# An image's name -> (error, value) of the best earlier answer about it: the smallest error |value - label|, and
# of equal errors the smaller value, so that the order in which answers come does not matter.
History = dict[str, tuple[float, float]]


def remember(
    names: Sequence[str], labels: Sequence[float], answers: Sequence[Sequence[tuple[int, float]] | None]
) -> History:
    """The best value that these answers to one prompt gave for each of its images.

    names, labels  of images 1..n        answers  each a list of (image_id, value), or None if it was not valid

    >>> remember(["a", "b"], [10, 5], [[(1, 13.0), (2, 5.0)], None, [(1, 9.0), (2, 1.0)]])
    {'a': (1.0, 9.0), 'b': (0.0, 5.0)}
    """
    known = [{names[i - 1]: (abs(value - labels[i - 1]), value)} for answer in answers for i, value in answer or ()]
    return merge(*known)


def merge(*histories: History) -> History:
    """One history with the best entry for each image. The arguments stay as they are."""
    merged: History = {}
    for history in histories:
        for name, (error, value) in history.items():
            merged[name] = min((error, value), merged.get(name, (error, value)))
    return merged


def recall(history: History, names: Sequence[str], tolerance: float) -> list[tuple[int, float]]:
    """(image_id, value) of the best earlier values for a prompt's images, lowest value first.

    Empty if an image is unknown or its best value is `tolerance` or more off: then it would earn nothing.

    >>> recall({"a": (1.0, 9.0), "b": (0.0, 5.0)}, ["a", "b"], tolerance=4)
    [(2, 5.0), (1, 9.0)]
    """
    entries = [history.get(name, (math.inf, 0.0)) for name in names]
    if any(error >= tolerance for error, _ in entries):
        return []
    return sorted(((i, value) for i, (_, value) in enumerate(entries, start=1)), key=lambda entry: (entry[1], entry[0]))
