"""What each data set's files say, in the layouts that one finds on disks."""

import json

import pytest
from small_data import TABLE, everything, make_images, noise_image, write_table

import data
from support.datasets import load_dataset, rows
from support.datasets import splits as datasets


@pytest.fixture
def coco(tmp_path):
    """Three images; the counts by hand: a has 2 cats and 1 dog, b has 1 cat and a crowd of dogs, c has 1 dog."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images = [{"id": i, "file_name": f"{n}.jpg"} for i, n in enumerate("abc")]
    for i in images:
        noise_image(64, 48).save(tmp_path / "val2017" / i["file_name"])
    annotate = lambda image, category, crowd=0: {"image_id": image, "category_id": category, "iscrowd": crowd}
    annotations = [annotate(0, 7), annotate(0, 7), annotate(0, 9), annotate(1, 7), annotate(1, 9), annotate(1, 9, 1), annotate(2, 9)]  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_counts_and_leaves_crowds_out(coco, monkeypatch):
    monkeypatch.setattr(datasets, "hash_split", lambda name: "train")
    items = load_dataset("coco", coco, "train")
    assert [(i.name, i.label) for i in items] == [
        ("val2017/a.jpg/cat", 2),
        ("val2017/a.jpg/dog", 1),
        ("val2017/b.jpg/cat", 1),  # and no dog: b has a crowd of them
        ("val2017/c.jpg/dog", 1),
    ]
    assert items[0].task.question == "How many cat instances are in the image?"
    assert items[0].task == items[2].task != items[1].task
    assert items[0].image().size == (64, 48)


def test_an_unknown_data_set_or_split_is_named():
    with pytest.raises(data.DataError, match="unknown data set 'dotz'"):
        load_dataset("dotz")
    with pytest.raises(data.DataError, match="unknown split"):
        load_dataset("dots", None, "tset")
    with pytest.raises(data.DataError, match="needs --data-root"):
        load_dataset("coco")


def test_coco_reads_rem_and_real_layouts(tmp_path, coco):
    """COCO-ReM's files carry RLE and no crowds; with annotations of train and val, val is the test split.

    trainrem: images t0 ... t9, one cat each, the first outlined by RLE. valrem: v.jpg with 1 polygon and 1 RLE cat.
    The ten names hash to what hash_split itself computes, so only val and the rest are told apart.
    """
    root = tmp_path / "rem"
    rle = {"size": [48, 64], "counts": "abc"}
    for part, images in (("train", [f"t{i}.jpg" for i in range(10)]), ("val", ["v.jpg"])):
        (root / f"{part}2017").mkdir(parents=True)
        for name in images:
            noise_image(64, 48).save(root / f"{part}2017" / name)
        annotations = [{"image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": rle} for i in range(len(images))]
        if part == "val":
            annotations.append({"image_id": 0, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]})
            annotations.append({"image_id": 99, "category_id": 1})  # an image that somebody took out
        content = {
            "images": [{"id": i, "file_name": n} for i, n in enumerate(images)],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "cat"}],
        }
        (root / f"instances_{part}rem.json").write_text(json.dumps(content))
    (root / "train2017").rename(tmp_path / "elsewhere")
    (root / "train2017").symlink_to(tmp_path / "elsewhere")
    splits, left_out = datasets.read_dataset("coco", root)
    assert [(i.name, i.label, i.path.parent.name) for i in splits["test"]] == [("valrem/v.jpg/cat", 2, "val2017")]
    assert {i.path.name for i in splits["val"]} == {
        f"t{i}.jpg" for i in range(10) if rows.hash_split(f"t{i}.jpg") == "val"
    }
    assert len(splits["train"]) + len(splits["val"]) == 10 and not left_out
    # One annotation file as the root: its pair is read too. Alone, it is divided by hash.
    for file in ("instances_valrem.json", "instances_trainrem.json"):
        assert len(datasets.read_dataset("coco", root / file)[0]["test"]) == 1
    (root / "instances_trainrem.json").rename(root / "trainrem.json")
    splits, _ = datasets.read_dataset("coco", root / "instances_valrem.json")
    assert [len(splits[s]) for s in splits] == [int(rows.hash_split("v.jpg") == s) for s in splits]
    (root / "trainrem.json").rename(root / "instances_trainrem.json")
    # A file name in the annotations must not lead out of the data set's folder.
    (tmp_path / "secret.jpg").write_bytes((root / "val2017/v.jpg").read_bytes())
    whole = (root / "instances_valrem.json").read_text()
    for outside in ("../secret.jpg", "../../secret.jpg", str(tmp_path / "secret.jpg")):
        (root / "instances_valrem.json").write_text(whole.replace("v.jpg", outside))
        with pytest.raises(data.DataError, match=r"secret\.jpg, cat: the path leads out of "):
            datasets.read_dataset("coco", root)
    (root / "instances_valrem.json").write_text(whole)
    # Two sets of annotations: the user chooses, and keeps the pair of train and val.
    (root / "instances_val2017.json").write_text(whole)
    with pytest.raises(data.DataError, match=r"val2017.json and .*valrem.json are two sets .* point --data-root at"):
        datasets.read_dataset("coco", root)


@pytest.mark.parametrize("root", ["", "coco_rem", "coco_rem/instances_trainrem.json", "coco_rem/instances_valrem.json"])
def test_coco_rem_beside_coco(tmp_path, root):
    """COCO-ReM's own layout: coco_rem/instances_*rem.json beside coco/train2017 and coco/val2017."""
    (tmp_path / "coco_rem").mkdir()
    for part in ("train", "val"):
        make_images(tmp_path / f"coco/{part}2017", [f"{part}{i}.jpg" for i in range(4)])
        content = {"images": [{"id": i, "file_name": f"{part}{i}.jpg"} for i in range(4)], "categories": [{"id": 1, "name": "cat"}],
                   "annotations": [{"image_id": i, "category_id": 1} for i in range(4)]}  # fmt: skip
        (tmp_path / f"coco_rem/instances_{part}rem.json").write_text(json.dumps(content))
    splits, left_out = datasets.read_dataset("coco", tmp_path / root)
    assert {i.path.name for i in splits["test"]} == {f"val{i}.jpg" for i in range(4)} and not left_out
    assert {i.path.name for i in splits["train"] + splits["val"]} == {f"train{i}.jpg" for i in range(4)}


