"""What a policy would say that looks at no image: the constants that the labels alone would teach it."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from data import Item, Sample, Task, format_answer, format_value

GRID = 4096  # candidates at most; beyond it, only numbers that are labels


def best_constant(labels: Sequence[float], delta: float, decimals: int) -> tuple[float, float]:
    """The constant answer that earns most by R_reg, and the one that errs least by MAE (the median).

    Both have the task's decimals, as an answer would. Of equally good ones by R_reg it is the lowest.

    >>> best_constant([1, 1, 1, 9, 9, 10, 30], delta=4, decimals=0)  # R_reg prefers the mode, the median is 9
    (1.0, 9.0)
    """
    numbers, counts = np.unique(np.asarray(labels, dtype=np.float64), return_counts=True)
    candidates = _candidates(numbers, decimals)
    with np.errstate(over="ignore"):  # labels may be as far apart as floats go
        earned = [float(counts @ np.maximum(0, 1 - ((value - numbers) / delta) ** 2)) for value in candidates]
    median = statistics.median_low(labels) / 2 + statistics.median_high(labels) / 2  # halved first: 1e308 is a label
    return float(candidates[int(np.argmax(earned))]), round(median, decimals)


def _candidates(numbers: np.ndarray, decimals: int) -> np.ndarray:
    """Every number of so many decimals from the lowest label to the highest, or the labels themselves."""
    low, high = float(numbers[0]), float(numbers[-1])
    if (high / 2 - low / 2) * 10**decimals < GRID / 2:
        first = round(low, decimals)
        return np.round(first + np.arange(round((high - first) * 10**decimals) + 1) / 10**decimals, decimals)
    return np.unique(np.round(numbers, decimals))


def best_constants(tasks: Iterable[Task], train_items: Sequence[Item]) -> dict[str, dict[str, float]]:
    """{"best constant by R_reg": {task name: value}, "best constant by MAE": {...}}; {} without training labels.

    A task without training images of its own gets the constant of all training labels.
    """
    if not train_items:
        return {}
    labels: dict[str, list[float]] = defaultdict(list)
    for item in train_items:
        labels[item.task.name].append(item.label)
    everything = [item.label for item in train_items]
    found = {t.name: best_constant(labels.get(t.name, everything), t.delta, t.decimals) for t in tasks}
    by_reward = {name: constants[0] for name, constants in found.items()}
    by_error = {name: constants[1] for name, constants in found.items()}
    return {"best constant by R_reg": by_reward, "best constant by MAE": by_error}


def constant_answer(sample: Sample, value: float) -> str:
    """The answer that says one value of every image, and lists the images in the order of the prompt."""
    text = format_value(value, sample.task.decimals)
    return format_answer((i, text) for i in range(1, len(sample.items) + 1))
