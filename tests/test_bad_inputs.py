"""Whatever lies in a data set's folder: one sentence with the file's name, or a counted row. No traceback, no waiting."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import make_images, write_table

import data
from support.datasets import load_dataset, report
from support.datasets import splits as datasets

ROOT = Path(__file__).resolve().parent.parent
GOOD = "path,label\na.jpg,1\nb.jpg,2\n"


@pytest.fixture(autouse=True)
def in_time():
    """A pipe or a link that goes round must not be waited for."""

    def too_long(*_):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def look(kind, root, *more):
    """What `python data.py` says when it refuses."""
    with pytest.raises(SystemExit) as end:
        report.main([kind, str(root), "--out", str(root / "sheet.png"), *more])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c.jpg,1e308", "not a finite number of at most 1e.12"),
        ("c.jpg,-1e13", "not a finite number of at most 1e.12"),
        ("c.jpg," + "9" * 5000, "the label is not a finite number"),
        ("c.jpg,3\0", "the label is not a finite number"),
        ("c\0.jpg,3", "the image file does not exist"),
        ("x" * 5000 + ".jpg,3", "the image file does not exist"),
        (".,3", "or is no regular file"),
        ("pipe.jpg,3", "or is no regular file"),
        ("broken.jpg,3", "the image file does not exist"),
        ("zero.jpg,3", "the image file does not exist"),
        ('"c.jpg,3', "has no label"),
        ("c.jpg," + "x" * 200_000, "line 3 is not CSV"),
    ],
)
def test_bad_line_of_a_table(tmp_path, line, said):
    make_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "labels.csv").write_text(GOOD + line + "\n")
    with pytest.raises(data.DataError, match=f"labels.csv line .*{said}" if "CSV" not in said else said):
        datasets.read_dataset("csv", tmp_path)


@pytest.mark.parametrize(
    "more",
    [{"label": {"a": 1}}, {"label": json.loads("[" * 900 + "]" * 900)}, {"label": None}, {"label": 10**400},
     {"label": "\ud800"}, {"path": ["c.jpg"]}, {"path": "c\0.jpg"}, {"path": "\ud800.jpg"}, {"split": ["train"]}],
)  # fmt: skip
def test_bad_object_of_a_table(tmp_path, more):
    rows = [{"path": f"{n}.jpg", "label": i, "split": "train"} for i, n in enumerate("abc")]
    write_table(tmp_path, "jsonl", [*rows[:2], rows[2] | more])
    make_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(data.DataError, match=r"labels\.jsonl line 3: "):
        datasets.read_dataset("jsonl", tmp_path)
    splits, left_out = datasets.read_dataset("jsonl", tmp_path, skip_bad=True)
    assert len(splits["train"]) == 2 and [out.bad for out in left_out] == [True]


@pytest.mark.parametrize("what", ["pipe", "folder", "link to itself", "binary"])
@pytest.mark.parametrize(
    ("kind", "file"),
    [("csv", "labels.csv"), ("csv", "test.txt"), ("ava", "AVA.txt"), ("coco", "annotations/instances_val2017.json")],
)
def test_what_is_no_text_file(tmp_path, kind, file, what):
    make_images(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "labels.csv").write_text(GOOD)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "binary":
        path.write_bytes(bytes(range(256)))
    else:
        path.symlink_to(path)
    said = look(kind, tmp_path)
    assert path.name in said and ("is not UTF-8" if what == "binary" else "is no regular file") in said


@pytest.mark.parametrize("change", [
    {"images": None}, {"images": [1]}, {"annotations": "x"}, {"annotations": [1]}, {"categories": {}},
    {"categories": [{"id": [], "name": "cat"}]}, {"annotations": [{"image_id": 1, "category_id": [1]}]},
    {"annotations": [{"image_id": 1, "category_id": 1}, {"image_id": 1, "category_id": "1"}],
     "categories": [{"id": 1, "name": "cat"}, {"id": "1", "name": "dog"}]},
])  # fmt: skip
def test_broken_annotations(tmp_path, change):
    make_images(tmp_path, ["a.jpg"])
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "category_id": 1}]}
    content |= {"categories": [{"id": 1, "name": "cat"}]} | change
    (tmp_path / "instances_val2017.json").write_text(json.dumps(content))
    assert "instances_val2017.json is not a COCO instances file" in look("coco", tmp_path)


@pytest.mark.parametrize("root", ["nul\0byte", "x" * 5000, "pipe"])
def test_bad_roots(tmp_path, root):
    os.mkfifo(tmp_path / "pipe")
    for kind in ("csv", "folder", "coco"):
        with pytest.raises(data.DataError, match="is not a folder"):
            load_dataset(kind, tmp_path / root)


def test_links_that_go_round_are_followed_once(tmp_path):
    make_images(tmp_path, ["1/a.png", "2/b.png"])
    for number in (1, 2):
        (tmp_path / f"{number}/loop").symlink_to(tmp_path)
    splits, _ = datasets.read_dataset("folder", tmp_path)
    assert sorted(i.name for items in splits.values() for i in items) == ["1/a.png", "2/b.png"]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    make_images(tmp_path, ["1/a.png", "2/b.png"])
    listed = os.scandir

    def refuse(path="."):
        if Path(path).name == "2":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(data.DataError, match="2 cannot be read: Permission denied"):
        datasets.read_dataset("folder", tmp_path)


def test_labels_that_make_no_task_say_what_was_left_out(tmp_path):
    make_images(tmp_path, ["1/a.png", "one/b.png"])
    assert "set --delta (1 left out, first" in look("folder", tmp_path)
    assert "from 1e-09 to 1e+12" in look("folder", tmp_path, "--delta", "1e300")


@pytest.mark.parametrize("program", ["data.py", "eval.py", "train.py"])
def test_interrupted_while_it_starts_is_one_line(tmp_path, program):
    """Ctrl-C in the first second, while torch is imported."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, str(ROOT / program)], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (130, f"{program}: interrupted\n")
