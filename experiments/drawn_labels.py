"""Drawings of dots whose labels are noisy or skewed, as files: what real data has and `--data dots` has not.

    python -m experiments.drawn_labels runs/dots-noise-4      # training labels with Gaussian noise of std 4
    python -m experiments.drawn_labels runs/dots-skewed       # few dots are frequent: each number is 3/4 as frequent as the one before

The name says what is made: a folder of PNGs and a labels.csv, for `--data csv --data-root FOLDER`. Only training labels are noisy;
validation and test have the true ones. Noisy labels are rounded and kept within 1 to 20, so with a std of 8 every fifth is 1, and
every fifth 20. Skewed are all three splits, as in
real data. A folder that is there is left as it is.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import csv
import random
import re
import shutil
from pathlib import Path

from tqdm import tqdm

from data import Item
from experiments.commands import CommandError, check_writable, run_command
from support.datasets.drawings import DOTS, DRAWN_SIZE, drawn_item, load_drawn
from support.run.atomic_files import replace_folder

# What train.py is told beside --data csv: the same as of dots.
AS_DOTS = ["--question", DOTS.question, "--order", DOTS.order, "--delta", str(DOTS.delta)]
LOWEST, HIGHEST = 1, 20
RATIO = 0.75  # of the frequency of a number of dots to that of the number before it


NAME = re.compile(r"dots-skewed|dots-noise-(\d+(?:\.\d+)?)")


def is_a_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None


def noisy_label(item: Item, std: float) -> int:
    """The label with noise that belongs to the item: the same whenever it is made."""
    noise = random.Random(f"noise {std} {item.name}").gauss(0, std)
    return min(max(round(item.label + noise), LOWEST), HIGHEST)


def skewed_items(split: str) -> list[Item]:
    """As many drawings as `dots` has in that split, label y with a probability in proportion to RATIO ** y."""
    items: list[Item] = []
    number = 0
    while len(items) < DRAWN_SIZE[split]:
        item = drawn_item("dots", f"skewed/{split}/{number}")
        number += 1
        if random.Random(f"keep {item.name}").random() < RATIO ** (item.label - LOWEST):
            items.append(item)
    return items


def rows_of(name: str) -> list[tuple[Item, float, str]]:
    """(drawing, label as written, split) of a data set. Raises CommandError for a name that says nothing."""
    known = NAME.fullmatch(name)
    if not known:
        raise CommandError(f"{name!r} must be dots-skewed or dots-noise-STD, such as dots-noise-4")
    noise, rows = known[1], []
    for split in DRAWN_SIZE:
        items = load_drawn("dots", split) if noise else skewed_items(split)
        std = float(noise) if noise and split == "train" else 0.0
        rows += [(item, noisy_label(item, std) if std else item.label, split) for item in items]
    return rows


def make(folder: Path) -> None:
    """Write the data set that the folder's name says, unless it is there. Raises CommandError, OSError."""
    rows = rows_of(folder.name)
    if (folder / "labels.csv").is_file():
        return
    if folder.exists():
        raise CommandError(f"{folder} is there and holds no labels.csv: move it away, or name another place")
    check_writable(folder, "the folder")
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    with open(beside / "labels.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for i, (item, label, split) in enumerate(tqdm(rows, desc=f"drawing {folder}", leave=False)):
            path = Path(split) / f"{i:04d}.png"
            (beside / split).mkdir(exist_ok=True)
            item.image().save(beside / path)
            writer.writerow([path.as_posix(), int(label), split])
    replace_folder(beside, folder)


def command(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.drawn_labels", description="Draw dots with noisy or skewed labels.", allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="ends in dots-skewed or dots-noise-STD")
    args = parser.parse_args(argv)
    make(args.folder)
    print(f"{args.folder}/labels.csv")


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.drawn_labels", lambda: command(argv))


if __name__ == "__main__":
    main()
