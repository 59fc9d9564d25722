"""What a data set's files say: one reader for each kind of data set, and the task that goes with it.

A reader yields rows, unchecked; `datasets.read_dataset` checks them all alike. Its arguments are the root that the user
named, a folder or (csv, jsonl, coco) a file, and the folder where the images are.

To add a data set, write a reader and add it with its task to READERS.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import DataError, Task, format_value
from support.datasets.drawings import DRAWN
from support.datasets.image_files import ENDINGS


class Row(NamedTuple):
    """One labelled image as the files describe it.

    where  the file (and line) to look at when something is wrong
    name   unique in the data set
    label  a number, or text that should be one
    key    what the image is called in list files and what decides its split; stays when images are added
    group  items of different groups never share a prompt: COCO's categories
    split  train | val | test where the files say so
    skip   why the data set's own rules leave this row out (counted, never an error)
    bad    why this row cannot be used (an error, or counted if the user says so)
    """

    where: str
    name: str = ""
    path: Path = Path()
    label: object = None
    key: str = ""
    group: str = ""
    split: str | None = None
    skip: str = ""
    bad: str = ""

    def known_as(self) -> tuple[str, ...]:
        """What a list file may call it."""
        return self.key, self.path.name, self.path.stem


SPLITS = ("train", "val", "test")
MAX_LABEL = 1e12  # what a policy can write digit by digit, and what can be squared
MIN_DELTA = 1e-9  # an error is divided by it and squared


def hash_split(name: str) -> str:
    """train (70 %), val (10 %) or test (20 %) from a file's name alone, so new files never move old ones."""
    # A checksum such as CRC is not enough: on names that count up, it shares out unevenly.
    place = int(hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest(), 16) % 10
    return "train" if place < 7 else "val" if place == 7 else "test"


def read_text(file: Path) -> str:
    """A text file's content. DataError for what is no regular file (a pipe would never end) or not UTF-8."""
    if not os.path.isfile(file):
        raise DataError(f"{file} is no regular file: save its text as one")
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets begin with a byte order mark
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text: save it as UTF-8") from None


def _image_files(root: Path) -> list[Path]:
    """All image files below a folder in the order of their names, less hidden ones (macOS leaves ._name.jpg behind)."""
    files: list[Path] = []
    # Part folders may be links, which rglob passes over. A folder that cannot be listed must not go missing silently.
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        here = Path(folder)
        inside = [os.path.realpath(f) for f in (here, *here.parents) if f.is_relative_to(root)]
        if inside[0] in inside[1:]:  # a link to a folder that it lies in: round and round
            folders.clear()
        else:
            files += [here / name for name in names if name.lower().endswith(ENDINGS)]
    return [f for f in sorted(files) if not any(p.startswith((".", "__MACOSX")) for p in f.relative_to(root).parts)]


def _raise(error: OSError) -> None:
    raise error


def _locate(folders: list[Path], name: str) -> Path:
    return next((f / name for f in folders if os.path.isfile(f / name)), folders[0] / name)


def read_utkface(root: Path, folder: Path) -> Iterator[Row]:
    """Age. UTKFace (Zhang, Song, Qi 2017): [age]_[gender]_[race]_[date].jpg or .jpg.chip.jpg, flat or in part folders.

    The real set holds a few names that lack a field; they are left out and counted.
    """
    for path in _image_files(root):
        fields = re.match(r"(\d{1,3})_[01]_[0-4]_\d+(?!\d)", path.name)
        if fields is None:
            yield Row(str(path), skip="the name is not age_gender_race_date.jpg")
        elif int(fields[1]) > 120:
            yield Row(str(path), skip="nobody is older than 120")
        else:  # the aligned face (.chip.jpg) goes where its whole photograph goes
            yield Row(str(path), fields[0], path, int(fields[1]), fields[0])


def read_coco(root: Path, folder: Path) -> Iterator[Row]:
    """Counting. COCO (arXiv 1405.0312) or COCO-ReM (arXiv 2403.18819): annotations/instances_*.json beside the images.

    One task per category: the number of its instances in an image that has at least one, however they are outlined
    (polygons or RLE). A crowd annotation (iscrowd) stands for an unknown number, so images with one are left out for
    that category. Images lie in a folder named like the annotations (val2017), or in any other of the root's folders.
    With annotations of train and val, val becomes our test split (COCO's own test set has no public labels) and
    train is divided into train and val. The root may be one annotation file.
    """
    files = _coco_files(root)
    both = all(any(part in file.stem for file in files) for part in ("train", "val"))
    others = sorted(f for f in [*folder.glob("*"), *folder.glob("images/*")] if f.is_dir() and f.name != "annotations")
    annotated: dict[str, Path] = {}  # image -> the file that has it
    for file in files:
        year = file.stem.removeprefix("instances_")  # val2017
        folders = [f for f in (folder / year, folder / "images" / year, folder, *others) if f.is_dir()]
        images, counted = _count_instances(file)
        if twice := next((name for name in images if annotated.setdefault(name, file) != file), None):
            raise DataError(f"{annotated[twice]} and {file} both annotate {twice}: point --data-root at one of the two")
        paths = {name: _locate(folders, name) for name in images}
        for name, category, count, crowd in counted:
            split = None
            if both:
                split = "test" if "val" in file.stem else "val" if hash_split(name) == "val" else "train"
            skip = "has a crowd of the category, so no known number" if crowd else ""
            where, item = f"{file}, {name}, {category}", f"{year}/{name}/{category}"
            yield Row(where, item, paths[name], count, name, category, split, skip)


