"""The task beside the weights: written, read, applied, and refused where it is damaged."""

import json
import os
from dataclasses import replace

import pytest
from PIL import Image
from small_data import make_images

import data
from support.datasets import drawings
from support.datasets.readers import READERS
from support.datasets.saved_task import apply, begin, load_task, load_to_evaluate, save_task, task_to_rank_by
from support.run.preflight import load_items, task_overrides
from support.run.settings import Settings

CATS, COWS = (data.Task(f"count {name}", f"How many {name}s?", "by number", delta=4) for name in ("cat", "cow"))


def items(*tasks):
    return [data.Item(f"{i}", i, task, lambda: None) for i, task in enumerate(tasks)]


@pytest.fixture
def save(tmp_path):
    def save(name, tasks, overrides=None, max_pixels=None, skip_bad=False):
        save_task(tmp_path, name, items(*tasks), overrides or {}, max_pixels, skip_bad)
        return load_task(tmp_path)

    return save


def test_what_is_saved_is_read_back(save, tmp_path):
    assert load_task(tmp_path) is None and load_task("Qwen/Qwen2.5-VL-3B-Instruct") is None
    odd = replace(CATS, question="Wie viele\n„Katzen“?", delta=0.1, decimals=3)
    saved = save("coco", [odd, COWS, odd], {"question": "x", "order": None, "delta": 0.1, "decimals": 0}, 50176, True)
    assert saved.tasks == {"count cat": odd, "count cow": COWS}
    assert (saved.data, saved.max_pixels, saved.skip_bad) == ("coco", 50176, True)
    assert saved.overrides == {"question": "x", "delta": 0.1, "decimals": 0}, "what was not given is not there"


def test_the_same_data_set_is_asked_as_in_training(save):
    asked = replace(drawings.DOTS, question="Count the dots!", delta=2.5)
    saved = save("dots", [asked], {"question": "Count the dots!", "delta": 2.5})
    test, train = load_to_evaluate(saved, "dots", None, "test", {}, None)
    assert {item.task for item in test + train} == {asked} and len(test) == 512 and len(train) == 2048
    # What is given now wins, field by field.
    test, _ = load_to_evaluate(saved, "dots", None, "test", {"delta": 7.0, "question": None}, None)
    assert {item.task for item in test} == {replace(asked, delta=7.0)}
    # Without a saved task, and on another data set, the question is the data set's own.
    assert load_to_evaluate(None, "dots", None, "test", {}, None)[0][0].task == drawings.DOTS
    assert load_to_evaluate(saved, "dials", None, "test", {}, None)[0][0].task == drawings.DIALS
    test, _ = load_to_evaluate(saved, "dials", None, "test", {"order": "by number"}, None)
    assert test[0].task == replace(drawings.DIALS, order="by number")


def test_a_group_that_training_never_saw_keeps_its_task(save):
    trained, pigs = replace(CATS, delta=2), data.Task("count pig", "Pigs?", "by number", delta=2)
    saved = save("coco", [trained, COWS])
    tasks = [item.task for item in apply(saved, "coco", items(CATS, pigs, COWS), {})]
    assert tasks == [trained, pigs, COWS]
    tasks = [item.task for item in apply(saved, "coco", items(CATS, pigs), {"question": "Cats now?"})]
    assert tasks == [CATS.__class__("count cat", CATS.question, "by number", 2), pigs], (
        "the given one is loaded with it"
    )


