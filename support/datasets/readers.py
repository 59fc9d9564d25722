"""What a data set's files say: one reader for each kind of data set, and the task that goes with it.

A reader yields rows, unchecked; `splits.read_dataset` checks them all alike. Its arguments are the root that the user
named, a folder or (csv, jsonl, coco, parquet) a file, and the folder where the images are.

To add a data set, write a reader and add it with its task to READERS.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data import DataError, Task
from support.datasets.drawings import DRAWN
from support.datasets.image_files import ENDINGS
from support.datasets.parquet import read_parquet
from support.datasets.rows import SPLITS, Row, read_text, split_of_part

TEXTS = (".txt", ".md", ".csv", ".json", ".jsonl", ".html", ".pdf")  # notes and lists among the images, of no account
MISSING = 0.1  # share of the photographs that AVA's own download may lack


def _image_files(root: Path) -> tuple[list[Path], list[Row]]:
    """All image files below a folder in the order of their names, and rows that count other files: what Pillow cannot read.

    Hidden files are passed over (macOS leaves ._name.jpg behind), and texts.
    """
    files: list[Path] = []
    # Part folders may be links, which rglob passes over. A folder that cannot be listed must not go missing silently.
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        here = Path(folder)
        if any(os.path.samefile(here, f) for f in here.parents if f.is_relative_to(root)):
            folders.clear()  # a link to a folder that it lies in: round and round
        else:
            files += [here / name for name in names]
    shown = [f for f in sorted(files) if not any(p.startswith((".", "__MACOSX")) for p in f.relative_to(root).parts)]
    images = [f for f in shown if f.suffix.lower() in ENDINGS]
    others = [f for f in shown if f.suffix.lower() not in (*ENDINGS, *TEXTS)]
    return images, [Row(str(f), skip=f"is no image that can be read here ({f.suffix or 'no ending'})") for f in others]


def _raise(error: OSError) -> None:
    raise error


def _locate(folders: list[Path], name: str) -> Path:
    return next((f / name for f in folders if os.path.isfile(f / name)), folders[0] / name)


def read_utkface(root: Path, folder: Path) -> Iterator[Row]:
    """Age. UTKFace (Zhang, Song, Qi 2017): [age]_[gender]_[race]_[date].jpg or .jpg.chip.jpg, flat or in part folders.

    A few names of the real set lack a field: left out and counted. So are copies, of which Kaggle's archive holds many.
    """
    files, others = _image_files(root)
    yield from others
    first: dict[str, Path] = {}
    for path in files:
        fields = re.match(r"([0-9]{1,3})_[01]_[0-4]_[0-9]+(?![0-9])", path.name)
        if fields is None:
            yield Row(str(path), skip="the name is not age_gender_race_date.jpg")
        elif int(fields[1]) > 120:
            yield Row(str(path), skip="nobody is older than 120")
        elif first.setdefault(fields[0], path) != path:
            yield Row(str(path), skip=f"is a copy, by its name, of: {first[fields[0]]}")
        else:  # the aligned face (.chip.jpg) goes where its whole photograph goes
            yield Row(str(path), fields[0], path, int(fields[1]), fields[0])


def read_coco(root: Path, folder: Path) -> Iterator[Row]:
    """Counting. COCO (arXiv 1405.0312) or COCO-ReM (arXiv 2403.18819): instances_*.json, in their own folder or not.

    One task per category: the number of its instances in an image that has at least one, however they are outlined
    (polygons or RLE). A crowd annotation (iscrowd) stands for an unknown number, so images with one are left out for
    that category. Images lie in a folder named like the annotations (val2017), or in any other of the root's folders.
    With annotations of train and val, val becomes our test split and train is divided (see `split_of_part`). The root
    may be one annotation file; the other one of its pair, if there is one, is then read too.
    """
    files = _coco_files(root)
    parts = {file: "val" if "val" in file.stem else "train" for file in files}
    inside = [*folder.glob("*"), *folder.glob("images/*"), *folder.glob("coco/*")]
    others = sorted(f for f in inside if f.is_dir() and f.name not in ANNOTATIONS)
    for file in files:
        year = file.stem.removeprefix("instances_")  # val2017
        folders = [f for f in (folder / year, folder / "images" / year, folder, *others) if f.is_dir()]
        images, counts, crowds = _count_instances(file)
        paths = {name: _locate(folders, name) for name in images}
        for (name, category), count in counts.items():
            split = split_of_part(parts[file], {*parts.values()}, name)
            skip = "has a crowd of the category, so no known number" if (name, category) in crowds else ""
            where, item = f"{file}, {name}, {category}", f"{year}/{name}/{category}"
            yield Row(where, item, paths[name], count, name, category, split, skip)


ANNOTATIONS = ("annotations", "coco_rem")  # folders of annotations, beside those of the images


def _coco_files(root: Path) -> list[Path]:
    """The annotation files: of a folder, or the pair of train and val that one of them belongs to."""
    if root.is_file():
        names = {root.name, root.name.replace("train", "val"), root.name.replace("val", "train")}
        return sorted(file for file in map(root.with_name, names) if file.is_file())
    places = ("", *(f"{name}/" for name in ANNOTATIONS), "coco/annotations/")
    files = [file for place in places for file in sorted(root.glob(f"{place}instances_*.json"))]
    if not files:
        raise DataError(f"no instances_*.json in {root}, nor in its annotations or coco_rem: point --data-root there")
    for part in ("train", "val"):
        if len(several := [file for file in files if part in file.stem]) > 1:
            raise DataError(
                f"{several[0]} and {several[1]} are two sets of annotations: point --data-root at one of them"
            )
    return files


def _count_instances(file: Path) -> tuple[list[str], Counter, set]:
    """Of a COCO file: all image names; (image, category) -> number of instances; where there is a crowd."""
    text = read_text(file)
    try:
        content = json.loads(text)
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        images = {i["id"]: str(i["file_name"]) for i in content["images"]}
        annotations = [a for a in content["annotations"] if a["image_id"] in images]
        annotations.sort(key=lambda a: (a["image_id"], a["category_id"]))
        place = lambda a: (images[a["image_id"]], names[a["category_id"]])
        crowds = {place(a) for a in annotations if a.get("iscrowd")}
        return list(images.values()), Counter(map(place, annotations)), crowds
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is not a COCO instances file ({type(error).__name__}: {error})") from None


def read_ava(root: Path, folder: Path) -> Iterator[Row]:
    """Aesthetics. AVA (Murray, Marchesotti, Perronnin 2012): AVA.txt and images/ID.jpg (or ID.jpg); label = mean vote.

    15 columns: index, image id, number of votes for each score from 1 to 10, two tags, challenge. The archive lacks a few
    photographs: they are counted and left out.
    """
    file, rows = root / "AVA.txt", []
    if not os.path.lexists(file):
        raise DataError(f"{file} does not exist: point --data-root at the folder with AVA.txt and images/")
    folders = [f for f in (root / "images", root / "image", root) if f.is_dir()]
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        where, fields = f"{file} line {number}", line.split()
        if not re.fullmatch("([0-9]{1,15} ){14}[0-9]{1,15}", " ".join(fields)):
            what = "index, image id, ten vote counts, two tags, challenge"
            rows.append(Row(where, bad=f"is not 15 whole numbers ({what})"))
            continue
        image, votes = fields[1], [int(f) for f in fields[2:12]]
        mean = sum(score * count for score, count in enumerate(votes, start=1)) / sum(votes) if any(votes) else None
        path = _locate(folders, f"{image}.jpg")
        lacking = "" if path.is_file() else f"the download lacks the photograph: {path}"
        rows.append(Row(where, image, path, mean, image, skip=lacking))
    # If they are not few: whatever is wrong, the first one is named.
    few = sum(bool(row.skip) for row in rows) <= MISSING * len(rows)
    yield from rows if few else (row._replace(skip="") for row in rows)


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

    A group is what the label is about, as the object that is counted: each is a task of its own, and only its images are compared.
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
                yield _table_row(where, json.loads(line), folder)
            except (ValueError, AttributeError, RecursionError):
                yield Row(where, bad="is not a JSON object")


def read_folder(root: Path, folder: Path) -> Iterator[Row]:
    """Your own images: one folder per label, ROOT/3.5/a.jpg, or ROOT/train/3.5/a.jpg with all of train, val, test."""
    files, others = _image_files(root)
    yield from others
    for path in files:
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
    "utkface": (read_utkface, Task(
        "age", "How old is the person in the image, in years?", "from the youngest to the oldest", delta=10)),
    "coco": (read_coco, Task(
        "count {group}", "How many {group} instances are in the image?",
        "from the fewest {group} instances to the most", delta=4)),
    "ava": (read_ava, Task(
        "aesthetics", "How beautiful is the photograph, from 1 (worst) to 10 (best), with two decimals?",
        "from the least to the most beautiful", delta=1, decimals=2)),
}  # fmt: skip
# One's own labels: delta 0 and decimals -1 are found from them, see tasks.make_task.
RATING = Task("rating", "Rate the image from {low} to {high}.", "from the lowest to the highest", delta=0, decimals=-1)
READERS |= {"csv": (read_csv, RATING), "jsonl": (read_jsonl, RATING), "folder": (read_folder, RATING)}
READERS |= {"parquet": (read_parquet, RATING)}
DATASETS = (*DRAWN, *READERS)
