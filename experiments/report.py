"""An experiment's runs as a table, a CSV and a picture. Beside every result stands what a policy gets that was not trained, or
does not look."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.runs import STEPS, WITHIN, Outcome, Row, Run, read_run
from support.show.results import format_number, format_table, mean

# Metric of the test answers -> title of its panel. All but the first are for each number of images.
BARS = {
    "valid": "valid answers",
    "MAE": "MAE (lower is better)",
    "tau": "tau of the lists",
    "tau_values": "tau of the values",
}
NEAR = (*(f"within {x}" for x in WITHIN.values()), "CCC")  # metrics without a panel, of data sets that have them
# Metric of the training steps -> title of its panel
CURVES = {"entropy": "entropy (nats per token)", "grad norm": "gradient norm", "Var(A)": "Var(A)",
          "zero spread": "groups without spread", "mutated": "answers that RMO replaced"}  # fmt: skip
SHARES = ("zero_spread", "mutated")
LINES: dict[str, Any] = {"before training": ":", "blind": "--", "ceiling": "-"}  # of the eyes

Variants = dict[str, list[tuple[Run, Outcome]]]  # variant -> its run for each seed


def report(experiment: str, runs: dict[str, list[Run]]) -> str:
    """Write runs/ablate-EXPERIMENT.txt, .csv and .png. runs: variant -> for each seed, all with the same test prompts. -> the table"""
    variants = {variant: [(run, read_run(run)) for run in seeds] for variant, seeds in runs.items()}
    cells = [[name, *(f" {cell}" for cell in row)] for name, *row in table_rows(variants)]
    text = f"{experiment}: mean (lowest to highest) of {rests_on(variants)}\n\n{format_table(cells)}"
    stem = Path(f"runs/ablate-{experiment}")
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    write_csv(variants, stem.with_suffix(".csv"))
    draw(experiment, variants, stem.with_suffix(".png"))
    return text


def rests_on(variants: Variants) -> str:
    """How many answers stand behind each number of the test set, as "3 seeds x 100 test answers"."""
    runs = [run for seeds in variants.values() for run, _ in seeds]
    seeds = len({run.settings.seed for run in runs})
    answers = " or ".join(map(str, sorted({run.settings.eval_samples for run in runs})))
    return f"{seeds} seed{'s' * (seeds > 1)} x {answers} test answers"


# --------------------------------------------------------------------------------------------------------------------
# Numbers


def references(variants: Variants) -> dict[str, Row]:
    """For each of LINES its metrics. All runs share base and test prompts, so any of them will do."""
    _, first = next(iter(variants.values()))[0]
    found = zip(LINES, (first.base, first.blind, first.most), strict=True)
    return {name: row for name, row in found if row}  # only some policies have eyes that were examined


def columns(variants: Variants) -> list[str]:
    """valid, MAE@1, MAE@2, ..., tau@2, ..., entropy, ... of every run, and of what they are compared with."""
    kinds = [*BARS, *NEAR, "contradict", "steps to 90 %", *STEPS]
    rows = [*references(variants).values(), *(outcome.row for seeds in variants.values() for _, outcome in seeds)]
    names = {name for row in rows for name in row}
    return sorted(names, key=lambda name: (kinds.index(name.split("@")[0]), int(name.partition("@")[2] or 0)))


def cell(values: list[float]) -> str:
    """Mean and range over seeds; "of 2" if a metric is undefined in the others, as tau is without a valid answer."""
    known = [x for x in values if not math.isnan(x)]
    if not known:
        return "-"
    low, middle, high = (format_number(x) for x in (min(known), mean(known), max(known)))
    text = f"{middle} ({low} to {high})"
    return text if len(known) == len(values) else f"{text} of {len(known)}"


def table_rows(variants: Variants) -> list[list[str]]:
    names = columns(variants)
    rows = [["", *names]]
    for title, row in references(variants).items():
        rows.append([title, *(format_number(row.get(name)) for name in names)])
    for title, seeds in variants.items():
        rows.append([title, *(cell([outcome.row.get(name, math.nan) for _, outcome in seeds]) for name in names)])
    return rows


def write_csv(variants: Variants, path: Path) -> None:
    """A line for each variant and seed, after those without a seed. What is undefined stays empty."""
    known = lambda row: {name: x for name, x in row.items() if not math.isnan(x)}
    lines = [{"variant": title} | known(row) for title, row in references(variants).items()]
    for title, seeds in variants.items():
        lines += [{"variant": title, "seed": run.settings.seed} | known(outcome.row) for run, outcome in seeds]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["variant", "seed", *columns(variants)])
        writer.writeheader()
        writer.writerows(lines)


# --------------------------------------------------------------------------------------------------------------------
# Picture


def curve(seeds: list[tuple[Run, Outcome]], key: str) -> Iterator[tuple[list[float], list[float]]]:
    """For each stage the places and values of a line: a point is the mean over all seeds of one cycle of steps.

    In a cycle every number of images has its turn once, in an order of its own. Entropy and the like depend on that
    number, so means over anything but whole cycles would go up and down with it.
    """
    run, begin = seeds[0][0], 0
    for stage, count in run.stages.items():
        cycle = min(len(run.settings.images), count)
        x, y = [], []
        for first in range(0, count - cycle + 1, cycle):
            x.append(begin + first + (cycle + 1) / 2)  # the middle, the first step being 1
            y.append(mean(log.get(key) for _, o in seeds for log in o.steps[stage][first : first + cycle]))
        yield x, y
        begin += count


def draw(experiment: str, variants: Variants, path: Path) -> None:
    """Above, bars of the test metrics; below, curves over the training steps. A colour is a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    above: list[Any] = ["valid"] * 2 + ["MAE"] * 7 + ["tau"] * 5 + ["tau_values"] * 6
    if not any(name.startswith("tau") for name in columns(variants)):  # one image has no order
        above = ["valid"] * 10 + ["MAE"] * 10
    below: list[Any] = [title for title in CURVES for _ in range(len(above) // len(CURVES))]
    figure, axes = plt.subplot_mosaic([above, below], figsize=(15, 7.5), layout="constrained")
    colours = {variant: f"C{i}" for i, variant in enumerate(variants)}
    for kind in dict.fromkeys(above):
        draw_bars(axes[kind], kind, variants, colours)
        axes[kind].set_title(BARS[kind], fontsize=11)
    for name, title in CURVES.items():
        draw_curves(axes[name], STEPS[name], variants, colours)
        axes[name].set_title(title, fontsize=11)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=colour, label=variant) for variant, colour in colours.items()]
    lines = [Line2D([], [], color="black", linestyle=LINES[name], label=name) for name in references(variants)]
    lines += [Line2D([], [], color="black", marker="o", markersize=3, linestyle="", label="one seed")]
    lines += [Line2D([], [], color="grey", linewidth=0.8, label="stage 2 begins")]
    title = f"{experiment}. Above: after training, bar = mean of {rests_on(variants)}. Below: while it trains, mean of the seeds"
    figure.legend(handles=patches, loc="outside upper center", ncols=8, frameon=False, title=title, title_fontsize=12)
    figure.legend(handles=lines, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_bars(axis, kind: str, variants: Variants, colours: dict[str, str]) -> None:
    """A bar for each variant, side by side for each number of images; lines are what the bar is to be compared with."""
    names = [name for name in columns(variants) if name.split("@")[0] == kind]
    width = 0.8 / len(variants)
    for number, name in enumerate(names):
        left = lambda i, number=number: number - 0.4 + i * width
        for i, (variant, seeds) in enumerate(variants.items()):
            x, values = left(i + 0.5), [outcome.row.get(name, math.nan) for _, outcome in seeds]
            axis.bar(x, mean(values), width=0.9 * width, color=colours[variant], alpha=0.75)
            axis.plot([x] * len(values), values, "o", color="black", markersize=3)
        for title, row in references(variants).items():
            level = row.get(name, math.nan)
            axis.plot([left(0), left(len(variants))], [level, level], LINES[title], color="black", linewidth=1.2)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(names)), [name.partition("@")[2] for name in names])
    axis.set_xlabel("worst case" if kind == "valid" else "images in the prompt")


def draw_curves(axis, key: str, variants: Variants, colours: dict[str, str]) -> None:
    for variant, seeds in variants.items():
        run = seeds[0][0]
        for x, y in curve(seeds, key):
            axis.plot(x, y, color=colours[variant], linewidth=1.5)
        if len(run.stages) == 2:
            axis.axvline(run.stages[1] + 0.5, color="grey", linewidth=0.8)
    top = axis.dataLim.y1
    if key in SHARES:
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        top = max(top, 0.1)  # less is next to nothing, and should look so
    axis.set_ylim(0, 1.05 * top if top > 0 else 1)
    axis.set_xlabel("step")
