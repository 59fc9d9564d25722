"""Data sets: the rows that a reader yields are checked, divided into splits, and become items with a task."""

import dataclasses
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data import DataError, Item, Task
from support.datasets.drawings import DRAWN, load_drawn
from support.datasets.image_files import open_image, unreadable
from support.datasets.parquet import read_parquet
from support.datasets.readers import ANNOTATIONS, DATASETS, READERS
from support.datasets.rows import SPLITS, Row, hash_split, read_text
from support.datasets.tasks import MAX_LABEL, make_task, outliers

LISTS = {  # the third ones are AVA's own
    "train": ("train.txt", "train", "aesthetics_image_lists/generic_ls_train.jpgl"),
    "val": ("val.txt", "val"),
    "test": ("test.txt", "test", "aesthetics_image_lists/generic_test.jpgl"),
}


def read_lists(folder: Path) -> dict[str, str]:
    """{name or id: split} of the list files in a data set's folder, one name a line; {} if there are none.

    Where there are none, a *split*.json with lists of names, as published for AVA. Raises DataError.
    """
    listed: dict[str, str] = {}
    for split, name, file in list(_listed_in_text(folder)) or _listed_in_json(folder):
        if listed.setdefault(name, split) != split:
            raise DataError(f"{name} is in the lists of {listed[name]} and {split}: take it out of {file}")
    return listed


def _listed_in_text(folder: Path) -> Iterator[tuple[str, str, Path]]:
    for split, names in LISTS.items():
        there = (folder / name for name in names if os.path.lexists(folder / name))
        file = next((file for file in there if file.name != split or file.is_file()), None)  # train may be a folder
        if file:
            yield from ((split, name, file) for name in map(str.strip, read_text(file).splitlines()) if name)


def _listed_in_json(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """{"train": [names], "test": [names]} or {"train_id": [ids], ...}"""
    for file in sorted(folder.glob("*split*.json")):
        try:
            content = json.loads(read_text(file))
            yield from ((s, str(x), file) for s in SPLITS for x in content.get(f"{s}_id", content.get(s, [])))
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{file} is no list of splits, {{train: [names], test: [names]}} ({error})") from None


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


def read_dataset(
    name: str, root: str | Path | None = None, task_overrides: dict | None = None, skip_bad: bool = False
) -> tuple[dict[str, list[Item]], list[LeftOut]]:
    """All splits of a data set, {"train": items, "val": items, "test": items}, and what was left out, and why.

    Image files must exist, but are not opened. For the arguments see `load_dataset`.
    """
    overrides = dict(task_overrides or {})
    columns = overrides.pop("columns", None)
    if columns and name != "parquet":
        raise DataError(f"--columns goes with --data parquet, not with {name}")
    if name in DRAWN:
        task = make_task(DRAWN[name][0], overrides)
        return {s: [dataclasses.replace(item, task=task) for item in load_drawn(name, s)] for s in SPLITS}, []
    root, folder = _find_root(name, root)
    reader, task = READERS[name]
    try:
        rows = list(read_parquet(root, folder, columns) if columns else reader(root, folder))
    except OSError as error:  # no permission, a disk that fails
        raise DataError(f"{error.filename or root} cannot be read: {error.strerror or error}") from None
    listed = read_lists(folder)
    if listed and not any(name in listed for row in rows for name in row.known_as()):
        raise DataError(f"no image of {root} is in its train.txt, val.txt or test.txt: they hold one name or id a line")
    chosen, left_out = _check_and_split(rows, folder, listed, skip_bad)
    try:
        return _make_items(chosen, task, overrides), left_out
    except DataError as error:  # labels that make no task, perhaps because most rows were bad
        more = f" ({len(left_out)} left out, first {left_out[0].where}: {left_out[0].why})" if left_out else ""
        raise DataError(f"{error}{more}") from None


def _find_root(name: str, root: str | Path | None) -> tuple[Path, Path]:
    """The root as an absolute path, and the folder where the images are."""
    if name not in READERS:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(DATASETS)}")
    if root is None:
        raise DataError(f"--data {name} needs --data-root, the folder it lies in")
    root = Path(os.path.abspath(root))
    is_file = name in ("coco", "csv", "jsonl", "parquet") and os.path.isfile(root)
    if not is_file and not os.path.isdir(root):  # unlike Path.is_dir, False for any name that no folder can have
        raise DataError(f"--data-root {root} is not a folder")
    folder = root.parent if is_file else root
    return root, folder.parent if name == "coco" and folder.name in ANNOTATIONS else folder


def _check_and_split(
    rows: list[Row], folder: Path, listed: dict[str, str], skip_bad: bool
) -> tuple[list[tuple[Row, str]], list[LeftOut]]:
    """The rows that can be used with their splits, and the others. DataError at the first bad one, unless skip_bad."""
    some_have_split = any(row.split for row in rows)
    chosen: list[tuple[Row, str]] = []
    left_out: list[LeftOut] = []
    names: dict[str, str] = {}
    for row in rows:
        if row.skip:
            left_out.append(LeftOut(row.skip, row.where, False))
        elif wrong := _what_is_wrong(row, folder, names, some_have_split):
            if not skip_bad:
                raise DataError(f"{row.where}: {wrong} (correct it or take it out; --skip-bad leaves out all such)")
            left_out.append(LeftOut(wrong, row.where, True))
        elif split := choose_split(row, listed):
            names[row.name] = row.where
            chosen.append((row, split))
        else:
            left_out.append(LeftOut("stands in no list file", row.where, False))
    return chosen, left_out


