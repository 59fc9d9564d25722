"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, at any time, finds the old text or the new one."""
    beside = path.with_name(path.name + ".writing")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the rename: a power cut must not leave an empty file
    os.replace(beside, path)


def replace_folder(new: Path, path: Path) -> None:
    """Put the finished folder `new` in the place of `path`. A crash on the way leaves one of the two whole."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