def _coco_files(root: Path) -> list[Path]:
    """The annotation files: the root itself if it is one."""
    if root.is_file():
        return [root]
    files = sorted(root.glob("annotations/instances_*.json")) or sorted(root.glob("instances_*.json"))
    if not files:
        raise DataError(f"no annotations/instances_*.json under {root}: point --data-root at the COCO folder")
    return files


def _count_instances(file: Path) -> tuple[list[str], list[tuple[str, str, int, bool]]]:
    """All image names of a COCO file, and (image, category, number of instances, is there a crowd)."""
    try:
        content = json.loads(read_text(file))
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        images = {i["id"]: str(i["file_name"]) for i in content["images"]}
        annotations = [a for a in content["annotations"] if a["image_id"] in images]
        counts = Counter((a["image_id"], a["category_id"]) for a in annotations)
        crowds = {(a["image_id"], a["category_id"]) for a in annotations if a.get("iscrowd")}
        counted = [(images[i], names[c], n, (i, c) in crowds) for (i, c), n in sorted(counts.items())]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not a COCO instances file ({type(error).__name__}: {error})") from None
    return list(images.values()), counted


def read_ava(root: Path, folder: Path) -> Iterator[Row]:
    """Aesthetics. AVA (Murray, Marchesotti, Perronnin 2012): AVA.txt and images/ID.jpg (or ID.jpg); label = mean vote.

    15 columns: index, image id, number of votes for each score from 1 to 10, two tags, challenge.
    """
    file = root / "AVA.txt"
    if not os.path.lexists(file):
        raise DataError(f"{file} does not exist: point --data-root at the folder with AVA.txt and images/")
    folders = [f for f in (root / "images", root / "image", root) if f.is_dir()]
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        where, fields = f"{file} line {number}", line.split()
        if len(fields) != 15 or not all(f.isdecimal() and len(f) < 16 for f in fields):
            yield Row(where, bad="is not 15 whole numbers (index, image id, ten vote counts, two tags, challenge)")
            continue
        image, votes = fields[1], [int(f) for f in fields[2:12]]
        mean = sum(score * count for score, count in enumerate(votes, start=1)) / sum(votes) if any(votes) else None
        yield Row(where, image, _locate(folders, f"{image}.jpg"), mean, image)


def _table(root: Path, ending: str) -> Path:
    """The one file of that ending in a folder, or the file itself."""
    if root.is_file():
        return root
    files = sorted(root / name for name in os.listdir(root) if name.endswith(ending))  # glob hides a lack of permission
    if len(files) != 1 and (root / f"labels{ending}") not in files:
        raise DataError(f"{root} holds {len(files)} {ending} files: point --data-root at the one to read")
    return files[0] if len(files) == 1 else root / f"labels{ending}"


def _table_row(where: str, fields: dict, folder: Path) -> Row:
    path, group = fields.get("path"), fields.get("group")
    if not isinstance(path, str) or not path.strip():
        return Row(where, bad="has no path")
    full = folder / path.strip()
    key, group = Path(os.path.relpath(full, folder)).as_posix(), "" if group is None else str(group).strip()
    return Row(where, f"{key}/{group}" if group else key, full, fields.get("label"), key, group, fields.get("split"))


def read_csv(root: Path, folder: Path) -> Iterator[Row]:
    """Your own images: a file with the columns path (relative to the file), label, and if you like split and group.

    Comma-separated, UTF-8, with a header line. The root is the file or a folder with exactly one .csv (or labels.csv).
    """
    file = _table(root, ".csv")
    reader = csv.DictReader(io.StringIO(read_text(file)), skipinitialspace=True)
    try:
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise DataError(f"{file} must begin with a line path,label[,split][,group], not {reader.fieldnames}")
        for fields in reader:
            where = f"{file} line {reader.line_num}"
            more = "has more columns than the first line (put a path with a comma in quotes)"
            yield Row(where, bad=more) if None in fields else _table_row(where, fields, folder)
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num} is not CSV ({error})") from None


