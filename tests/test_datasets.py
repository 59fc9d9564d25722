"""Rows are checked, divided into splits and given their task; what cannot be used is named."""

import json
import random

import pytest
from small_data import TABLE, everything, make_images, write_table

import data
from support.datasets import drawings, load_dataset, load_splits, readers, report, rows, tasks
from support.datasets import splits as datasets


def test_hash_split_is_stable_and_70_10_20():
    names = [f"{i:012d}.jpg" for i in range(20000)]
    share = {s: sum(rows.hash_split(n) == s for n in names) / len(names) for s in ("train", "val", "test")}
    assert abs(share["train"] - 0.7) < 0.015 and abs(share["val"] - 0.1) < 0.015 and abs(share["test"] - 0.2) < 0.015
    # Fixed for ever: the last decimal digits of the names' SHA-1 are 6, 7, 5, 4, and of a5 ... a9 below 0, 1, 9, 2, 7.
    expected = {"000000000285.jpg": "train", "000000001268.jpg": "val", "1_0_4_20161219140623097.jpg": "train",
                "953958": "train", "a7.jpg": "test"}  # fmt: skip
    assert {name: rows.hash_split(name) for name in expected} == expected


def test_own_question_order_delta_decimals(tmp_path):
    root = write_table(tmp_path, "csv", TABLE)
    make_images(root, {row["path"]: 0 for row in TABLE})
    overrides = {"question": "How {group} is it, up to {high}?", "order": "by {group}", "delta": 3.0, "decimals": 2}
    items = load_dataset("csv", root, "train", overrides)
    assert items[0].task == data.Task("rating sharp", "How sharp is it, up to 5.00?", "by sharp", 3.0, 2)
    # The same question for all: the groups still stand apart.
    items = load_dataset("csv", root, "train", {"question": "How good?", "order": None, "delta": 1, "decimals": 0})
    assert items[0].task.question == items[1].task.question and items[0].task != items[1].task
    assert load_dataset("dots", None, "val", {"delta": 2.0})[0].task.delta == 2
    for wrong, text in (({"delta": 0}, "--delta 0"), ({"delta": float("nan")}, "--delta nan"), ({"decimals": -1}, "--decimals"),
                        ({"question": " "}, "must be text and not empty"), ({"order": "\udcff?"}, "must be text"), ({"dleta": 1}, "dleta")):  # fmt: skip
        with pytest.raises(data.DataError, match=text):
            load_dataset("dots", None, "val", wrong)
    write_table(root, "csv", [{"path": "d.jpg", "label": 2}])
    with pytest.raises(data.DataError, match="the labels are all about 2, so delta is unknown: set --delta"):
        datasets.read_dataset("csv", root)
    assert everything("csv", root, task_overrides={"delta": 1.5})[0]["d.jpg"].task.delta == 1.5


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_bad_rows_are_named_or_left_out_and_counted(tmp_path, kind):
    root = write_table(tmp_path / "set", kind, [{"path": "a.jpg", "label": 1}, {"path": "b.jpg", "label": 2}])
    make_images(root, ["a.jpg", "b.jpg"])
    make_images(tmp_path, ["secret.jpg"])
    file = root / f"labels.{kind}"
    good, outside = file.read_text(encoding="utf-8-sig"), str(tmp_path / "secret.jpg")
    bad = [
        (["../secret.jpg", 3], "the path leads out of "),
        (["x/../../secret.jpg", 3], "the path leads out of "),
        ([outside, 3], "the path leads out of "),
        (["gone.jpg", 3], "the image file does not exist.*gone.jpg"),
        (["", 3], "has no path"),
        (["a.jpg", ""], "has no label"),
        (["a.jpg", "nan"], "not a finite number .*'nan'"),
        (["a.jpg", "1e999"], "not a finite number"),
        (["a.jpg", "old"], "not a finite number .*'old'"),
        (["a.jpg", "1_5"], "not a finite number .*of a range take the middle.: '1_5'"),
        (["a.jpg", "25 - 32"], "not a finite number"),
        (["a.jpg", "１２"], "not a finite number"),  # full-width digits, which float() reads
        (["a.jpg", "٣"], "not a finite number"),
        (["a.jpg", "0x10"], "not a finite number"),
        (["a.jpg", 1], "is listed twice, and first at: .* line "),
    ]
    if kind == "jsonl":
        bad += [
            (["a.jpg", True], "finite"),
            (["a.jpg", 10**400], "finite"),
            (["a.jpg", [1]], "finite"),
            ([3, 3], "no path"),
        ]
    number = {"csv": 4, "jsonl": 3}[kind]  # after two good lines, and the header of the csv
    for (path, label), text in bad:
        line = json.dumps({"path": path, "label": label}) if kind == "jsonl" else f"{path},{label}"
        file.write_text(good.rstrip("\n") + "\n" + line + "\n")
        with pytest.raises(data.DataError, match=rf"labels\.{kind} line {number}: .*{text}"):
            datasets.read_dataset(kind, root)
        items, left_out = everything(kind, root, skip_bad=True)
        assert list(items) == ["a.jpg", "b.jpg"] and [out.bad for out in left_out] == [True]
    file.write_text(good.rstrip("\n") + ('\n{"path": "a.jpg"' if kind == "jsonl" else "\nc, d.jpg,3\n"))
    with pytest.raises(data.DataError, match=f"line {number}: .*(JSON object|more columns)"):
        datasets.read_dataset(kind, root)
    # A link that the user made is the user's to make.
    (root / "linked").symlink_to(tmp_path)
    write_table(root, kind, [{"path": "linked/secret.jpg", "label": 1}, {"path": "b.jpg", "label": 2}])
    assert everything(kind, root)[0]["linked/secret.jpg"].image().size == (8, 8)
    write_table(
        root, kind, [{"path": "a.jpg", "label": 1, "split": "valid"}, {"path": "b.jpg", "label": 2, "split": "train"}]
    )
    with pytest.raises(data.DataError, match="the split is none of train, val, test: 'valid'"):
        datasets.read_dataset(kind, root)
    file.write_bytes("path,label\nä.jpg,1".encode("latin-1"))
    with pytest.raises(data.DataError, match="is not UTF-8"):
        datasets.read_dataset(kind, root)
    file.write_text("")
    if kind == "csv":
        with pytest.raises(data.DataError, match="must begin with a line path,label"):
            datasets.read_dataset(kind, root)
    else:
        with pytest.raises(data.DataError, match="is empty"):
            load_dataset(kind, root)