def test_bad_rows_are_skipped_as_in_training(save, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (30, 30)).save(folder / f"{i}.png")
    (folder / "7.png").write_text("no image")
    lines = [f"{i}.png,{i},{'train' if i < 4 else 'test'}" for i in range(8)] + ["8.png,8,test"]
    (folder / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    with pytest.raises(data.DataError, match="does not exist"):
        load_to_evaluate(None, "csv", str(folder), "test", {}, None)
    saved = save("csv", [data.Task("rating", "How ripe?", "from the least ripe", delta=1.5)], skip_bad=True)
    test, train = load_to_evaluate(saved, "csv", str(folder), "test", {}, None)
    assert [item.label for item in test] == [4, 5, 6] and len(train) == 4 and test[0].task.question == "How ripe?"
    with pytest.raises(data.DataError, match="does not exist"):
        load_to_evaluate(saved, "csv", str(folder), "test", {}, False)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", "[" * 100_000, '{"data": "dots"}', {"tasks": []}, {"tasks": {}},
     {"tasks": [{"name": "x"}]}, {"tasks": ["x"]}, {"delta": 0}, {"delta": -1}, {"delta": "4"},
     {"delta": float("nan")}, {"delta": float("inf")}, {"decimals": 1.5}, {"decimals": 10}, {"question": " "},
     {"question": 5}, {"order": None}, {"colour": "red"}, {"overrides": {"min_gap": 1}},
     {"overrides": {"delta": -1}}, {"overrides": None},]
)  # fmt: skip
def test_a_damaged_file_is_named_with_the_way_out(save, tmp_path, damage):
    save("dots", [drawings.DOTS])
    file = tmp_path / "task.json"
    content = json.loads(file.read_text())
    for field, value in damage.items() if isinstance(damage, dict) else ():
        (content if field in content else content["tasks"][0])[field] = value
    file.write_text(json.dumps(content) if isinstance(damage, dict) else damage)
    with pytest.raises(data.DataError) as error:
        load_task(tmp_path)
    message = str(error.value)
    assert str(file) in message and "is damaged" in message and "delete it" in message and "\n" not in message


