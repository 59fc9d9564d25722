"""What training did, as curves: reward and its parts for each number of images, validation, entropy, KL, where time goes.

    python -m support.show.curves runs/rarl                         # writes runs/rarl/curves.png, as training does
    python -m support.show.curves runs/a runs/b --out both.png      # several runs in one picture

It reads metrics.jsonl, timing.jsonl and validation.jsonl. matplotlib draws.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import DataError
from support.show.results import mean

SHARE, FROM_0 = (-0.03, 1.03), (0, None)  # limits of the y axis
# kind, metric, title, limits. Sampled answers and validation are drawn for each number of images apart.
PANELS = [
    ("sampled", "reward", "sampled: reward", FROM_0),
    ("sampled", "regression", "sampled: R_reg", SHARE),
    ("sampled", "ranking", "sampled: R_rank = (1 + tau) / 2", SHARE),
    ("sampled", "format", "sampled: R_format", SHARE),
    ("sampled", "mae", "sampled: MAE", FROM_0),
    ("validation", "reward", "validation: share of the best reward", SHARE),
    ("validation", "mae", "validation: MAE", FROM_0),
    ("validation", "tau", "validation: tau", (-1.05, 1.05)),
    ("validation", "valid", "validation: valid answers", SHARE),
    ("timing", "seconds", "seconds per step", FROM_0),
    ("step", "entropy", "entropy (nats per token)", FROM_0),
    ("step", "kl", "KL to the stage's start", FROM_0),
    ("step", "zero_spread", "groups without spread", SHARE),
    ("step", "mutated", "mutated answers", SHARE),
    ("step", "grad_norm", "gradient norm", FROM_0),
]
PHASES = ("rollout", "reward", "update", "sync", "data", "other")  # of timing.jsonl
SMOOTH = 10  # steps that a point is the mean of

Curve = tuple[list[int], list[float]]  # x: steps, y


def read_run(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, one dict a step, with those of timing.jsonl ("timing") and validation.jsonl
    ("validation": number of images -> metrics) where there are any. Raises DataError."""
    lines = lambda file: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    try:
        steps = {(step["stage"], step["step"]): step for step in lines(folder / "metrics.jsonl") if int(step["images"])}
        for name, part in (("timing", None), ("validation", "images")):
            for line in lines(folder / f"{name}.jsonl") if (folder / f"{name}.jsonl").exists() else ():
                steps[line["stage"], line["step"]][name] = line[part] if part else line
        if not steps:
            raise ValueError("there is no step in it")
        return list(steps.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no metrics that can be read ({error})") from None


def smoothed(points: Sequence[tuple[int, float | None]]) -> Curve:
    """Means of up to SMOOTH points in a row, each at the place of its last.

    >>> smoothed([(0, 1.0), (1, None), (2, 3.0)])
    ([0, 2], [1.0, 2.0])
    """
    known = [(x, y) for x, y in points if y is not None]
    window = lambda i: [y for _, y in known[max(0, i + 1 - SMOOTH) : i + 1]]
    return [x for x, _ in known], [mean(window(i)) for i in range(len(known))]


def curve(steps: list[dict], kind: str, name: str, images: int | None = None) -> Curve:
    """A metric of one panel. Validations are few, so each stands for itself; the rest is smoothed."""
    if kind == "validation":
        rows = [(x, step["validation"].get(str(images), {})) for x, step in enumerate(steps) if "validation" in step]
        known = [(x, row[name]) for x, row in rows if row.get(name) is not None]
        return [x for x, _ in known], [y for _, y in known]
    if kind == "timing":
        return smoothed([(x, step["timing"].get(name, 0.0)) for x, step in enumerate(steps) if "timing" in step])
    return smoothed([(x, step.get(name)) for x, step in enumerate(steps) if images in (None, step["images"])])


def watch_curves(folder: Path) -> None:
    """Write curves.png, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib"):
        try:
            draw_curves({folder.name: read_run(folder)}, folder / "curves.png")
        except DataError as error:  # lines of an earlier stage that somebody changed: no reason to stop
            print(f"no curves: {error}", file=sys.stderr)


def draw_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """One picture of one or several runs.  runs: name -> what `read_run` returned"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Margins by hand: matplotlib's own layout takes as long again as the drawing, and a run draws often.
    figure, axes = plt.subplots(3, 5, figsize=(17, 8.6), sharex=True)
    figure.subplots_adjust(left=0.03, right=0.985, top=0.92, bottom=0.06, wspace=0.2, hspace=0.2)
    colours = {n: f"C{i}" for i, n in enumerate(sorted({s["images"] for steps in runs.values() for s in steps}))}
    styles: dict[str, Any] = dict(zip(runs, ("-", "--", ":", "-.") * len(runs), strict=False))
    for axis, (kind, name, title, limits) in zip(axes.flat, PANELS, strict=True):
        for run, steps in runs.items():
            for x in (x for x in range(1, len(steps)) if steps[x]["stage"] != steps[x - 1]["stage"]):
                axis.axvline(x, color="0.8", linewidth=0.8, zorder=0)
            if kind == "timing" and len(runs) == 1:  # what each phase of a step took, one on the other
                phases = [curve(steps, "timing", phase) for phase in PHASES]
                colors = [f"C{i + 4}" for i in range(len(PHASES))]
                axis.stackplot(phases[0][0], *(seconds for _, seconds in phases), labels=PHASES, colors=colors)
                axis.legend(fontsize=8, reverse=True, loc="upper left", frameon=False)
                continue
            for n, colour in colours.items() if kind in ("sampled", "validation") else [(None, "0.25")]:
                marker = "o" if kind == "validation" else ""
                axis.plot(
                    *curve(steps, kind, name, n), color=colour, linestyle=styles[run], marker=marker, markersize=3.5
                )
        axis.set_title(title, fontsize=10)
        axis.set_ylim(*limits)
        axis.set_xlim(0, max(1, *map(len, runs.values())))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    entries = [plt.Line2D([], [], color=c, label=f"{n} image{'s' * (n > 1)}") for n, c in colours.items()]
    if len(runs) > 1:
        entries += [plt.Line2D([], [], color="0.25", linestyle=style, label=run) for run, style in styles.items()]
    figure.legend(handles=entries, loc="upper center", ncols=max(1, len(entries)), frameon=False, fontsize=11)
    figure.supxlabel(f"step (means of {SMOOTH}, validation as measured; grey line: the next stage begins)", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what training did.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders such as runs/rarl")
    parser.add_argument("--out", type=Path, help="the picture (default: curves.png in the first folder)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "curves.png"
    try:
        if not out.suffix:  # matplotlib would write to out.png
            raise DataError(f"--out {out} must be the name of a picture, such as curves.png")
        draw_curves({str(folder): read_run(folder) for folder in args.runs}, out)
    except (OSError, ValueError, TypeError) as error:  # matplotlib knows no such kind of picture; a metric is no number
        sys.exit(f"curves: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
