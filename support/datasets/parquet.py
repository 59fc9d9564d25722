"""Data sets as Hugging Face ships them: parquet files with the images' bytes in a column. It needs pyarrow.

    python data.py parquet ROOT --columns image=image,label=mean_score,name=image_id

The columns' roles: image (bytes, or a struct that holds them as "bytes"), label, and if you like name (what list files
call a row, and what decides its split), group and split. Without --columns, image is the only column that holds bytes,
and label the only one of LABELS. The files' names or folders say train, validation or test.

An image is read when it is needed, with the row group that it lies in: a hundred images as Hugging Face writes them.
"""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data import DataError
from support.datasets.image_files import decode
from support.datasets.rows import Row, split_of_part

LABELS = ("label", "age", "mean_score", "score", "rating")
ROLES = ("image", "label", "name", "group", "split")
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def read_parquet(root: Path, folder: Path, columns: str = "") -> Iterator[Row]:
    """One row for each row of the files, numbered from 1.  columns: ROLE=COLUMN,ROLE=COLUMN, ... as given with --columns"""
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not files:
        raise DataError(f"no .parquet file under {root}: point --data-root at the data set's folder")
    parts = {file: _part(file.relative_to(folder)) for file in files}
    for file in files:
        table = _open(file)
        roles = _find_columns(table.schema_arrow, columns, file)
        wanted = [column for role, column in roles.items() if role != "image"]
        number, local = 0, file.relative_to(folder).as_posix()
        for group in range(table.num_row_groups):
            for index, cells in enumerate(table.read_row_group(group, columns=wanted).to_pylist()):
                number += 1
                found = {role: cells[column] for role, column in roles.items() if role != "image"}
                where, kind = f"{file} row {number}", str(found.get("group", ""))
                key = str(found["name"]) if "name" in roles else f"{local}/{number}"
                split = split_of_part(parts[file], {*parts.values()}, key)
                if "split" in roles:
                    split = PARTS.get(str(found["split"]), str(found["split"]))
                image = partial(_read_image, file, group, index, roles["image"], where)
                name = f"{key}/{kind}" if kind else key
                yield Row(where, name, file / str(number), found["label"], key, kind, split, image=image)


def _part(file: Path) -> str:
    """train, val or test, from the folder or the first word of the name: test-00000-of-00002.parquet."""
    words = [*file.parts[:-1], file.stem.replace(".", "-").replace("_", "-").split("-")[0]]
    return next((PARTS[word] for word in words if word in PARTS), "train")


def _open(file: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("--data parquet needs pyarrow, which is not installed: pip install pyarrow") from None
    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} is no sound parquet file ({error}): download it again") from None


def _find_columns(schema: Any, given: str, file: Path) -> dict[str, str]:
    """{role: column}, as given or found."""
    roles = dict(text.strip().partition("=")[::2] for text in given.split(",") if text.strip())
    if not set(roles) <= set(ROLES):
        raise DataError(f"--columns {given} must be ROLE=COLUMN,ROLE=COLUMN, where the roles are {', '.join(ROLES)}")
    holds_bytes = [field.name for field in schema if "binary" in str(field.type)]
    candidates = {"image": holds_bytes, "label": [name for name in schema.names if name in LABELS]}
    for role, some in candidates.items():
        if role not in roles and len(some) == 1:
            roles[role] = some[0]
    for role in ("image", "label", *roles):
        if role not in roles or roles[role] not in schema.names or role == "image" and roles[role] not in holds_bytes:
            what = f"no column {roles[role]!r}" if role in roles else "more than one or no column"
            raise DataError(
                f"{file} has {what} that can be the {role}: say which with --columns image=COLUMN,label=COLUMN; "
                f"it has {', '.join(schema.names)}"
            )
    return roles


def _read_image(file: Path, group: int, index: int, column: str, where: str) -> Image.Image:
    cell = _open(file).read_row_group(group, columns=[column]).column(0)[index].as_py()
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        raise DataError(f"the image of {where} has no bytes: take the row out")
    return decode(io.BytesIO(content), f"the image of {where}")