def test_coco_counts_what_it_leaves_out(coco):
    splits, left_out = datasets.read_dataset("coco", coco)
    assert sum(map(len, splits.values())) == 4  # see the fixture
    assert [(out.where.split(", ", 1)[1], out.bad) for out in left_out] == [("b.jpg, dog", False)]


def test_utkface_names(tmp_path):
    """Seven images and a text: three good names, four malformed ones (the first two are like those of the real set)."""
    good = ["part1/1_0_4_20161219140623097.jpg", "part2/116_1_0_20170112213500903.jpg.chip.jpg"]
    good.append("44_1_4_20170116235150272.pg.chip.jpg")  # in the real set; all four fields are there
    bad = ["39_1_20170116174525125.jpg.chip.jpg", "53__0_20170116184028385.jpg", "20_1__2017.jpg", "portrait.jpg"]
    elsewhere, tmp_path = tmp_path / "elsewhere", tmp_path / "faces"
    make_images(elsewhere, good[:1])  # one part is a link to another disk
    make_images(tmp_path, [*good[1:], *bad, "._1_0_0_20161219140623097.jpg"])
    (tmp_path / "part1").symlink_to(elsewhere / "part1")
    # macOS leaves such: hidden, no image
    (tmp_path / "readme.txt").write_text("hello")
    items, left_out = everything("utkface", tmp_path)
    assert {i.path.relative_to(tmp_path).as_posix(): i.label for i in items.values()} == dict(
        zip(good, (1, 116, 44), strict=True)
    )
    assert sorted(out.where for out in left_out) == sorted(str(tmp_path / b) for b in bad)
    assert {out.why for out in left_out} == {"the name is not age_gender_race_date.jpg"}
    # The aligned face goes where the whole photograph goes, so a face is never in train and in test.
    (tmp_path / "whole").mkdir()
    (tmp_path / "part2" / "116_1_0_20170112213500903.jpg.chip.jpg").rename(
        tmp_path / "whole/116_1_0_20170112213500903.jpg"
    )
    assert everything("utkface", tmp_path)[0].keys() == items.keys()
    # Kaggle's archive holds copies. They are no other faces.
    make_images(
        tmp_path, ["116_1_0_20170112213500903.jpg.chip.jpg", "crop_part1/44_1_4_20170116235150272.jpg.chip.jpg"]
    )
    again, left_out = everything("utkface", tmp_path)
    assert again.keys() == items.keys()
    assert sum(out.why.startswith("is a copy, by its name, of: ") and not out.bad for out in left_out) == 2
    # Digits of other scripts are no age, and what Pillow cannot read is counted.
    make_images(tmp_path, ["１２_1_0_20170112213500904.jpg"])
    (tmp_path / "13_1_0_20170112213500905.HEIC").write_bytes(b"photograph")
    again, left_out = everything("utkface", tmp_path)
    assert again.keys() == items.keys()
    assert sum(out.why == "is no image that can be read here (.HEIC)" for out in left_out) == 1


