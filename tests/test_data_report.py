"""A look at a data set: what it prints and draws."""

import doctest
import os

import pytest
from small_data import make_images, write_table

from support.datasets import report as data_report


def test_inspection_says_it_all(tmp_path, capsys):
    """5 faces of 5 different ages (train 3, test 1, val 1 by their lists), 1 of them broken, 1 malformed name."""
    names = [f"{age}_0_0_2017010{age}.jpg" for age in (3, 4, 5, 6, 7)]
    make_images(tmp_path, [*names, "9_0_20170101.jpg"])
    (tmp_path / names[4]).write_bytes((tmp_path / names[3]).read_bytes())  # 7 is a copy of 6
    (tmp_path / names[0]).write_text("no image")
    (tmp_path / "test.txt").write_text(names[4])
    (tmp_path / "val.txt").write_text(names[1])
    data_report.main(["utkface", str(tmp_path), "--out", str(tmp_path / "sheet.png"), "--question", "Wie alt, 歳?"])
    text = capsys.readouterr().out
    for expected in (
        "4 labels",
        "splits      train 2, val 1, test 1",
        "left out    2\n  1 x the name is not age_gender_race_date.jpg",
        "1 x image cannot be used [needs --skip-bad]",
        f"{names[0]} cannot be read",
        "identical   2 files with different labels or in different splits: correct the labels",
        f"test {tmp_path / names[4]} (7) = train {tmp_path / names[3]} (6)",
        "age       4    4  7    10 ",
        "  4       1 ####",
    ):
        assert expected in text, (expected, text)
    assert (tmp_path / "sheet.png").exists()
    assert f"all of them are in {tmp_path / 'left_out.txt'}" in text
    assert "Wie alt, 歳? Reply with JSON only" in text
    data_report.main(["dials", "--out", str(tmp_path / "dials.png")])
    assert "splits      train 2048, val 256, test 512" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"data\.py: .*holds no usable image"):
        (tmp_path / "empty").mkdir()
        data_report.main(["utkface", str(tmp_path / "empty")])


def test_histogram_by_hand():
    assert data_report.format_histogram([1, 1, 1, 1, 3], width=4) == "  1       4 ####\n  3       1 #"
    # 100 different values in 4 bins of 25, the last with 50 more
    lines = data_report.format_histogram([*range(100), *(99 for _ in range(50))], bins=4, width=30).split("\n")
    assert [line.split()[-2:] for line in lines] == [["25", 10 * "#"]] * 3 + [["75", 30 * "#"]]


def test_examples_in_docstrings():
    assert doctest.testmod(data_report) == (0, 2)


def test_constants_in_the_report_earn_what_they_would(tmp_path, capsys):
    """Labels of train: 1, 1, 1, 5, 9 (delta 8 / 4 = 2). 1 earns 3/5 by R_reg, its MAE is (0 + 0 + 0 + 4 + 8) / 5 = 2.4.

    The median is 1 too. val has a 1 only.
    """
    labels = {"a": 1, "b": 1, "c": 1, "d": 5, "e": 9}
    rows = [{"path": f"{name}.png", "label": label, "split": "train"} for name, label in labels.items()]
    make_images(write_table(tmp_path, "csv", [*rows, {"path": "f.png", "label": 1, "split": "val"}]), [f"{n}.png" for n in "abcdef"])  # fmt: skip
    data_report.main(["csv", str(tmp_path), "--out", str(tmp_path / "sheet.png")])
    text = capsys.readouterr().out
    line = next(line.split() for line in text.splitlines() if line.startswith("rating"))
    assert line == ["rating", "6", "1", "9", "2", "1", "0.60", "2.40", "1", "0.60", "2.40"]
    assert "of the train split" in text and "about delta / 2 earns an R_reg of 0.77" in text


def test_all_that_is_left_out_is_in_the_file(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "sheet.png"
    make_images(root, [f"{i}/a.png" for i in range(3)] + [f"odd{i}/b.png" for i in range(20)])
    data_report.main(["folder", str(root), "--out", str(out)])
    text = (out.parent / "left_out.txt").read_text()
    assert all(f"odd{i}/b.png" in text for i in range(20)) and text.startswith("20\n  20 x the label is not")
    assert "and 17 more" in capsys.readouterr().out
    for i in range(20):
        (root / f"odd{i}/b.png").unlink()
    data_report.main(["folder", str(root), "--out", str(out)])  # mended: the old list must not stay
    assert (out.parent / "left_out.txt").read_text() == "0\n"


def test_identical_files_with_different_labels_or_splits(tmp_path, capsys):
    """a = b with labels 1 and 2, c = d with equal labels, both within train; e in two splits: 2 files and 2 files."""
    make_images(tmp_path, ["train/1/a.png", "train/1/c.png", "train/3/e.png"])
    for copy, original in (
        ("train/2/b.png", "train/1/a.png"),
        ("train/1/d.png", "train/1/c.png"),
        ("test/3/e.png", "train/3/e.png"),
    ):
        (tmp_path / copy).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / copy).write_bytes((tmp_path / original).read_bytes())
    data_report.main(["folder", str(tmp_path), "--out", str(tmp_path / "sheet.png")])
    text = capsys.readouterr().out
    assert "identical   4 files" in text and f"a.png (1) = train {tmp_path / 'train/2/b.png'} (2)" in text
    assert f"e.png (3) = train {tmp_path / 'train/3/e.png'} (3)" in text and "c.png" not in text


@pytest.mark.parametrize("out", ["x.xyz", "x", "no/x.png", "pipe.png"])
def test_where_the_sheet_cannot_be_written_is_said_at_once(tmp_path, out, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SystemExit, match=r"data\.py: --out .*must be a picture's name"):
        data_report.main(["dots", "--out", str(tmp_path / out)])
    assert capsys.readouterr().out == ""
