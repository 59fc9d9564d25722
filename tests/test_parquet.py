"""Parquet files with images in them, as Hugging Face writes them. They need pyarrow, which the project does not ask for."""

import io
import sys

import numpy as np
import pytest
from small_data import everything, noise_image

import data
from support.datasets import parquet, report, rows
from support.datasets import splits as datasets
from support.datasets.image_files import decode

pyarrow = pytest.importorskip("pyarrow")
write = pytest.importorskip("pyarrow.parquet").write_table


def png(seed):
    noise_image(8, 8, seed).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def write_rows(file, labels, label="age", first=0, **more):
    """Images whose noise is seeded by their number, in row groups of 3."""
    numbers = range(first, first + len(labels))
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in numbers]
    file.parent.mkdir(parents=True, exist_ok=True)
    write(pyarrow.table({"image": images, label: labels, **more}), file, row_group_size=3)


def test_images_are_read_one_by_one_and_are_those_of_their_labels(tmp_path, monkeypatch):
    """8 rows in 2 files; label 10 + i and an image of noise i. Nothing is read of the images before one is asked for."""
    write_rows(tmp_path / "data/train-00000-of-00002.parquet", [10, 11, 12, 13, 14], gender=[0] * 5)
    write_rows(tmp_path / "data/train-00001-of-00002.parquet", [15, 16, 17], first=5, gender=[0] * 3)
    decoded = []
    monkeypatch.setattr(parquet, "decode", lambda *a: decoded.append(a) or decode(*a))
    items, left_out = everything("parquet", tmp_path)
    assert not left_out and not decoded and len({item.path for item in items.values()}) == 8
    assert items["data/train-00000-of-00002.parquet/5"].label == 14
    for item in items.values():
        assert np.array_equal(np.asarray(item.image()), np.asarray(noise_image(8, 8, int(item.label) - 10)))
    assert len(decoded) == 8


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train-0", "validation-0", "test-0"], {"train": "train-0", "val": "validation-0", "test": "test-0"}),
        (["train/0000", "validation/0000"], {"test": "validation/0000"}),  # val is the test set, train is divided
        (["train-0", "test-0"], {"test": "test-0"}),
    ],
)
def test_splits_are_those_of_the_files_names(tmp_path, names, expected):
    for name in names:
        write_rows(tmp_path / f"{name}.parquet", list(range(12)))
    splits, _ = datasets.read_dataset("parquet", tmp_path)
    for split, name in expected.items():
        assert {item.name for item in splits[split]} == {f"{name}.parquet/{i}" for i in range(1, 13)}
    assert sum(map(len, splits.values())) == 12 * len(names)


def test_columns_are_found_or_said(tmp_path):
    file = tmp_path / "x.parquet"
    write_rows(file, [4.5, 5.25, 6.0], "mean_score", image_id=["a", "b", "c"], age=[1, 2, 3], split=["train", "validation", "test"])  # fmt: skip
    with pytest.raises(
        data.DataError, match="more than one or no column that can be the label.* image, mean_score, image_id"
    ):
        datasets.read_dataset("parquet", file)
    for wrong, said in (
        ("label=score", "no column 'score'"),
        ("image=age,label=age", "no column 'age' that can be the image"),
        ("labels=age", "where the roles are image, label"),
    ):
        with pytest.raises(data.DataError, match=said):
            datasets.read_dataset("parquet", file, {"columns": wrong})
    overrides = {"columns": "label=mean_score, name=image_id, split=split"}
    splits, _ = datasets.read_dataset("parquet", tmp_path, overrides)
    assert [[(i.name, i.label) for i in splits[s]] for s in rows.SPLITS] == [[("a", 4.5)], [("b", 5.25)], [("c", 6.0)]]
    (tmp_path / "test.txt").write_text("a\n")
    assert [i.name for i in datasets.read_dataset("parquet", tmp_path, overrides)[0]["test"]] == ["a"]
    with pytest.raises(data.DataError, match="--columns goes with --data parquet, not with dots"):
        datasets.read_dataset("dots", None, {"columns": "label=age"})


def test_what_is_broken_is_named(tmp_path, monkeypatch):
    with pytest.raises(data.DataError, match="no .parquet file under"):
        datasets.read_dataset("parquet", tmp_path)
    file = tmp_path / "train.parquet"
    write_rows(file, [1, 2, None])
    with pytest.raises(data.DataError, match=r"train\.parquet row 3: has no label"):
        datasets.read_dataset("parquet", tmp_path)
    images = [{"bytes": png(0)}, {"bytes": b"no image"}, {"bytes": None}]
    write(pyarrow.table({"image": images, "label": [1, 2, 3]}), file)
    items, _ = everything("parquet", tmp_path)
    assert items["train.parquet/1"].image().size == (8, 8)
    for number, said in (2, "cannot be read"), (3, "has no bytes"):
        with pytest.raises(data.DataError, match=rf"the image of .*train\.parquet row {number} {said}"):
            items[f"train.parquet/{number}"].image()
    report.main(["parquet", str(tmp_path), "--out", str(tmp_path / "sheet.png"), "--delta", "1"])
    assert "2 x image cannot be used" in (tmp_path / "left_out.txt").read_text()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(data.DataError, match="is no sound parquet file"):
        datasets.read_dataset("parquet", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(data.DataError, match="needs pyarrow, which is not installed: pip install pyarrow"):
        datasets.read_dataset("parquet", tmp_path)
