"""What training did, as curves: reward and its parts for each number of images, errors, entropy, KL, groups without spread.

    python -m support.curves runs/rarl                         # writes runs/rarl/curves.png, as training does
    python -m support.curves runs/a runs/b --out both.png      # several runs in one picture

It reads metrics.jsonl and timing.jsonl. matplotlib draws.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from support.tables import mean

# Panels: title, and the metrics in it. Those of the first row are drawn for each number of images apart.
BY_IMAGES = {
    "reward": "reward (sum)",
    "regression": "R_reg",
    "ranking": "R_rank",
    "format": "R_format",
    "mae": "error of sampled values",
}
OVER_ALL = {"entropy": "entropy (nats per token)", "kl": "KL to the stage's start", "zero_spread": "groups without spread",
            "mutated": "mutated answers", "grad_norm": "gradient norm", "seconds": "seconds per step"}  # fmt: skip
SMOOTH = 10  # steps that a point is the mean of


class CurvesError(ValueError):
    """A run that cannot be drawn; the message names it."""


def read_run(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl with the seconds of timing.jsonl, one dict a step. Raises CurvesError."""
    try:
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        timing = folder / "timing.jsonl"
        seconds = (
            [json.loads(line) for line in timing.read_text(encoding="utf-8").splitlines()] if timing.exists() else []
        )
        known = {(line["stage"], line["step"]): line["seconds"] for line in seconds}
        return [step | {"seconds": known.get((step["stage"], step["step"]))} for step in steps]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CurvesError(f"{folder} holds no metrics that can be read ({error})") from None


def smoothed(points: Sequence[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Means of up to SMOOTH points in a row, each at the place of its last.

    >>> smoothed([(0, 1.0), (1, None), (2, 3.0)])
    ([0, 2], [1.0, 2.0])
    """
    known = [(x, y) for x, y in points if y is not None]
    window = lambda i: [y for _, y in known[max(0, i + 1 - SMOOTH) : i + 1]]
    return [x for x, _ in known], [mean(window(i)) for i in range(len(known))]


def draw_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """One picture of one or several runs.  runs: name -> what `read_run` returned"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(BY_IMAGES), len(OVER_ALL))
    figure, axes = plt.subplots(2, columns, figsize=(3.1 * columns, 5.6), layout="constrained", squeeze=False)
    for row, panels in enumerate((BY_IMAGES, OVER_ALL)):
        for axis, (name, title) in zip(axes[row], panels.items(), strict=False):
            for r, (run, steps) in enumerate(runs.items()):
                groups = sorted({step["images"] for step in steps}) if row == 0 else [None]
                for g, images in enumerate(groups):
                    points = [(x, s.get(name)) for x, s in enumerate(steps) if images in (None, s["images"])]
                    label = " ".join(filter(None, [run if len(runs) > 1 else "", f"{images} images" if images else ""]))
                    style = "-" if len(runs) == 1 or row == 1 else ("-", "--", ":", "-.")[r % 4]
                    axis.plot(*smoothed(points), style, color=f"C{g if row == 0 else r}", label=label, linewidth=1.4)
                for x in (i for i in range(1, len(steps)) if steps[i]["stage"] != steps[i - 1]["stage"]):
                    axis.axvline(x, color="0.7", linewidth=0.8)  # stage 2 begins
            axis.set_title(title, fontsize=10)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[row][len(panels) :]:
            axis.axis("off")
    axes[0][0].legend(fontsize=7)
    if len(runs) > 1:
        axes[1][0].legend(fontsize=7)
    figure.supxlabel(f"step (means of {SMOOTH}; grey line: stage 2 begins)", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what training did.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders such as runs/rarl")
    parser.add_argument("--out", type=Path, help="the picture (default: curves.png in the first folder)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "curves.png"
    try:
        draw_curves({str(folder): read_run(folder) for folder in args.runs}, out)
    except (CurvesError, OSError, ValueError) as error:  # ValueError: matplotlib knows no such kind of picture
        sys.exit(f"curves: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