@pytest.mark.parametrize("name", ["utkface", "coco", "ava", "csv", "jsonl", "folder"])
def test_empty_folders_are_refused(tmp_path, name):
    with pytest.raises(data.DataError, match=str(tmp_path)):
        load_dataset(name, tmp_path)
    with pytest.raises(data.DataError, match="is not a folder"):
        load_dataset(name, tmp_path / "gone")


def test_adding_images_moves_none_between_splits(tmp_path):
    make_images(tmp_path, [f"{i % 5}/{i}.png" for i in range(40)])
    before, _ = datasets.read_dataset("folder", tmp_path)
    make_images(tmp_path, [f"{i % 5}/{i}.png" for i in range(40, 80)])
    after, _ = datasets.read_dataset("folder", tmp_path)
    for split in rows.SPLITS:
        assert {i.name for i in before[split]} <= {i.name for i in after[split]}
    assert sum(map(len, after.values())) == 80


def test_skip_bad_opens_every_image_and_counts(tmp_path, capsys):
    make_images(tmp_path, [f"train/{i}/a.jpg" for i in range(4)] + ["test/1/a.jpg"])
    (tmp_path / "train/2/a.jpg").write_bytes((tmp_path / "train/2/a.jpg").read_bytes()[:200])
    items = load_dataset("folder", tmp_path)  # files are there, nothing is opened
    assert len(items) == 4
    with pytest.raises(data.DataError, match="2/a.jpg cannot be read"):
        [i.image() for i in items]
    train, test = load_splits("folder", tmp_path, ("train", "test"), skip_bad=True)
    assert [i.label for i in train] == [0, 1, 3] and len(test) == 1
    assert "left out 1\n  1 x image cannot be used" in capsys.readouterr().err
    assert [i.label for i in load_dataset("folder", tmp_path, "train", skip_bad=True)] == [0, 1, 3]


def items_of(labels):
    return [data.Item(f"{i}.jpg", label, drawings.DOTS, lambda: None) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("odd", "found"), [([], []), ([-999], [-999]), ([9999, -1e6], [-1e6, 9999]), ([19, 20], []), ([12], []), ([99], [99])]
)  # fmt: skip
def test_labels_that_lie_apart_are_outliers(odd, found):
    """Beside 40 labels from 1 to 10, whose range is 9: 19 is no more than 9 away from 10, 99 is."""
    assert [item.label for item in tasks.outliers(items_of([*(1 + i % 10 for i in range(40)), *odd]))] == found


def test_what_is_rare_is_no_outlier():
    """Log-normal counts have a long tail without a gap; of labels nearly all alike nobody can say what lies apart."""
    rng = random.Random(0)
    assert not tasks.outliers(items_of([max(1, int(rng.lognormvariate(0.6, 1.0))) for _ in range(5000)]))
    assert not tasks.outliers(items_of([1] * 99 + [20])) and not tasks.outliers(items_of([1, 2, 900]))


def test_outliers_are_named_where_a_data_set_is_loaded_and_in_the_report(tmp_path, capsys):
    rows = [{"path": f"{i}.png", "label": i % 10 if i else -999, "split": "train"} for i in range(40)]
    make_images(write_table(tmp_path, "csv", rows), [f"{i}.png" for i in range(40)])
    load_dataset("csv", tmp_path)
    assert "1 label lies far from all others" in (said := capsys.readouterr().err) and "0.png -999" in said
    report.main(["csv", str(tmp_path), "--out", str(tmp_path / "sheet.png")])
    assert "outliers    1 label lies far" in capsys.readouterr().out


def test_labels_in_a_small_unit_can_be_written():
    """From 0.0001 to 0.0010 in steps of 0.0001: 4 decimals; delta (0.0010 - 0.0001) / 4. Coarse ones stay at 3 at most."""
    small = tasks.fit_to_labels(readers.RATING, [i / 1e4 for i in range(1, 11)])
    assert (small.decimals, small.delta) == (4, pytest.approx(0.000225))
    assert tasks.fit_to_labels(readers.RATING, [1 / 3, 2.5, 4]).decimals == 3
    assert tasks.fit_to_labels(readers.RATING, [1 / 3e4, 2.5e-4, 4e-4]).decimals == 7  # a quarter is 9e-5: 3 + 4
