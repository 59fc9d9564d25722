"""Data sets: the rows that a reader yields are checked, divided into splits, and become items with a task."""

import dataclasses
import math
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data import DataError, Item
from support.drawings import DRAWN, load_drawn
from support.images import open_image, unreadable
from support.readers import DATASETS, READERS, SPLITS, Row, _text, hash_split, make_task

LISTS = {  # the second ones are AVA's own
    "train": ("train.txt", "aesthetics_image_lists/generic_ls_train.jpgl"),
    "val": ("val.txt",),
    "test": ("test.txt", "aesthetics_image_lists/generic_test.jpgl"),
}


def read_lists(folder: Path) -> dict[str, str]:
    """{name or id: split} of the list files in a data set's folder, one name a line; {} if there are none."""
    listed: dict[str, str] = {}
    for split, files in LISTS.items():
        for file in [folder / f for f in files if (folder / f).is_file()][:1]:
            for name in filter(None, map(str.strip, _text(file).splitlines())):
                if listed.setdefault(name, split) != split:
                    raise DataError(f"{name} is in the lists of {listed[name]} and {split}: take it out of {file}")
    return listed


def choose_split(row: Row, listed: dict[str, str]) -> str | None:
    """The split of a row: what a list file says, else what the data set says, else the hash of its key.

    With lists, an image in none of them belongs to train if there is no list of train, else to no split (None).
    """
    if not listed:
        return row.split or hash_split(row.key)
    unlisted = None if "train" in listed.values() else "train"
    return next((listed[name] for name in row.known_as() if name in listed), unlisted)


class LeftOut(NamedTuple):
    why: str
    where: str
    bad: bool  # an error unless bad rows are to be skipped; else left out by the data set's own rules


def _check(row: Row, folder: Path, names: dict[str, str], some_have_split: bool) -> str:
    """What is wrong with a row, or "". The particulars come after a colon, so that reasons can be counted."""
    if row.bad:
        return row.bad
    if row.label is None or not str(row.label).strip():
        return "has no label"
    try:
        number = math.nan if isinstance(row.label, bool) else float(row.label)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return f"the label is not a finite number: {str(row.label)[:50]!r}"
    if row.name in names:
        return f"is listed twice, and first at: {names[row.name]}"
    if some_have_split and row.split not in SPLITS:
        return f"the split is none of train, val, test: {row.split!r}"
    # Without following links: what a data set says must not lead out of its folder; what the user linked there may.
    if not Path(os.path.normpath(row.path)).is_relative_to(folder):
        return f"the path leads out of {folder}, move or link the images into it: {row.path}"
    return "" if os.path.isfile(row.path) else f"the image file does not exist: {row.path}"


def read_dataset(
    name: str, root: str | Path | None = None, task_overrides: dict | None = None, skip_bad: bool = False
) -> tuple[dict[str, list[Item]], list[LeftOut]]:
    """All splits of a data set, {"train": items, "val": items, "test": items}, and what was left out, and why.

    Image files must exist, but are not opened. For the arguments see `load_dataset`.
    """
    overrides = task_overrides or {}
    if name in DRAWN:
        task = make_task(DRAWN[name][0], overrides)
        drawn = {split: load_drawn(name, split) for split in SPLITS}
        return {s: [dataclasses.replace(i, task=task) for i in items] for s, items in drawn.items()}, []
    if name not in READERS:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(DATASETS[:-1])} or {DATASETS[-1]}")
    if root is None:
        raise DataError(f"--data {name} needs --data-root, the folder it lies in")
    root = Path(os.path.abspath(root))
    if not root.is_dir() and not (root.is_file() and name in ("coco", "csv", "jsonl")):
        raise DataError(f"--data-root {root} is not a folder")
    reader, base = READERS[name]
    folder = root if root.is_dir() else root.parent
    if name == "coco" and folder.name == "annotations":
        folder = folder.parent
    found = list(reader(root, folder))
    listed = read_lists(folder)
    some_have_split = any(row.split for row in found)
    rows: list[tuple[Row, str]] = []
    left_out: list[LeftOut] = []
    names: dict[str, str] = {}
    labels: dict[str, list[float]] = defaultdict(list)  # of each group, all splits
    for row in found:
        if row.skip:
            left_out.append(LeftOut(row.skip, row.where, False))
        elif wrong := _check(row, folder, names, some_have_split):
            if not skip_bad:
                raise DataError(f"{row.where}: {wrong} (correct it or take it out; --skip-bad leaves out all such)")
            left_out.append(LeftOut(wrong, row.where, True))
        elif split := choose_split(row, listed):
            rows.append((row, split))
            names[row.name] = row.where
            labels[row.group].append(float(row.label))  # type: ignore[arg-type]
        else:
            left_out.append(LeftOut("stands in no list file", row.where, False))
    if listed and not any(name in listed for row in found for name in row.known_as()):
        raise DataError(f"no image of {root} is in its train.txt, val.txt or test.txt: they hold one name or id a line")
    tasks = {group: make_task(base, overrides, group, values) for group, values in labels.items()}
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for row, split in rows:
        path = Path(os.path.normpath(row.path))
        image = partial(open_image, path)
        items[split].append(Item(row.name, float(row.label), tasks[row.group], image, path))  # type: ignore[arg-type]
    return items, left_out


def load_splits(
    name: str, root: str | Path | None, splits: tuple[str, ...], task_overrides: dict | None = None,
    skip_bad: bool = False, labels_of: tuple[str, ...] = (),
) -> list[list[Item]]:  # fmt: skip
    """The items of several splits, with the data set's files read once; see `data.load_dataset`.

    labels_of  further splits, whose labels alone are wanted: their images are not opened, and they may be empty
    """
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}: choose train, val or test")
    items, left_out = read_dataset(name, root, task_overrides, skip_bad)
    if skip_bad:
        openable, refused = _openable({split: items[split] for split in splits})
        items, left_out = items | openable, left_out + refused
    if left_out:
        print(f"{name}: left out {format_left_out(left_out, 0)}\n  (python data.py {name} names them)", file=sys.stderr)
    for split in splits:
        if not items[split]:
            raise DataError(f"the {split} split of {name} under {root} is empty ({len(left_out)} left out): add images")
    return [items[split] for split in (*splits, *labels_of)]


def _openable(items: dict[str, list[Item]]) -> tuple[dict[str, list[Item]], list[LeftOut]]:
    wrong = unreadable([item for split in items.values() for item in split])
    good = {split: [item for item in some if item.path not in wrong] for split, some in items.items()}
    return good, [LeftOut("image cannot be used", text, True) for text in wrong.values()]


def format_left_out(left_out: list[LeftOut], examples: int = 3) -> str:
    """'4' and a line for every reason with its number and the first few places."""
    lines = [str(len(left_out))]
    places: dict[str, list[str]] = defaultdict(list)
    for why, where, bad in left_out:
        reason, _, particulars = why.partition(": ")
        reason += " [needs --skip-bad]" if bad else ""
        places[reason].append(f"{where}: {particulars}" if particulars else where)
    for reason, found in places.items():
        more = [f"      and {len(found) - examples} more"] if len(found) > examples > 0 else []
        lines += [f"  {len(found)} x {reason}", *(f"      {place}" for place in found[:examples]), *more]
    return "\n".join(lines)