AVA = """1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396
2 953958 10 7 15 26 26 21 10 8 1 2 15 21 1396
3 954184 0 0 4 8 41 56 10 3 0 4 0 0 1396
4 954113 0 0 0 0 0 0 0 0 0 0 1 15 1396
5 953980 0 3 6
"""


def test_ava_means_and_lists(tmp_path):
    """The first lines of the real AVA.txt, and two spoiled ones: no votes, too few columns.

    953619: votes 0 1 5 17 38 36 15 6 5 1 (124): (2 + 15 + 68 + 190 + 216 + 105 + 48 + 45 + 10) / 124 = 699 / 124
    953958: votes 10 7 15 26 26 21 10 8 1 2 (126): (10 + 14 + 45 + 104 + 130 + 126 + 70 + 64 + 9 + 20) / 126 = 592 / 126
    954184: votes 0 0 4 8 41 56 10 3 0 4 (126): (12 + 32 + 205 + 336 + 70 + 24 + 40) / 126 = 719 / 126
    """
    (tmp_path / "AVA.txt").write_text(AVA)
    make_images(tmp_path, ["images/953619.jpg", "images/953958.jpg", "954184.jpg", "images/954113.jpg"])
    with pytest.raises(data.DataError, match=r"AVA\.txt line 4: has no label"):
        load_dataset("ava", tmp_path)
    items, left_out = everything("ava", tmp_path, skip_bad=True)
    assert {n: i.label for n, i in items.items()} == {"953619": 699 / 124, "953958": 592 / 126, "954184": 719 / 126}
    assert [(out.why.split(" (")[0], out.where[-6:], out.bad) for out in left_out] == [
        ("has no label", "line 4", True),
        ("is not 15 whole numbers", "line 5", True),
    ]
    assert data.reference_answer(data.Sample((items["953619"],))) == '[{"image_id": 1, "value": 5.64}]'
    # AVA's own lists; what is in none of them is left out.
    (tmp_path / "aesthetics_image_lists").mkdir()
    (tmp_path / "aesthetics_image_lists/generic_ls_train.jpgl").write_text("953619\r\n")
    (tmp_path / "aesthetics_image_lists/generic_test.jpgl").write_text("953958\n")
    splits, left_out = datasets.read_dataset("ava", tmp_path, skip_bad=True)
    assert {s: [i.name for i in items] for s, items in splits.items()} == {
        "train": ["953619"],
        "val": [],
        "test": ["953958"],
    }
    assert [out.where[-6:] for out in left_out if out.why == "stands in no list file"] == ["line 3"]
    # One's own lists go before AVA's; without a list of train, train is what is in no list.
    (tmp_path / "test.txt").write_text("954184.jpg\n")
    (tmp_path / "aesthetics_image_lists/generic_ls_train.jpgl").unlink()
    splits, _ = datasets.read_dataset("ava", tmp_path, skip_bad=True)
    assert {s: [i.name for i in items] for s, items in splits.items()} == {
        "train": ["953619", "953958"],
        "val": [],
        "test": ["954184"],
    }
    with pytest.raises(data.DataError, match="val split of ava .* is empty"):
        load_dataset("ava", tmp_path, "val", skip_bad=True)
    (tmp_path / "val.txt").write_text("954184.jpg\n")
    with pytest.raises(data.DataError, match=r"954184\.jpg is in the lists of val and test"):
        datasets.read_dataset("ava", tmp_path, skip_bad=True)
    (tmp_path / "val.txt").unlink()
    (tmp_path / "test.txt").write_text("954184.jpg 5.7\n")
    with pytest.raises(data.DataError, match="no image .* one name or id a line"):
        datasets.read_dataset("ava", tmp_path, skip_bad=True)


