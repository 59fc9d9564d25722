"""What `python data.py NAME [ROOT]` prints and draws: a look at a data set before one trains on it.

1. Counts, splits, and what was left out and why; all of it in the file left_out.txt beside the sheet.
2. Files of equal bytes: with different labels (at most one can be right), or in two splits (the test set leaks). Labels
   that lie far from all others.
3. For each task, what a policy would earn that looks at no image. Where that is nearly what a good policy earns, training
   finds the constant and stays there.
4. The labels, the question as asked, and a sheet of samples with the names of their files.
"""

import argparse
import math
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

import reward
from data import DataError, Item, Sample, format_value, make_pools, make_samples, question_text, reference_answer
from support.datasets.image_files import identical_files
from support.datasets.readers import DATASETS
from support.datasets.saved_task import GIVEN
from support.datasets.splits import LeftOut, format_left_out, format_outliers, keep_openable, read_dataset
from support.run.atomic_files import write_text
from support.run.quiet_end import abandon_broken_stdout
from support.run.settings import number
from support.show.results import best_constant, format_number, format_table
from support.show.sheets import FAINT, GREEN, INK, Sheet

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # of the sheet
SHOWN = 5  # examples of what is wrong; tasks whose question is printed


def inspect(name: str, root: Path | None, out: Path, overrides: dict) -> None:
    """Print what a data set holds and what is wrong with it, and draw a sheet of its samples. Opens every image."""
    check_out(out)
    print(f"reading {name}", file=sys.stderr)
    splits, left_out = read_dataset(name, root, overrides, skip_bad=True)
    splits, refused = keep_openable(splits)
    left_out += refused
    everything = [item for items in splits.values() for item in items]
    print(f"{name}{f' under {root}' if root else ''}: {len(everything)} labels")
    print("\nsplits      " + ", ".join(f"{split} {len(items)}" for split, items in splits.items()))
    report_left_out(left_out, out.with_name("left_out.txt"))
    report_identical(identical_files(splits))
    print(f"outliers    {format_outliers(splits) or 0}")
    if not everything:
        raise DataError(f"{name} under {root} holds no usable image")
    report_tasks(splits)
    print(f"\nlabels\n{format_histogram([item.label for item in everything])}")
    shown = splits["train"] or everything
    most = max(len(pool) for pool in make_pools(shown, 1).values())
    draw_sheet([s for n in (1, 2, 4) if n <= most for s in make_samples(shown, n, 2)], out)
    print(f"\nwrote {out}, samples of the {'train split' if splits['train'] else 'data set'}")


def check_out(out: Path) -> None:
    """DataError for a place that the sheet cannot be written to: said before everything is read, not after."""
    if out.suffix.lower() not in ENDINGS or not out.parent.is_dir() or (out.exists() and not out.is_file()):
        raise DataError(
            f"--out {out} must be a picture's name, ending in {', '.join(ENDINGS)}, in a folder that exists"
        )


def report_left_out(left_out: list[LeftOut], file: Path) -> None:
    """The reasons with a few examples; all of it in a file."""
    print(f"left out    {format_left_out(left_out)}")
    if left_out or file.exists():  # what an earlier look left out may be mended
        text = format_left_out(left_out, len(left_out))
        write_text(file, text.encode("utf-8", "backslashreplace").decode() + "\n")
    if left_out:
        print(f"  all of them are in {file}")


def report_identical(groups: list[list[tuple[str, Item]]]) -> None:
    """How many files have equal bytes, but different labels for one task or places in different splits, with examples."""
    wrong = []
    for group in groups:
        splits, tasks = {split for split, _ in group}, {item.task for _, item in group}
        labels = {(item.task, item.label) for _, item in group}
        if len(splits) > 1 or len(labels) > len(tasks):
            wrong.append(group)
    files = len({item.path for group in wrong for _, item in group})
    advice = ": correct the labels, take those of test out of train" if wrong else ""
    print(f"identical   {files} files with different labels or in different splits{advice}")
    for group in wrong[:SHOWN]:
        print("      " + " = ".join(f"{split} {item.path} ({item.label:g})" for split, item in group))


# --- tasks ------------------------------------------------------------------------------------------------------------


