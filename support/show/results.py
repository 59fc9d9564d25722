"""Evaluations as people and files read them: tables, intervals, remarks, and what a policy that sees no image would get."""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import reward
from data import Item, Sample, format_answer, format_value
from support.run.atomic_files import write_text

Results = dict[str, dict[int, dict]]  # policy -> number of images -> metrics of eval.summarize, and what `beside` says

ENOUGH = 10  # of fewer values or prompts a correlation is luck, an interval a guess, and being alike may be chance

# --- numbers ------------------------------------------------------------------------------------------------


def mean(values: Iterable[float | None]) -> float:
    """Mean of the numbers that are known; None and nan are left out. nan if none is known.

    >>> mean([1.0, None, 2.0, math.nan])
    1.5
    """
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def finite(tree: Any) -> Any:
    """For JSON, which has no NaN: numbers that are not finite become None, anywhere in a tree of dicts and lists."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write_predictions(predictions: Sequence[dict], path: Path) -> None:
    """One JSON object a line."""
    lines = [json.dumps(finite(p), allow_nan=False) for p in predictions]
    write_text(path, "".join(line + "\n" for line in lines))


def append_line(path: Path, entry: dict) -> None:
    """A JSON object as the last line of a file, written at once."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(entry)) + "\n")


def format_number(x: float | None, digits: int = 3) -> str:
    """A cell of a table: "-" where the number is undefined, an exponent where it is huge, or too small to be seen.

    >>> format_number(0.12345), format_number(7), format_number(1e300), format_number(0.0002), format_number(None)
    ('0.123', '7', '1.0e+300', '2.0e-04', '-')
    """
    if x is None or math.isnan(x):
        return "-"
    if isinstance(x, int):
        return str(x)
    return f"{x:.{digits}f}" if x == 0 or 0.5 * 10**-digits <= abs(x) < 1e6 else f"{x:.1e}"


def format_table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of cells, the first row is the head. The columns `left` are aligned left, the others right.

    >>> print(format_table([["", "MAE"], ["base", "12.5"]]))
          MAE
    base 12.5
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    align = [str.ljust if k in left else str.rjust for k in range(len(columns))]
    lines = [[pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)] for row in rows]
    return "\n".join(" ".join(line).rstrip() for line in lines)


# --- the table of results -----------------------------------------------------------------------------------

COLUMNS = {"valid": "valid", "n": "n", "mae": "MAE", "accuracy": "accuracy", "srcc": "SRCC", "plcc": "PLCC",
           "regression": "R_reg", "tau": "tau", "tau_values": "tau_values", "tau_n": "n (tau)"}  # fmt: skip
WITH_INTERVAL = ("valid", "mae", "regression", "tau")


def results_table(results: Results) -> str:
    """A block for each number of images, in it a row for each policy; "-": undefined.

    The blind rows stand last in each block. n: prompts; n (tau): those that tau and tau_values rest on. +-95%: half the
    width of the interval (see `intervals`) of the number on its left.
    """
    head: list[str] = []
    for key, title in COLUMNS.items():
        head += [title, "+-95%"] if key in WITH_INTERVAL else [title]
    is_blind = lambda name: any("constant" in row for row in results[name].values())
    lines: list[list[str]] = []
    for n in sorted({n for rows in results.values() for n in rows}):
        lines += [[""] * (1 + len(head))] if lines else []
        lines.append([f"{n} image{'s' * (n > 1)}", *head])
        for name in sorted(results, key=is_blind):
            if n in results[name]:
                row = results[name][n]
                lines.append([_label(name, row), *_cells(row, n)])
    return format_table(lines)


def _label(name: str, row: dict) -> str:
    """With the constant of a blind row. Several tasks have one each, so that row may well correlate."""
    if not name.startswith("best constant"):
        return name
    constant = row.get("constant", math.nan)
    return f"{name}, one per task" if math.isnan(constant) else f"{name}: {constant:g}"


def _cells(row: dict, n: int) -> list[str]:
    """The metrics of a row, each of WITH_INTERVAL with half the width of its interval."""
    values = n * (row["n"] or 0) * (row["valid"] or 0)
    cells = []
    for key in COLUMNS:
        shown = "{:.1%}".format if key == "valid" else format_number
        number = row.get(key, math.nan)
        known = number is not None and not math.isnan(number) and (key not in ("srcc", "plcc") or values >= ENOUGH)
        cells.append(shown(number) if known else "-")
        if key in WITH_INTERVAL:
            low, high = row.get("interval", {}).get(key, (None, None))
            cells.append("" if low is None else shown((high - low) / 2))
    return cells


# --- how sure a number is, and what it hides -----------------------------------------------------------------


def beside(predictions: Sequence[dict]) -> dict[str, Any]:
    """What stands beside the metrics of some predictions: their intervals, and remarks on what they hide."""
    return {"interval": intervals(predictions), "remarks": remarks(predictions)}


def intervals(predictions: Sequence[dict]) -> dict[str, list[float]]:
    """{metric: [low, high]} for valid, mae, regression and tau: 95 % bootstrap intervals over prompts.

    A thousand times P prompts are drawn with replacement, the same ones for the same P. The interval says how far the number
    would move with other prompts, not with another training run. Undefined metrics, and fewer than ENOUGH prompts, have none.
    """
    P = len(predictions)
    if P < ENOUGH:
        return {}
    sums, counts = np.zeros((4, P)), np.ones((4, P))  # of each metric and prompt; the metric is sum(sums) / sum(counts)
    for k, p in enumerate(predictions):
        values = p["values"]
        errors = [] if values is None else [abs(v - label) for v, label in zip(values, p["labels"], strict=True)]
        sums[:, k] = values is not None, sum(errors), p["regression"], p["tau"] or 0.0
        counts[1, k], counts[3, k] = len(errors), p["tau"] is not None
    rng = np.random.default_rng(0)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # no valid answer; an error of 1e308
        drawn = (rng.integers(0, P, P) for _ in range(1000))
        found = np.array([sums[:, rows].sum(1) / counts[:, rows].sum(1) for rows in drawn])  # (1000, 4)
    known = {name: column[np.isfinite(column)] for name, column in zip(WITH_INTERVAL, found.T, strict=True)}
    return {name: np.percentile(column, (2.5, 97.5)).tolist() for name, column in known.items() if len(column)}


