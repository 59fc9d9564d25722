"""The question that a policy was trained on, saved with the run and beside its weights as task.json.

A policy that is asked in other words, or scored with another tolerance, looks worse than it is, and nothing would say
so. Training saves every task that it used, the data set's name, and what the user changed; evaluation and ranking apply
it where the same data set is asked for. Another data set (transfer) is asked its own question.

What a run derived from its data when it began (delta, decimals, question, splits) is part of it: a later stage or a resumed
run reads task.json and items.jsonl of its folder, and derives nothing anew (`as_begun`).
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data import DataError, Item, Task
from support.datasets.drawings import DRAWN
from support.datasets.readers import READERS
from support.datasets.rows import read_text
from support.datasets.splits import load_splits, say
from support.datasets.tasks import check, make_task
from support.run.atomic_files import write_text

FILE, ITEMS = "task.json", "items.jsonl"
ORDER = ("train", "test", "val")
FIELDS = ("question", "order", "delta", "decimals")  # of a task, and what a user may change
GIVEN = (*FIELDS, "columns")  # what a user may say about a data set


@dataclass(frozen=True)
class SavedTask:
    """What training asked.

    data        name of the data set
    tasks       every task that training used, by its name (in the file a list)
    overrides   {"question": ..., "order": ..., "delta": ..., "decimals": ...}, those that the user gave
    max_pixels  images were shrunk to this area; None: the model's own limit
    skip_bad    unreadable images and bad rows were left out
    """

    data: str
    tasks: dict[str, Task]
    overrides: dict[str, Any]
    max_pixels: int | None
    skip_bad: bool


def save_task(
    folder: Path, name: str, items: list[Item], overrides: dict, max_pixels: int | None, skip_bad: bool
) -> None:
    """Write task.json into a policy's folder: see SavedTask.  items: what was trained on"""
    tasks = {item.task.name: asdict(item.task) for item in items}
    given = {field: value for field, value in overrides.items() if value is not None}
    content = {"data": name, "tasks": [tasks[task] for task in sorted(tasks)], "overrides": given,
               "max_pixels": max_pixels, "skip_bad": skip_bad}  # fmt: skip
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")


def begin(
    folder: Path, name: str, splits: list[list[Item]], given: dict, max_pixels: int | None, skip_bad: bool
) -> None:
    """Write what a run begins with, or goes on with, into its folder: task.json, and items.jsonl: split, label and name.

    splits  the items of train, test and val
    given   question, order, delta, decimals and columns as given now; else they are those that the run began with
    """
    overrides = overrides_for(load_task(folder), name, given)
    save_task(folder, name, [item for items in splits for item in items], overrides, max_pixels, skip_bad)
    rows = [(split, item.label, item.name) for split, items in zip(ORDER, splits, strict=True) for item in items]
    if name not in DRAWN:  # drawings cannot change
        write_text(folder / ITEMS, "".join(json.dumps(row) + "\n" for row in rows))


def as_begun(folder: Path, name: str, splits: list[list[Item]], given: dict) -> list[list[Item]]:
    """The items that the run in `folder` began with, in its order, splits and tasks, whatever the data set says now.

    splits  the items of train, test and val as they are now. Those that were added are left out and counted
    given   question, order, delta, decimals as given now; they win
    Raises DataError for the first image that is gone or has another label.
    """
    saved = load_task(folder)
    if saved is None:
        say(f"{folder} has no task.json, so delta, question and splits are found anew")
    if saved is None or saved.data != name:
        return splits
    if name in DRAWN:
        return [apply(saved, name, items, given) for items in splits]
    try:
        lines = (folder / ITEMS).read_text(encoding="utf-8").splitlines()
        rows = [(ORDER[ORDER.index(split)], float(label), str(item)) for split, label, item in map(json.loads, lines)]
        if not rows:
            raise ValueError("it is empty")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / ITEMS} is damaged ({error}): restore it, or start another run") from None
    now = {item.name: item for items in splits for item in items}
    begun: dict[str, list[Item]] = {split: [] for split in ORDER}
    for split, label, item_name in rows:
        item = now.pop(item_name, None)
        if item is None or item.label != label:
            is_now = f"is {item.label:g}" if item else "is gone"
            raise DataError(
                f"{folder} began with {item_name} at {label:g}, which {is_now}: put it back, or start another run"
            )
        begun[split].append(item)
    for split, items in zip(ORDER, splits, strict=True):  # the run may have begun without validation
        begun[split] = begun[split] or [now.pop(item.name) for item in items if item.name in now]
    if now:
        say(f"{name}: {len(now)} images were added since {folder} began, such as {next(iter(now))}: left out")
    return [apply(saved, name, items, given) for items in begun.values()]


