"""Drawings of dots as files, few dots being frequent: what real data has and `--data dots` has not.

In all three splits each number of dots is 3/4 as frequent as the one before.
"""

import csv
import random
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

from data import Item
from support.datasets.drawings import DOTS, DRAWN_SIZE, drawn_item

# What train.py is told beside --data csv and --delta: the same as of dots.
AS_DOTS = ["--question", DOTS.question, "--order", DOTS.order]
LOWEST = 1
RATIO = 0.75  # of the frequency of a number of dots to that of the number before it


def skewed_items(split: str) -> list[Item]:
    """As many drawings as `dots` has in that split, label y with a probability in proportion to RATIO ** y."""
    stream = (drawn_item("dots", f"skewed/{split}/{i}") for i in count())
    keep = lambda item: random.Random(f"keep {item.name}").random() < RATIO ** (item.label - LOWEST)
    return list(islice(filter(keep, stream), DRAWN_SIZE[split]))


def write(folder: Path) -> None:
    """PNGs and a labels.csv, for `--data csv --data-root FOLDER`."""
    rows = [("path", "label", "split")]
    for split in DRAWN_SIZE:
        (folder / split).mkdir(parents=True)
        for i, item in enumerate(tqdm(skewed_items(split), desc=f"drawing {folder.stem}", leave=False)):
            item.image().save(folder / split / f"{i:04d}.png")
            rows.append((f"{split}/{i:04d}.png", f"{item.label:g}", split))
    with open(folder / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
