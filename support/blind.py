"""What a policy would say that looks at no image: the constants that the labels alone would teach it."""

import statistics
from collections.abc import Sequence

import numpy as np

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