def load_task(folder: str | Path) -> SavedTask | None:
    """What lies in a policy's folder; None if it has no task.json, or is a hub id. Raises DataError if it is damaged."""
    file = Path(folder) / FILE
    if not file.exists():
        return None
    try:
        content = json.loads(read_text(file))
        tasks = [Task(**task) for task in content["tasks"]]
        saved = SavedTask(**content | {"tasks": {task.name: task for task in tasks}})
        check({field: value for field, value in saved.overrides.items() if field != "columns"})
        for task in tasks:
            check({field: getattr(task, field) for field in FIELDS})
        if not tasks:
            raise ValueError("there is no task in it")
        return saved
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}): restore it, or delete it and give --question, "
            "--order, --delta and --decimals as in training"
        ) from None


def overrides_for(saved: SavedTask | None, name: str, given: dict) -> dict:
    """What to change in the tasks of data set `name`: what is given now, else what was given for training on it."""
    given = {field: value for field, value in given.items() if value is not None}
    return saved.overrides | given if saved and saved.data == name else given


def apply(saved: SavedTask | None, name: str, items: list[Item], given: dict) -> list[Item]:
    """The items with the tasks that training asked, where `name` is the data set of training.

    items  loaded with `overrides_for`: a group that training never saw has its own task with training's changes
    given  question, order, delta, decimals as given now; they win
    """
    if saved is None or saved.data != name:
        return items
    kept = [field for field in FIELDS if given.get(field) is None]
    tasks = {}
    for task in {item.task for item in items}:
        trained = saved.tasks.get(task.name, task)
        tasks[task] = replace(task, **{field: getattr(trained, field) for field in kept})
    return [replace(item, task=tasks[item.task]) for item in items]


def load_to_evaluate(
    saved: SavedTask | None, name: str, root: str | None, split: str, given: dict, skip_bad: bool | None
) -> tuple[list[Item], list[Item]]:
    """The items of a split, asked as in training, and those of train, of which there may be none.

    The latter are for their labels: what a blind policy would say is found on them. Their images are not opened.

    skip_bad  None: as in training, where it was this data set
    """
    if skip_bad is None:
        skip_bad = saved is not None and saved.data == name and saved.skip_bad
    loaded = load_splits(name, root, (split,), overrides_for(saved, name, given), skip_bad, labels_of=("train",))
    items, train_items = (apply(saved, name, some, given) for some in loaded)
    return items, train_items


def task_to_rank_by(saved: SavedTask | None, name: str | None, root: str | None, given: dict) -> Task:
    """The one question to rank by: of the data set `name`, else that of training, else the one that is given whole.

    Raises DataError where there is none or more than one.
    """
    name = name or (saved.data if saved else None)
    if saved and saved.data == name:
        tasks = list(saved.tasks.values())
    elif name is None:
        tasks = []
    elif name in READERS and root is None:
        tasks = [READERS[name][1]]
        if "{" in tasks[0].question + tasks[0].order:
            raise DataError(f"the question of --data {name} depends on the images in it: give --data-root too")
    else:
        tasks = list({item.task for item in load_splits(name, root, ("train",))[0]})
    if len(tasks) != 1 and given.get("question") and given.get("order"):
        tasks = [Task("question", "", "", delta=1.0)]  # delta matters to rewards alone
    if not tasks:
        raise DataError("this policy has no task.json, so --rank needs either --data or both --question and --order")
    if len(tasks) > 1:
        some = min(task.question for task in tasks)
        raise DataError(f"{name} asks {len(tasks)} questions, such as {some!r}: say which with --question and --order")
    return make_task(tasks[0], {field: given.get(field) for field in FIELDS})


def describe(tasks: list[Task], saved: SavedTask | None, name: str | None) -> str:
    """What is asked, in a line or two for people; it says so where a policy is asked another data set's question."""
    different = sorted({(task.question, task.delta) for task in tasks})
    question, delta = different[0]
    many = f"{len(different)} questions, such as " if len(different) > 1 else ""
    text = f"asked: {many}{question} (delta {delta:g})"
    if saved and name is not None and name != saved.data:
        text += f"\nthis policy was trained on {saved.data}; the question of {name} is new to it"
    return text