def _what_is_wrong(row: Row, folder: Path, names: dict[str, str], some_have_split: bool) -> str:
    """What is wrong with a row, or "". The particulars come after a colon, so that reasons can be counted.

    names  of the rows before it, and where they stand
    """
    if row.bad:
        return row.bad
    if row.label is None or not str(row.label).strip():
        return "has no label"
    if not abs(_number(row.label)) <= MAX_LABEL:
        shown = repr(str(row.label)[:50])
        return f"the label is not a finite number of at most {MAX_LABEL:g} (of a range take the middle): {shown}"
    if row.name in names:
        return f"is listed twice, and first at: {names[row.name]}"
    if some_have_split and row.split not in SPLITS:
        return f"the split is none of train, val, test: {row.split!r}"
    # Without following links: what a data set says must not lead out of its folder; what the user linked there may.
    if not Path(os.path.normpath(row.path)).is_relative_to(folder):
        return f"the path leads out of {folder}, move or link the images into it: {row.path}"
    if row.image is None and not os.path.isfile(row.path):
        return f"the image file does not exist, or is no regular file: {row.path}"
    return ""


# Stricter than float(), which reads "1_5" as 15 and the digits of every script.
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


def _number(label: object) -> float:
    """A label as a number; nan if it is none."""
    text = str(label)  # from JSON it may be anything
    return float(text) if NUMBER.fullmatch(text) else math.nan


def _make_items(chosen: list[tuple[Row, str]], base: Task, overrides: dict) -> dict[str, list[Item]]:
    """Items by split. Each group of rows has its own task, made from the labels of all splits."""
    labels: dict[str, list[float]] = defaultdict(list)
    for row, _ in chosen:
        labels[row.group].append(_number(row.label))
    make_task(base, overrides)  # wrong settings are named even where no row is left
    tasks = {group: make_task(base, overrides, group, values) for group, values in labels.items()}
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for row, split in chosen:
        path = Path(os.path.normpath(row.path))
        image = row.image or partial(open_image, path)
        items[split].append(Item(row.name, _number(row.label), tasks[row.group], image, path))
    return items


def load_dataset(
    name: str, root: str | Path | None = None, split: str = "train", task_overrides: dict | None = None,
    skip_bad: bool = False,
) -> list[Item]:  # fmt: skip
    """The items of one split.

    name            dots | dials | utkface | coco | ava | csv | jsonl | folder | parquet
    root            the data set's folder, or the file for csv, jsonl, coco and parquet (not needed for the drawn ones)
    split           train | val | test, see `choose_split`
    task_overrides  {"question": ..., "order": ..., "delta": ..., "decimals": ...}; None or absent: the data set's own.
                    "columns": see parquet.py
    skip_bad        leave out and count what cannot be used, rather than raise. It opens every image of the split
                    beforehand, which takes minutes for a large data set
    Raises DataError when the name is unknown, the folder is not that data set, a row is unusable (the message names its
    file and line), an image file is missing, or the split is empty. Images are opened later, when they are needed.
    """
    return load_splits(name, root, (split,), task_overrides, skip_bad)[0]


def load_splits(
    name: str, root: str | Path | None, splits: tuple[str, ...], task_overrides: dict | None = None,
    skip_bad: bool = False, labels_of: tuple[str, ...] = (), may_be_empty: tuple[str, ...] = (),
) -> list[list[Item]]:  # fmt: skip
    """The items of several splits, with the data set's files read once; see `load_dataset`.

    labels_of     further splits, whose labels alone are wanted: their images are not opened, and they may be empty
    may_be_empty  those of `splits` that may
    """
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}: choose train, val or test")
    items, left_out = read_dataset(name, root, task_overrides, skip_bad)
    if skip_bad:
        openable, refused = keep_openable({split: items[split] for split in splits})
        items, left_out = items | openable, left_out + refused
    if left_out:
        say(f"{name}: left out {format_left_out(left_out, 0)}\n  (python data.py {name} names them)")
    if apart := format_outliers(items):
        say(f"{name}: {apart}")
    for split in splits:
        if not items[split] and split not in may_be_empty:
            raise DataError(f"the {split} split of {name} under {root} is empty ({len(left_out)} left out): add images")
    return [items[split] for split in (*splits, *labels_of)]


def say(text: str) -> None:
    """What is no result goes to stderr. Of several processes the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def keep_openable(items: dict[str, list[Item]]) -> tuple[dict[str, list[Item]], list[LeftOut]]:
    """The items whose images can be opened, and those whose cannot. Slow: opens all."""
    wrong = unreadable([item for split in items.values() for item in split])
    good = {split: [item for item in some if item.path not in wrong] for split, some in items.items()}
    return good, [LeftOut("image cannot be used", text, True) for text in wrong.values()]


def format_outliers(items: dict[str, list[Item]], examples: int = 5) -> str:
    """A sentence about labels that lie far from all others, or ""."""
    apart = outliers([item for some in items.values() for item in some])
    if not apart:
        return ""
    some = ", ".join([f"{item.name} {item.label:g}" for item in apart[:examples]] + ["..."] * (len(apart) > examples))
    lie = "1 label lies" if len(apart) == 1 else f"{len(apart)} labels lie"
    return f"{lie} far from all others: {some}. Take out what stands for unknown, or give --delta and --question"


def format_left_out(left_out: list[LeftOut], examples: int = 3) -> str:
    """'4' and a line for every reason with its number and the first few places."""
    lines = [str(len(left_out))]
    places: dict[str, list[str]] = defaultdict(list)
    for why, where, bad in left_out:
        reason, _, particulars = why.partition(": ")
        reason += " [needs --skip-bad]" if bad else ""
        places[reason].append(f"{where}: {particulars}" if particulars else where)
    for reason, found in places.items():
        lines += [f"  {len(found)} x {reason}", *(f"      {place}" for place in found[:examples])]
        lines += [f"      and {len(found) - examples} more"] if len(found) > examples > 0 else []
    return "\n".join(lines)
