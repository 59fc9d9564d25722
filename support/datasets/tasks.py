"""The task of a group of labels: the data set's own or the user's question, and what follows from the labels."""

import dataclasses
import math

from data import DataError, Item, Task, format_value, make_pools

MAX_LABEL = 1e12  # what a policy can write digit by digit, and what can be squared
MIN_DELTA = 1e-9  # an error is divided by it and squared


def make_task(base: Task, overrides: dict, group: str = "", labels: list[float] | None = None) -> Task:
    """The task of one group: `base`, with the user's question, order, delta, decimals where given (not None).

    {group}, {low} and {high} in a question or order stand for the group's name and its lowest and highest label.
    Where the base leaves them open, delta and decimals are found from the labels of all splits (`fit_to_labels`).
    """
    task = dataclasses.replace(base, **check({field: x for field, x in overrides.items() if x is not None}))
    words = {"{group}": group}
    if labels:
        task = fit_to_labels(task, labels, group)
        words |= {"{low}": format_value(min(labels), task.decimals), "{high}": format_value(max(labels), task.decimals)}
    name = task.name if "{group}" in task.name or not group else f"{task.name} {{group}}"  # groups stay apart

    def fill(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    return dataclasses.replace(task, name=fill(name), question=fill(task.question), order=fill(task.order))


def check(given: dict) -> dict:
    """The same fields of a task. DataError for those that make no sense."""
    if unknown := set(given) - {"question", "order", "delta", "decimals"}:
        raise DataError(f"a task has no setting {sorted(unknown)}: question, order, delta, decimals")
    if not MIN_DELTA <= given.get("delta", 1) <= MAX_LABEL:
        raise DataError(f"--delta {given['delta']} must be positive and finite, from {MIN_DELTA:g} to {MAX_LABEL:g}")
    if given.get("decimals", 0) not in range(10):
        raise DataError(f"--decimals {given['decimals']} must be a whole number from 0 to 9")
    for text in (given.get("question", "?"), given.get("order", "?")):
        # Bytes of the command line that are no UTF-8 are kept as lone surrogates.
        if not isinstance(text, str) or not text.strip() or text.encode("utf-8", "ignore").decode() != text:
            raise DataError(f"--question and --order must be text and not empty, not {text!r}")
    return given


def fit_to_labels(task: Task, labels: list[float], group: str = "") -> Task:
    """delta and decimals from the labels, where the task leaves them open (delta 0, decimals -1).

    delta is a quarter of the labels' range, so that an answer in the middle earns something for the middle half of it.
    decimals are what it takes to write the labels, at most 3 of labels that are about 1 apart, more of smaller ones.
    """
    low, high, decimals, delta = min(labels), max(labels), task.decimals, task.delta
    if decimals < 0:
        quarter = (high - low) / 4 or 1
        most = min(9, 3 + max(0, math.floor(-math.log10(quarter))))
        decimals = next((d for d in range(most) if all(round(label, d) == label for label in labels)), most)
    if delta == 0:
        delta = float(f"{(high - low) / 4:.3g}")
        if delta < MIN_DELTA:
            raise DataError(
                f"the labels {f'of {group} ' if group else ''}are all about {low:g}, so delta is unknown: set --delta"
            )
    return dataclasses.replace(task, decimals=decimals, delta=delta)


def outliers(items: list[Item]) -> list[Item]:
    """Items whose labels lie apart, as a sentinel does (-999 for "unknown"): beyond a gap as wide as all between the gaps.

    At most one in 20 on either side. Where delta or the question follow from the labels, one such spoils both.
    """
    pools = make_pools(items, 1).values() if items else []
    return [item for pool in pools for item in _apart(sorted(pool, key=lambda item: item.label))]


def _apart(items: list[Item]) -> list[Item]:
    """Of one task's items, in the order of their labels."""
    edge = len(items) // 20
    first, last = edge, len(items) - 1 - edge
    low, high = items[first].label, items[last].label
    if low == high:  # nearly all labels are alike: nothing to measure a gap by
        return []
    while first > 0 and low - items[first - 1].label <= high - low:
        first, low = first - 1, items[first - 1].label
    while last < len(items) - 1 and items[last + 1].label - high <= high - low:
        last, high = last + 1, items[last + 1].label
    return items[:first] + items[last + 1 :]
