"""Drawings of dots whose labels are noisy or skewed, as files: what real data has and `--data dots` has not.

    dots-noise-STD    training labels with Gaussian noise of that std, rounded and kept within 1 to 20 (with a std of 8 every fifth
                      is 1, and every fifth 20); validation and test have the true ones
    dots-skewed       few dots are frequent, in all three splits: each number is 3/4 as frequent as the one before

`make(folder)` writes what the folder's name says, PNGs and a labels.csv, for `--data csv --data-root FOLDER`.
"""

import csv
import random
import shutil
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

from data import Item
from support.datasets.drawings import DOTS, DRAWN_SIZE, drawn_item, load_drawn
from support.run.atomic_files import replace_folder

# What train.py is told beside --data csv and --delta: the same as of dots.
AS_DOTS = ["--question", DOTS.question, "--order", DOTS.order]
LOWEST, HIGHEST = 1, 20
RATIO = 0.75  # of the frequency of a number of dots to that of the number before it


def noisy_label(item: Item, std: float) -> int:
    """The label with noise that belongs to the item: the same whenever it is made."""
    noise = random.Random(f"noise {std} {item.name}").gauss(0, std)
    return min(max(round(item.label + noise), LOWEST), HIGHEST)


def skewed_items(split: str) -> list[Item]:
    """As many drawings as `dots` has in that split, label y with a probability in proportion to RATIO ** y."""
    stream = (drawn_item("dots", f"skewed/{split}/{i}") for i in count())
    keep = lambda item: random.Random(f"keep {item.name}").random() < RATIO ** (item.label - LOWEST)
    return list(islice(filter(keep, stream), DRAWN_SIZE[split]))


def rows_of(name: str, split: str) -> list[tuple[Item, int]]:
    """(drawing, label as written)"""
    if name == "dots-skewed":
        return [(item, int(item.label)) for item in skewed_items(split)]
    std = float(name.removeprefix("dots-noise-"))
    noisy = split == "train"
    return [(item, noisy_label(item, std) if noisy else int(item.label)) for item in load_drawn("dots", split)]


def make(folder: Path) -> None:
    """Write the data set that the folder's name says, unless it is there. Raises OSError."""
    if folder.exists():
        return
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    labels = [("path", "label", "split")]
    for split in DRAWN_SIZE:
        (beside / split).mkdir(parents=True)
        for i, (item, label) in enumerate(tqdm(rows_of(folder.name, split), desc=f"drawing {folder}", leave=False)):
            item.image().save(beside / split / f"{i:04d}.png")
            labels.append((f"{split}/{i:04d}.png", str(label), split))
    with open(beside / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(labels)
    replace_folder(beside, folder)
