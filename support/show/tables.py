"""Numbers as people and files see them: a mean over what is known, JSON without NaN, text tables with aligned columns."""

import math
from collections.abc import Iterable, Sequence
from typing import Any


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


def format_number(x: float | None, digits: int = 3) -> str:
    """A cell of a table: "-" where the number is undefined, an exponent where it is huge.

    >>> format_number(0.12345), format_number(7), format_number(1e300), format_number(None)
    ('0.123', '7', '1.0e+300', '-')
    """
    if x is None or math.isnan(x):
        return "-"
    if isinstance(x, int):
        return str(x)
    return f"{x:.{digits}f}" if abs(x) < 1e6 else f"{x:.1e}"


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