def read_jsonl(root: Path, folder: Path) -> Iterator[Row]:
    """Your own images: one JSON object a line, {"path": "a.jpg", "label": 3.5}, and if you like "split" and "group"."""
    file = _table(root, ".jsonl")
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        where = f"{file} line {number}"
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = None
            is_object = isinstance(fields, dict)
            yield _table_row(where, fields, folder) if is_object else Row(where, bad="is not a JSON object")


def read_folder(root: Path, folder: Path) -> Iterator[Row]:
    """Your own images: one folder per label, ROOT/3.5/a.jpg, or ROOT/train/3.5/a.jpg with all of train, val, test."""
    for path in _image_files(root):
        key = path.relative_to(root)
        split, *rest = key.parts if key.parts[0] in SPLITS else (None, *key.parts)
        if len(rest) < 2:
            yield Row(str(path), bad="lies in no folder whose name is the label")
        else:
            yield Row(str(path), key.as_posix(), path, rest[0], key.as_posix(), split=split)


# --------------------------------------------------------------------------------------------------------------------
# The task of each data set
#
# delta is about twice the error of a good model, so that a typical answer stands on the slope of R_reg, not on its top
# or at its foot: UTKFace MAE 4-5 years; AVA's labels have a standard deviation of 0.7, a good model errs by 0.4.

READERS: dict[str, tuple[Callable[[Path, Path], Iterator[Row]], Task]] = {
    "utkface": (
        read_utkface,
        Task("age", "How old is the person in the image, in years?", "from the youngest to the oldest", delta=10),
    ),
    "coco": (
        read_coco,
        Task("count {group}", "How many {group} instances are in the image?",
             "from the fewest {group} instances to the most", delta=4),
    ),
    "ava": (
        read_ava,
        Task("aesthetics", "How beautiful is the photograph, from 1 (worst) to 10 (best), with two decimals?",
             "from the least to the most beautiful", delta=1, decimals=2),
    ),
}  # fmt: skip
# One's own labels: delta 0 and decimals -1 are found from them, see make_task.
RATING = Task("rating", "Rate the image from {low} to {high}.", "from the lowest to the highest", delta=0, decimals=-1)
READERS |= {"csv": (read_csv, RATING), "jsonl": (read_jsonl, RATING), "folder": (read_folder, RATING)}
DATASETS = (*DRAWN, *READERS)


def make_task(base: Task, overrides: dict, group: str = "", labels: list[float] | None = None) -> Task:
    """The task of one group: `base`, with the user's question, order, delta, decimals where given (not None).

    {group}, {low} and {high} in a question or order stand for the group's name and its lowest and highest label.
    Where the base leaves them open, delta and decimals are found from the labels of all splits (`fit_to_labels`).
    """
    task = dataclasses.replace(base, **_checked(overrides))
    words = {"{group}": group}
    if labels:
        task = fit_to_labels(task, labels, group)
        words |= {"{low}": format_value(min(labels), task.decimals), "{high}": format_value(max(labels), task.decimals)}
    name = task.name if "{group}" in task.name or not group else f"{task.name} {{group}}"  # groups stay apart

    def fill(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    return dataclasses.replace(task, name=fill(name), question=fill(task.question), order=fill(task.order))


def _checked(overrides: dict) -> dict:
    """The settings of a task that were given. DataError for those that make no sense."""
    given = {field: value for field, value in overrides.items() if value is not None}
    if unknown := set(given) - {"question", "order", "delta", "decimals"}:
        raise DataError(f"a task has no setting {sorted(unknown)}: question, order, delta, decimals")
    if not MIN_DELTA <= given.get("delta", 1) <= MAX_LABEL:
        raise DataError(f"--delta {given['delta']} must be positive and finite, from {MIN_DELTA:g} to {MAX_LABEL:g}")
    if given.get("decimals", 0) not in range(10):
        raise DataError(f"--decimals {given['decimals']} must be a whole number from 0 to 9")
    if not all(str(given.get(field, "?")).strip() for field in ("question", "order")):
        raise DataError("--question and --order must not be empty")
    return given


def fit_to_labels(task: Task, labels: list[float], group: str = "") -> Task:
    """delta and decimals from the labels, where the task leaves them open (delta 0, decimals -1).

    delta is a quarter of the labels' range, so that an answer in the middle earns something for the middle half of it.
    decimals are what it takes to write the labels, at most 3.
    """
    low, high, decimals, delta = min(labels), max(labels), task.decimals, task.delta
    if decimals < 0:
        decimals = next((d for d in range(3) if all(round(label, d) == label for label in labels)), 3)
    if delta == 0:
        delta = float(f"{(high - low) / 4:.3g}")
        if delta < MIN_DELTA:
            of = f"of {group} " if group else ""
            alike = f"are {low:g}" if low == high else f"are nearly alike, {low:g} to {high:g}"
            raise DataError(f"all labels {of}{alike}, so delta is unknown: set --delta")
    return dataclasses.replace(task, decimals=decimals, delta=delta)
