"""What a reader yields for each image, what decides its split, and how its text files are read."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data import DataError

SPLITS = ("train", "val", "test")


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
    image  opens it where it is no file of its own; the path then only has to be unlike any other's
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
    image: Callable[[], Image.Image] | None = None

    def known_as(self) -> tuple[str, ...]:
        """What a list file may call it."""
        return self.key, self.key.removesuffix(self.path.suffix), self.path.name, self.path.stem


def hash_split(name: str) -> str:
    """train (70 %), val (10 %) or test (20 %) from a file's name alone, so new files never move old ones."""
    # A checksum such as CRC is not enough: on names that count up, it shares out unevenly.
    place = int(hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest(), 16) % 10
    return "train" if place < 7 else "val" if place == 7 else "test"


def split_of_part(part: str, parts: set[str], key: str) -> str | None:
    """The split of a row whose file belongs to a part of the data set; None: its key alone decides.

    One part alone says nothing. Where none is called test, val is (COCO's test set has no public labels). Where none is
    left for val, train is divided into train and val.
    """
    if len(parts) < 2:
        return None
    if part == "val" and "test" not in parts:
        return "test"
    if part == "train" and not {"val", "test"} <= parts and hash_split(key) == "val":
        return "val"
    return part


def read_text(file: Path) -> str:
    """A text file's content. DataError for what is no regular file (a pipe would never end) or not UTF-8."""
    if not os.path.isfile(file):
        raise DataError(f"{file} is no regular file: save its text as one")
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets begin with a byte order mark
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text: save it as UTF-8") from None
