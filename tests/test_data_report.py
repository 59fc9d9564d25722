"""A look at a data set: what it prints and draws."""

import pytest
from PIL import Image
from small_data import make_images

import data
from support import data_report


def test_inspection_says_it_all(tmp_path, capsys):
    """5 faces of 5 different ages (train 3, test 1, val 1 by their lists), 1 of them broken, 1 malformed name."""
    names = [f"{age}_0_0_2017010{age}.jpg" for age in (3, 4, 5, 6, 7)]
    make_images(tmp_path, [*names, "9_0_20170101.jpg"])
    (tmp_path / names[4]).write_bytes((tmp_path / names[3]).read_bytes())  # 7 is a copy of 6
    (tmp_path / names[0]).write_text("no image")
    (tmp_path / "test.txt").write_text(names[4])
    (tmp_path / "val.txt").write_text(names[1])
    data.main(["utkface", str(tmp_path), "--out", str(tmp_path / "sheet.png"), "--question", "Wie alt, 歳?"])
    text = capsys.readouterr().out
    for expected in (
        "4 labels",
        "splits      train 2, val 1, test 1",
        "left out    2\n  1 x the name is not age_gender_race_date.jpg",
        "1 x image cannot be used [needs --skip-bad]",
        f"{names[0]} cannot be read",
        "duplicates  1 files",
        f"test {tmp_path / names[4]} = train {tmp_path / names[3]}",
        "4 age, 4 to 7, delta 10",
        "  4       1 ####",
    ):
        assert expected in text, (expected, text)
    assert Image.open(tmp_path / "sheet.png").width > 800
    data.main(["dials", "--out", str(tmp_path / "dials.png")])
    assert "splits      train 2048, val 256, test 512" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"data\.py: .*holds no usable image"):
        (tmp_path / "empty").mkdir()
        data.main(["utkface", str(tmp_path / "empty")])


def test_histogram_by_hand():
    assert data_report.format_histogram([1, 1, 1, 1, 3], width=4) == "  1       4 ####\n  3       1 #"
    # 100 different values in 4 bins of 25, the last with 50 more
    lines = data_report.format_histogram([*range(100), *(99 for _ in range(50))], bins=4, width=30).split("\n")
    assert [line.split()[-2:] for line in lines] == [["25", 10 * "#"]] * 3 + [["75", 30 * "#"]]
