"""Even drawing: rare labels more often, so that no single answer does well everywhere (README, choice 9).

Labels of real data are skewed, and then the best constant answer earns about as much as a good policy, so that training
finds the constant: on dots whose labels are geometric, 0.71 against 0.77 of R_reg; drawn evenly, 0.42 against 0.77. A
smaller delta helps too, but the mode stays the best constant.
"""

import numpy as np

import reward
from data import Item, Task, make_pools

BINS = 500


def task_weights(items: list[Item]) -> dict[Task, list[float]] | None:
    """How often to draw each item of each task, in the items' order, for `data.Sampler`. None: all alike.

    Only items with files are weighted. The drawn sets are even already.
    """
    if not any(item.path for item in items):
        return None
    pools = make_pools(items, 1)
    return {task: even_weights([item.label for item in pool], task.delta) for task, pool in pools.items()}


def even_weights(labels: list[float], delta: float, most: float = 4.0) -> list[float]:
    """Weights, 1 on average, in inverse proportion to what saying an item's label of every image would earn.

    Saying the number y earns R_reg(y) = mean_i r(y, y_i), r of `reward.value_reward`. It is highest where labels are
    dense: with skewed labels, near the mode. There it may earn as much as a policy that looks. No weight is above `most`
    (> 1): a few rare images repeated all the time would be learned by heart.
    """
    numbers, place = np.unique(np.asarray(labels, dtype=np.float64), return_inverse=True)
    if len(numbers) > BINS:
        edges = np.linspace(numbers[0], numbers[-1], BINS + 1)
        place = np.minimum(np.searchsorted(edges, labels, "right") - 1, BINS - 1)
        numbers = (edges[1:] + edges[:-1]) / 2
    counts = np.bincount(place, minlength=len(numbers))
    numbers, share = numbers[counts > 0].tolist(), counts[counts > 0] / len(place)
    earned = np.array([[reward.value_reward(y, label, delta) for label in numbers] for y in numbers]) @ share
    weights = 1 / earned  # > 0: a label earns at least its own share
    weights /= share @ weights
    capped = np.zeros(len(weights), dtype=bool)
    while (weights > most).any():  # what the cap takes away, the others get; that may lift another one above it
        capped |= weights > most
        weights *= (1 - most * share[capped].sum()) / (share[~capped] @ weights[~capped])
        weights[capped] = most
    return weights[(np.cumsum(counts > 0) - 1)[place]].tolist()