def test_ava_without_a_few_photographs_and_with_the_published_split(tmp_path):
    """10 rows, of which the download lacks 1; a second is too many, and then the first is named."""
    line = "{0} {0} 0 1 5 17 38 36 15 6 5 1 1 22 1396\n"
    (tmp_path / "AVA.txt").write_text("".join(line.format(i) for i in range(1, 11)))
    make_images(tmp_path, [f"images/{i}.jpg" for i in range(2, 11)])
    items, left_out = everything("ava", tmp_path)
    assert len(items) == 9
    assert [(out.why.split(":")[0], out.where[-6:], out.bad) for out in left_out] == [
        ("the download lacks the photograph", "line 1", False)
    ]
    (tmp_path / "ava_split.json").write_text(json.dumps({"train_id": [2, 3, 4, 5], "test_id": ["6", "7"]}))
    splits, _ = datasets.read_dataset("ava", tmp_path)
    assert [[i.name for i in splits[s]] for s in rows.SPLITS] == [["2", "3", "4", "5"], [], ["6", "7"]]
    for broken in ("[1]", '{"train_id": 5}', "{"):
        (tmp_path / "ava_split.json").write_text(broken)
        with pytest.raises(data.DataError, match="ava_split.json is no list of splits"):
            datasets.read_dataset("ava", tmp_path)
    (tmp_path / "ava_split.json").unlink()
    (tmp_path / "test").write_text("images/6\n7.jpg\n8\n")  # a list without an ending, names with and without
    assert [i.name for i in datasets.read_dataset("ava", tmp_path)[0]["test"]] == ["7", "8"]
    (tmp_path / "images/2.jpg").unlink()
    with pytest.raises(data.DataError, match=r"line 1: the image file does not exist.*1\.jpg"):
        datasets.read_dataset("ava", tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_with_splits_and_groups(tmp_path, kind):
    """delta is a quarter of the range of a group's labels: sharp (5 - 1) / 4 = 1, bright (4.5 - 2.5) / 4 = 0.5."""
    root = write_table(tmp_path, kind, TABLE)
    make_images(root, {row["path"]: 0 for row in TABLE})
    splits, left_out = datasets.read_dataset(kind, root)
    assert not left_out
    assert {s: [(i.name, i.label) for i in items] for s, items in splits.items()} == {
        "train": [("a b/ä 1.jpg/sharp", 1), ("a b/ä 1.jpg/bright", 2.5)],
        "val": [("d.jpg/bright", 4.5)],
        "test": [("c.png/sharp", 5)],
    }
    sharp, bright = (i.task for i in splits["train"])
    assert sharp == data.Task("rating sharp", "Rate the image from 1 to 5.", "from the lowest to the highest", 1, 0)
    assert bright == data.Task(
        "rating bright", "Rate the image from 2.5 to 4.5.", "from the lowest to the highest", 0.5, 1
    )
    assert splits["train"][0].image().size == (8, 8)
    assert datasets.read_dataset(kind, root / f"labels.{kind}")[0]["val"][0].name == "d.jpg/bright"
    (root / f"labels.{kind}").rename(root / f"x.{kind}")
    (root / f"y.{kind}").write_text("")
    with pytest.raises(data.DataError, match=f"holds 2 .{kind} files"):
        load_dataset(kind, root)


def test_folder_per_label(tmp_path):
    make_images(tmp_path, ["1/a.jpg", "1/b.jpg", "2.5/a.jpg", "-3/deep/c.png"])
    items, _ = everything("folder", tmp_path)
    assert {n: i.label for n, i in items.items()} == {"1/a.jpg": 1, "1/b.jpg": 1, "2.5/a.jpg": 2.5, "-3/deep/c.png": -3}
    assert items["1/a.jpg"].task.delta == pytest.approx((2.5 + 3) / 4, abs=0.01) and items["1/a.jpg"].task.decimals == 1
    for wrong, text in (("unrated/d.jpg", "'unrated'"), ("nan/d.jpg", "'nan'"), ("d.jpg", "in no folder")):
        make_images(tmp_path, [wrong])
        with pytest.raises(data.DataError, match=f"{wrong}: .*{text}"):
            load_dataset("folder", tmp_path)
        assert everything("folder", tmp_path, skip_bad=True)[0].keys() == items.keys()
        (tmp_path / wrong).unlink()
    make_images(tmp_path / "parted", ["train/1/a.jpg", "test/2/b.jpg", "val/3/c.jpg"])
    splits, _ = datasets.read_dataset("folder", tmp_path / "parted")
    assert {s: [i.label for i in items] for s, items in splits.items()} == {"train": [1], "test": [2], "val": [3]}
