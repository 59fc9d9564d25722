"""Evaluations as people read them: one table for each number of images, and remarks on what a number hides."""

import math
from collections import Counter
from collections.abc import Sequence

from support.show.tables import format_number, format_table

Results = dict[str, dict[int, dict]]  # policy -> number of images -> metrics of eval.summarize, and the `remarks`

COLUMNS = {"valid": "valid", "n": "n", "mae": "MAE", "accuracy": "accuracy", "srcc": "SRCC", "plcc": "PLCC",
           "regression": "R_reg", "tau": "tau", "tau_values": "tau_values", "tau_n": "n (tau)"}  # fmt: skip
ENOUGH = 10  # of fewer values a correlation is luck, and that they are alike may be chance
OF_ORDER = ("tau", "tau_values", "tau_n")  # one image has no order


def results_table(results: Results) -> str:
    """A block for each number of images, in it a row for each policy; "-": undefined.

    The rows of eval.blind_rows stand last in each block. n: prompts; n (tau): those that tau and tau_values rest on.
    """
    lines: list[list[str]] = []
    blind = lambda name: any("constant" in row for row in results[name].values())
    for n in sorted({n for rows in results.values() for n in rows}):
        columns = [key for key in COLUMNS if n > 1 or key not in OF_ORDER]
        empty = [""] * (len(COLUMNS) - len(columns))
        lines += [[""] * (1 + len(COLUMNS))] if lines else []
        lines.append([f"{n} image{'s' * (n > 1)}", *(COLUMNS[key] for key in columns), *empty])
        for name in sorted(results, key=blind):
            if (row := results[name].get(n)) is not None:
                known = {key: row.get(key) for key in columns}
                if n * (row["n"] or 0) * (row["valid"] or 0) < ENOUGH:
                    known |= {"srcc": None, "plcc": None}
                lines.append([_label(name, row), *(_cell(key, value) for key, value in known.items()), *empty])
    return format_table(lines)


def _label(name: str, row: dict) -> str:
    """With the constant of a blind row, if it says one. Several tasks have one each, so that row may well correlate."""
    if not name.startswith("best constant"):
        return name
    constant = row.get("constant", math.nan)
    return f"{name}, one per task" if math.isnan(constant) else f"{name}: {constant:g}"


def _cell(key: str, value: float | None) -> str:
    if key == "valid" and value is not None and not math.isnan(value):
        return f"{value:.1%}"
    return format_number(value)


NEARLY_ALL_VALUES = 0.9
NEARLY_ALL_ORDERS = 0.95
FEW_VALID = 0.5


def remarks(predictions: Sequence[dict]) -> list[str]:
    """Sentences on what the metrics hide: few valid answers, one value nearly always, lists nearly always in prompt order.

    Each names the numbers of images in a prompt for which it holds.
    """
    few, constant, unsorted = [], [], []
    for n in sorted({len(p["labels"]) for p in predictions}):
        asked = [p for p in predictions if len(p["labels"]) == n]
        valid = [p for p in asked if p["values"] is not None]
        at = f"at {n} image{'s' * (n > 1)}"
        if len(valid) < FEW_VALID * len(asked):
            few.append(f"{len(valid)} of {len(asked)} {at}")
        values = [value for p in valid for value in p["values"]]
        value, times = Counter(values).most_common(1)[0] if values else (math.nan, 0)
        if len(values) >= ENOUGH and times >= NEARLY_ALL_VALUES * len(values):
            right = [label for p in valid for label in p["labels"]].count(value) / len(values)
            constant.append(f"{value:g} for {times / len(values):.0%} of them {at}, whose label it is for {right:.0%}")
        listed = sum(p["order"] == sorted(p["order"]) for p in valid)
        if n > 1 and len(valid) >= ENOUGH and listed >= NEARLY_ALL_ORDERS * len(valid):
            unsorted.append(f"{listed / len(valid):.0%} of its lists {at}")
    said = {
        "few answers are valid, and what is said of values and order rests on these: ": few,
        "the policy says one value of nearly all images, so compare it with the best constants: ": constant,
        "the policy lists the images in the order of the prompt, so its tau is chance: ": unsorted,
    }
    return [text + "; ".join(places) for text, places in said.items() if places]