NEARLY_ALL_VALUES, NEARLY_ALL_ORDERS, FEW_VALID = 0.9, 0.95, 0.5  # shares that are worth a remark


def remarks(predictions: Sequence[dict]) -> list[str]:
    """Sentences on what the metrics hide: few valid answers, one value nearly always, lists nearly always in prompt order."""
    said = []
    for n in sorted({len(p["labels"]) for p in predictions}):
        asked = [p for p in predictions if len(p["labels"]) == n]
        valid = [p for p in asked if p["values"] is not None]
        at = f"at {n} image{'s' * (n > 1)}"
        if len(valid) < FEW_VALID * len(asked):
            said.append(f"{at} {len(valid)} of {len(asked)} answers are valid, and values and order rest on these")
        values = [value for p in valid for value in p["values"]]
        labels = [label for p in valid for label in p["labels"]]
        value, times = Counter(values).most_common(1)[0] if values else (math.nan, 0)
        if len(values) >= ENOUGH and times >= NEARLY_ALL_VALUES * len(values):
            share, right = times / len(values), labels.count(value) / len(labels)
            said.append(
                f"{at} the policy says {value:g} of {share:.0%} of the images, whose label it is for {right:.0%}: compare it "
                "with the best constants"
            )
        unsorted = sum(p["order"] == sorted(p["order"]) for p in valid)
        if n > 1 and len(valid) >= ENOUGH and unsorted >= NEARLY_ALL_ORDERS * len(valid):
            said.append(
                f"{at} {unsorted / len(valid):.0%} of the lists are in the order of the prompt: their tau is chance"
            )
    return said


# --- what a policy that sees no image would get ---------------------------------------------------------------

GRID, GROUPS = 2000, 500  # candidates and labels at most: a million rewards take half a second


def best_constant(labels: Sequence[float], delta: float, decimals: int) -> tuple[float, float]:
    """The constant answer that earns most by R_reg, and the one that errs least by MAE (the median).

    Both have the task's decimals. Of equally good ones by R_reg it is the lowest. More than GROUPS different labels are sorted
    into so many groups of one size, and the middle of each stands for it.

    >>> best_constant([1, 1, 1, 9, 9, 10, 30], delta=4, decimals=0)  # R_reg prefers the mode, the median is 9
    (1.0, 9.0)
    """
    counts = Counter(map(float, labels))
    if len(counts) > GROUPS:
        counts = Counter()
        for group in np.array_split(np.sort(np.asarray(labels, dtype=np.float64)), GROUPS):
            counts[float(group[len(group) // 2])] += len(group)
    candidates = {round(float(x), decimals) for x in [*np.linspace(min(labels), max(labels), GRID), *counts]}
    earned = lambda value: sum(times * reward.value_reward(value, label, delta) for label, times in counts.items())
    return max(sorted(candidates), key=earned), round(float(statistics.median(labels)), decimals)


def blind_rows(
    samples: dict[int, list[Sample]],
    train_items: Sequence[Item],
    grade: Callable[[list[Sample], list[str]], dict[str, float]],
) -> dict[str, dict[int, dict[str, float]]]:
    """Further rows of `results_table`: the best constants of the training labels, and the order of the prompt.

    samples: the test prompts for each number of images. Where all are of one task, its constant is in the row as
    "constant". A task without training images of its own gets the constants of all training labels.
    A constant lists nothing and an order says no values: the metrics that judge these are nan.
    grade: samples and an answer to each -> metrics (eval.grade)
    """
    tasks = {sample.task for few in samples.values() for sample in few}
    labels: dict[str, list[float]] = defaultdict(list)
    for item in train_items:
        labels[item.task.name].append(item.label)
    everything = [item.label for item in train_items]

    def metrics(few: list[Sample], says: dict[str, float]) -> dict[str, float]:
        """Of answers that say one value of every image of a task, in the order of the prompt."""
        value = lambda task: format_value(says[task.name], task.decimals)
        return grade(few, [format_answer((i, value(s.task)) for i in range(1, len(s.items) + 1)) for s in few])

    rows: dict[str, dict[int, dict[str, float]]] = {}
    if everything:
        found = {t.name: best_constant(labels.get(t.name, everything), t.delta, t.decimals) for t in tasks}
        for k, kind in enumerate(("R_reg", "MAE")):
            says = {name: constants[k] for name, constants in found.items()}
            more = {"tau": math.nan, "constant": next(iter(says.values())) if len(says) == 1 else math.nan}
            rows[f"best constant by {kind}"] = {n: metrics(few, says) | more for n, few in samples.items()}
    rows["prompt order"] = {}
    for n, few in samples.items():
        if n > 1:
            row = metrics(few, {task.name: 0.0 for task in tasks})
            known = {key: row[key] for key in ("n", "valid", "tau", "tau_n")}
            rows["prompt order"][n] = dict.fromkeys([*row, "constant"], math.nan) | known
    return rows