def report_tasks(splits: dict[str, list[Item]]) -> None:
    """For each task its labels, what the best constant answers earn, and the question."""
    pools = make_pools([item for items in splits.values() for item in items], 1)
    train = make_pools(splits["train"], 1) if splits["train"] else {}
    largest_first = sorted(pools, key=lambda task: -len(pools[task]))
    rows = [["task", "labels", "from", "to", "delta", "best by R_reg", "R_reg", "MAE", "best by MAE", "R_reg", "MAE"]]
    for task in largest_first:
        labels = [item.label for item in train.get(task) or pools[task]]
        low, high = (format_value(f(item.label for item in pools[task]), task.decimals) for f in (min, max))
        cells = [task.name, str(len(pools[task])), low, high, f"{task.delta:g}"]
        for value in best_constant(labels, task.delta, task.decimals):
            regression, error = constant_earns(value, labels, task.delta)
            cells += [format_value(value, task.decimals), f"{regression:.2f}", format_number(error, 2)]
        rows.append(cells)
    print(f"\ntasks       {len(pools)}\n{format_table(rows)}")
    print(
        "  best by R_reg, best by MAE: the constant answers that suit the labels best"
        f"{' of the train split' if train else ''}, and what they earn.\n"
        f"  A policy that errs by about delta / 2 earns an R_reg of {good_policy():.2f}. Where a constant earns nearly as much,\n"
        "  take a smaller --delta. Training draws rare labels more often, which helps too."
    )
    print("\nasked")
    for task in largest_first[:SHOWN]:
        print(f"  {question_text(task, 1)}\n  {question_text(task, 2)}")
    if len(pools) > SHOWN:
        print(f"  and so on for {len(pools) - SHOWN} more tasks")


def constant_earns(value: float, labels: list[float], delta: float) -> tuple[float, float]:
    """R_reg and MAE of saying `value` of every image.

    >>> constant_earns(3, [3, 5, 9], delta=4)  # errors 0, 2, 6: (1 + 0.75 + 0) / 3, and 8 / 3
    (0.5833333333333334, 2.6666666666666665)
    """
    earned = sum(count * reward.value_reward(value, label, delta) for label, count in Counter(labels).items())
    return earned / len(labels), statistics.fmean(abs(label - value) for label in labels)


def good_policy() -> float:
    """R_reg of a policy whose errors are normal with standard deviation delta / 2: a mean over 1000 quantiles.

    >>> round(good_policy(), 2)
    0.77
    """
    errors = statistics.NormalDist(0, 0.5).quantiles(1000)  # in units of delta
    return statistics.fmean(reward.value_reward(error, 0, 1) for error in errors)


def format_histogram(labels: list[float], bins: int = 12, width: int = 50) -> str:
    """A line per bin of equal width (or per value, where there are few): its range, the number of labels, a bar."""
    rows = [(f"{value:g}", number) for value, number in sorted(Counter(labels).items())]
    if len(rows) > 2 * bins:
        numbers, edges = np.histogram(labels, bins=bins)
        rows = [(f"{a:.4g} to {b:.4g}", n) for a, b, n in zip(edges, edges[1:], numbers, strict=False)]
    most, room = max(n for _, n in rows), max(len(text) for text, _ in rows)
    return "\n".join(f"  {text:>{room}} {n:7d} {'#' * math.ceil(width * n / most)}" for text, n in rows)


# --- the sheet --------------------------------------------------------------------------------------------------------


def draw_sheet(samples: list[Sample], path: Path) -> None:
    """A picture of samples: the images and their names, the prompt's text, the reference answer."""
    sheet = Sheet("Samples: the images, what is asked, the right answer")
    for sample in samples:
        sheet.rule()
        sheet.y = sheet.thumbnails([(item, item.name, FAINT) for item in sample.items])
        prompt = question_text(sample.task, len(sample.items))
        for text, colour in ((prompt, INK), (reference_answer(sample), GREEN)):
            for line in textwrap.wrap(text, 160):
                sheet.line_of(line, colour=colour)
        sheet.y += 12
    sheet.save(path)


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data.py", description="Look at a data set: counts, labels, splits, what is wrong, and a sheet of samples as the policy "
        "sees them.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("name", choices=DATASETS, help="which data set")
    add("root", nargs="?", type=Path, help="its folder; the drawn ones need none")
    add("--out", type=Path, default=Path("data_sheet.png"), help="picture of the samples")
    add("--question", help="asked about each image; {group}, {low}, {high} are filled in (None: the data set's own)")
    add("--order", help="how to say lowest first, such as 'from the youngest to the oldest'")
    add("--delta", type=number(float), help="tolerance of R_reg in units of the label")
    add("--decimals", type=number(int), help="of a value in the reference answer")
    add("--columns", help="of parquet files: image=COLUMN,label=COLUMN (None: found by their names)")
    args = parser.parse_args(argv)
    overrides = {field: getattr(args, field) for field in GIVEN}
    try:
        inspect(args.name, args.root, args.out, overrides)
    except (DataError, OSError) as error:
        abandon_broken_stdout()
        raise SystemExit(f"data.py: {error}") from None