def test_bytes_that_are_no_text_and_a_pipe_are_damage(tmp_path):
    (tmp_path / "task.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(data.DataError, match="is damaged"):
        load_task(tmp_path)
    (tmp_path / "task.json").unlink()
    os.mkfifo(tmp_path / "task.json")  # reading it would wait for ever
    with pytest.raises(data.DataError, match="is damaged"):
        load_task(tmp_path)


def test_the_question_to_rank_by(save, tmp_path):
    def task(saved, name=None, root=None, **given):
        return task_to_rank_by(saved, name, root, given)

    # Of a data set.
    assert task(None, "dots") == drawings.DOTS and task(None, "dials") == drawings.DIALS
    assert "old" in task(None, "utkface").question and "youngest" in task(None, "utkface").order
    assert task(None, "ava").decimals == 2
    assert task(None, "dots", order="by number") == replace(drawings.DOTS, order="by number")
    # Of one's own.
    own = task(None, question="How red?", order="from pale to red")
    assert (own.question, own.order) == ("How red?", "from pale to red")
    # Of training.
    saved = save("dots", [replace(drawings.DOTS, question="Count!")])
    assert task(saved).question == "Count!" == task(saved, "dots").question and task(saved, "dials") == drawings.DIALS
    assert task(saved, question="How red?") == replace(drawings.DOTS, question="How red?")
    # Two questions, or none.
    saved = save("coco", [CATS, COWS])
    with pytest.raises(data.DataError, match=r"coco asks 2 questions, such as 'How many cats\?': say"):
        task(saved)
    assert task(saved, question="How many pigs?", order="by number").question == "How many pigs?"
    for half in ({}, {"question": "q"}, {"order": "o"}):
        with pytest.raises(data.DataError, match="either --data or both --question and --order"):
            task(None, **half)
    for wrong, message in (
        ({"delta": -1.0}, "--delta"),
        ({"decimals": 99}, "--decimals"),
        ({"question": " "}, "empty"),
    ):
        with pytest.raises(data.DataError, match=message):
            task(None, "dots", **wrong)


def test_the_question_of_a_data_set_that_depends_on_its_labels(tmp_path):
    # A rating names the lowest and the highest label, so it takes the labels to know the question.
    with pytest.raises(data.DataError, match="--data csv depends on the images"):
        task_to_rank_by(None, "csv", None, {})
    for i in range(1, 6):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{i}.png")
    lines = [f"{i}.png,{i},train" for i in range(1, 6)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    assert task_to_rank_by(None, "csv", str(tmp_path), {}).question == "Rate the image from 1 to 5."
    with pytest.raises(data.DataError, match="dotz"):
        task_to_rank_by(None, "dotz", None, {})
    # Two groups are two questions.
    lines = [f"{i}.png,{i},train,{'ab'[i % 2]}" for i in range(1, 6)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split,group", *lines]))
    with pytest.raises(data.DataError, match="asks 2 questions, such as 'Rate the image"):
        task_to_rank_by(None, "csv", str(tmp_path), {})
    assert READERS["csv"][1].question.startswith("Rate"), "the table of tasks is as it was"


@pytest.fixture
def begun(tmp_path):
    """A run on 24 images, labels 0 to 7, as it began. -> its folder, the images', how it was set, its items"""
    root, run = tmp_path / "set", tmp_path / "run"
    make_images(root, [f"{i}.png" for i in range(24)])
    (root / "labels.csv").write_text("path,label\n" + "".join(f"{i}.png,{i % 8}\n" for i in range(24)))
    run.mkdir()
    s = Settings(data="csv", data_root=str(root), images=(1,), columns=None)
    splits = load_items(s, run)
    begin(run, "csv", splits, task_overrides(s), None, False)
    return run, root, s, splits


def go_on(run, s, **settings):
    return load_items(replace(s, stage=2, **settings), run)


def test_what_a_run_began_with_is_what_it_goes_on_with(begun, capsys):
    """A new label of 100 would make delta 25 of 1.75, a list file would move images, another order of lines the batches."""
    run, root, s, splits = begun
    facts = lambda splits: [[(i.name, i.label, i.task) for i in items] for items in splits]
    lines = (root / "labels.csv").read_text().splitlines()
    make_images(root, ["new.png"])
    (root / "labels.csv").write_text("\n".join([lines[0], "new.png,100", *reversed(lines[1:])]))
    (root / "test.txt").write_text(splits[0][0].name)
    (root / "val.txt").write_text(splits[0][1].name)
    for settings in ({}, {"stage": None, "resume": True}):
        again = load_items(replace(s, **{"stage": 2} | settings), run)
        assert facts(again) == facts(splits) and again[0][0].task.delta == 1.75
        assert "csv: 1 images were added since" in capsys.readouterr().err
    # What the user says now wins, and is saved as said.
    again = go_on(run, s, delta=3.0)
    assert {i.task for items in again for i in items} == {replace(splits[0][0].task, delta=3.0)}
    begin(run, "csv", again, task_overrides(replace(s, delta=3.0)), None, False)
    assert load_task(run).overrides == {"delta": 3.0} and go_on(run, s)[0][0].task.delta == 3
    # A run that begins derives all of it.
    assert load_items(s, run)[0][0].task.delta == 25


@pytest.mark.parametrize(
    ("change", "said"), [("5.png,9\n", "5.png at 5, which is 9"), ("", "5.png at 5, which is gone")]
)
def test_what_can_no_longer_hold_is_refused_by_name(begun, change, said):
    run, root, s, _ = begun
    (root / "labels.csv").write_text((root / "labels.csv").read_text().replace("5.png,5\n", change, 1))
    with pytest.raises(data.DataError, match=f"began with {said}: put it back"):
        go_on(run, s)


@pytest.mark.parametrize("damage", [None, "", "{", "[1, 2]\n", '["all", 5.0, "a.png"]\n', "3\n"])
def test_damaged_items_of_a_run_are_named(begun, damage):
    run, _, s, _ = begun
    (run / "items.jsonl").unlink() if damage is None else (run / "items.jsonl").write_text(damage)
    with pytest.raises(data.DataError, match=r"items\.jsonl is damaged .*: restore it, or start another run"):
        go_on(run, s)


def test_another_data_set_in_a_later_stage_is_read_as_it_is(begun):
    run, _, s, _ = begun
    assert go_on(run, s, data="dots", data_root=None)[0][0].task == drawings.DOTS


def test_a_run_says_what_it_began_with(finished):
    run, _ = finished
    assert load_task(run).tasks == {"dots": drawings.DOTS} and not (run / "items.jsonl").exists()
    assert (run / "stage2/task.json").read_text() == (run / "task.json").read_text()
