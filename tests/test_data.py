"""Items, samples, prompts: what the policy is shown must be what the label is about, and nothing of the test set."""

import hashlib
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.image_transforms import convert_to_rgb
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import reward


class Processor(Qwen2_5_VLProcessor):
    """transformers' own processor, less the demand for a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, *args):
        return None


def tokenizers(policy):
    found = [policy.tokenizer]
    if folder := os.environ.get("RARL_QWEN_TOKENIZER"):
        found.append(AutoTokenizer.from_pretrained(folder))
    return found


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(84, 84), (28, 28), (1, 1), (300, 200), (201, 299), (640, 480), (30, 1500), (57, 1999), (3000, 17)]
)
@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 1280), (56 * 56, 112 * 112)])
def test_patches_equal_transformers_processor_exactly(size, limits):
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})
    image = noise_image(*size)
    expected = theirs(images=[image], return_tensors="pt")
    patches, grid = data.image_patches(image, theirs)
    assert torch.equal(torch.from_numpy(patches), expected.pixel_values)
    assert [list(grid)] == expected.image_grid_thw.tolist()


def test_too_long_images_are_refused():
    with pytest.raises(data.DataError, match="200 times as long"):
        data.image_patches(noise_image(1, 201), Qwen2VLImageProcessorPil())


def test_prompt_equals_transformers_processor_token_for_token(policy):
    items = data.load_dataset("dials", None, "test")
    wide = data.Item("wide", 3, data.DIALS, lambda: noise_image(150, 90))
    for tokenizer in tokenizers(policy):
        processor = Processor(policy.image_processor, tokenizer, None, tokenizer.chat_template)
        front = type("Front", (), {"tokenizer": tokenizer, "image_processor": policy.image_processor})
        for n in (1, 2, 4, 8):
            sample = data.Sample((wide, *items[: n - 1]))
            (prompt,) = data.make_prompts(front, [sample])
            expected = processor(
                text=[data.chat_text(tokenizer, sample)],
                images=[item.image() for item in sample.items],
                return_tensors="pt",
            )
            assert torch.equal(prompt.ids, expected.input_ids[0])
            assert torch.equal(prompt.pixels, expected.pixel_values)
            assert torch.equal(prompt.grid, expected.image_grid_thw)


def test_chat_text_is_what_a_template_for_images_writes(policy):
    sample = data.Sample(tuple(data.load_dataset("dots", None, "val")[:2]))
    parts = [
        p
        for i in (1, 2)
        for p in ({"type": "text", "text": f"Image {i}: "}, {"type": "image"}, {"type": "text", "text": "\n"})
    ]
    parts.append({"type": "text", "text": data.question_text(data.DOTS, 2)})
    expected = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert data.chat_text(policy.tokenizer, sample) == expected


def test_prompt_reads_as_intended(policy):
    sample = data.Sample(tuple(data.load_dataset("dots", None, "val")[:2]))
    image = "<|vision_start|>" + 9 * "<|image_pad|>" + "<|vision_end|>"
    assert policy.tokenizer.decode(data.make_prompts(policy, [sample])[0].ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Image 1: {image}\nImage 2: {image}\n"
        "How many dots are in the image? Give the value of each image and list the images from the fewest dots to the "
        'most. Reply with JSON only: [{"image_id": <id>, "value": <number>}, ...]<|im_end|>\n<|im_start|>assistant\n'
    )


def test_a_question_cannot_smuggle_image_tokens(policy):
    task = data.Task("odd", "What is <|image_pad|>?", "from low to high", 1)
    with pytest.raises(data.DataError, match="image_pad"):
        data.make_prompts(policy, [data.Sample((data.Item("a", 1, task, lambda: noise_image(56, 56)),))])


# --- references and samples ------------------------------------------------------------------------------------------


def item(name, label, task=data.DOTS):
    return data.Item(name, label, task, lambda: noise_image(56, 56))


def test_reference_answer_by_hand():
    sample = data.Sample((item("a", 7), item("b", 3), item("c", 7)))
    assert data.reference_answer(sample) == (
        '[{"image_id": 2, "value": 3}, {"image_id": 1, "value": 7}, {"image_id": 3, "value": 7}]'
    )
    scores = data.Task("score", "?", "up", delta=1, decimals=2)
    assert data.reference_answer(data.Sample((item("a", 5.4, scores),))) == '[{"image_id": 1, "value": 5.40}]'


def test_reference_answers_earn_full_marks():
    items = data.load_dataset("dots", None, "train") + data.load_dataset("dials", None, "train")
    for n in (1, 2, 4, 8):
        for sample in data.make_samples(items, n, 200):
            got = reward.compute_reward(data.reference_answer(sample), sample.labels, sample.task.delta)
            assert got == (1, 1, 1 if n > 1 else 0, 3 if n > 1 else 2)


def test_samples_have_different_labels_one_task_and_no_item_twice():
    items = data.load_dataset("dots", None, "train") + data.load_dataset("dials", None, "train")
    for sample in data.make_samples(items, 8, 300):
        assert len({i.task for i in sample.items}) == 1
        assert len({i.name for i in sample.items}) == len(set(sample.labels)) == 8


def test_labels_repeat_only_where_they_must():
    few = [item(str(i), i % 2) for i in range(6)]  # two different labels
    for sample in data.make_samples(few, 4, 50):
        assert len({i.name for i in sample.items}) == 4 and set(sample.labels) == {0, 1}


def test_min_gap_is_kept_where_possible():
    # 1..20: eight labels at a gap of 2 need 15 values, at a gap of 3 22: then at most 7 (1, 4, ..., 19) are apart.
    items = data.load_dataset("dots", None, "train")
    for gap, apart in ((2, 8), (2.5, 7), (3, 7), (19, 2), (100, 1)):
        for sample in data.make_samples(items, 8, 40, min_gap=gap):
            labels = sample.labels
            assert data.most_apart(labels, gap) >= apart
            assert len({i.name for i in sample.items}) == len(set(labels)) == 8  # the rest at least differs
    # 0, 2, 4, 6, 8 is the only choice of five from 0..8 at a gap of 2: found always, though most random beginnings block it.
    few = [item(str(i), i) for i in range(9)]
    assert all(sorted(s.labels) == [0, 2, 4, 6, 8] for s in data.make_samples(few, 5, 50, min_gap=2))
    # Tenths: 0.3 - 0.2 < 0.1 in floating point.
    tenths = [item(str(i), i * 5 / 100) for i in range(7)]  # 0, 0.05, ..., 0.3
    assert all(sorted(s.labels) == [0, 0.1, 0.2, 0.3] for s in data.make_samples(tenths, 4, 20, min_gap=0.1))
    sampler = data.Sampler(items, (4,), 20, seed=0, min_gap=4)
    assert all(min(np.diff(sorted(s.labels))) >= 4 for s in sampler.batch(0))
    assert sampler.batch(3) == sampler.batch(3)


def test_position_in_the_prompt_says_nothing_about_the_label():
    # Mean label at each place within 5 standard errors of the overall mean.
    samples = data.make_samples(data.load_dataset("dots", None, "train"), 4, 2000)
    labels = np.array([s.labels for s in samples])
    assert (abs(labels.mean(0) - labels.mean()) < 5 * labels.std() / 2000**0.5).all()


def test_sampler_is_a_pure_function_of_the_step():
    items = data.load_dataset("dots", None, "train")
    sampler, again = (data.Sampler(items, (2, 4, 8), 6, seed=3) for _ in range(2))
    forwards = [sampler.batch(step) for step in range(7)]
    assert [again.batch(step) for step in reversed(range(7))] == forwards[::-1]
    # All numbers of images take turns: each once in every three steps.
    assert [sorted(len(sampler.batch(3 * c + i)[0].items) for i in range(3)) for c in range(4)] == [[2, 4, 8]] * 4
    assert data.Sampler(items, (2, 4, 8), 6, seed=4).batch(0) != forwards[0]


def test_one_image_sampler_goes_through_epochs():
    items = [item(str(i), i) for i in range(10)]
    sampler = data.Sampler(items, (1,), 5, seed=0)
    names = [s.items[0].name for step in range(6) for s in sampler.batch(step)]
    for epoch in range(3):
        assert sorted(names[10 * epoch : 10 * epoch + 10]) == sorted(i.name for i in items)
    assert names[:10] != names[10:20]


def test_too_few_images_names_the_setting():
    with pytest.raises(data.DataError, match="8 images of one task.*lower --images"):
        data.Sampler([item(str(i), i) for i in range(5)], (2, 8), 4, seed=0)
    with pytest.raises(data.DataError, match="empty"):
        data.Sampler([], (1,), 4, seed=0)


# --- data sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dots", "dials"])
def test_splits_share_no_image_and_labels_are_the_drawings(name):
    draw = {"dots": data.draw_dots, "dials": data.draw_dials}[name]
    hashes = {}
    for split in ("train", "val", "test"):
        items = data.load_dataset(name, None, split)
        hashes[split] = [hashlib.sha256(i.image().tobytes()).digest() for i in items[:300]]
        assert len(set(hashes[split])) == len(hashes[split])
        assert all(draw(random.Random(i.name))[1] == i.label for i in items[:300])
        assert items[0].image().tobytes() == items[0].image().tobytes()
        labels = {i.label for i in items}
        assert labels == set(range(1 if name == "dots" else 0, 21))
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(hashes[a]) & set(hashes[b])


def test_dots_can_be_counted():
    """A second way to the label: connected blobs that stand out from the background."""
    from scipy import ndimage

    for i in range(30):
        image, count = data.draw_dots(random.Random(f"blobs {i}"))
        pixels = np.asarray(image, dtype=int)
        apart = np.abs(pixels - pixels[0, 0]).max(-1) > 25
        if not apart[0, 0]:
            _, found = ndimage.label(apart)
            assert found == count


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
    monkeypatch.setattr(data, "hash_split", lambda name: "train")
    items = data.load_dataset("coco", coco, "train")
    assert [(i.name, i.label) for i in items] == [
        ("val2017/a.jpg/cat", 2),
        ("val2017/a.jpg/dog", 1),
        ("val2017/b.jpg/cat", 1),  # and no dog: b has a crowd of them
        ("val2017/c.jpg/dog", 1),
    ]
    assert items[0].task.question == "How many cat instances are in the image?"
    assert items[0].task == items[2].task != items[1].task
    assert items[0].image().size == (64, 48)


def test_hash_split_is_stable_and_70_10_20():
    names = [f"{i:012d}.jpg" for i in range(20000)]
    share = {s: sum(data.hash_split(n) == s for n in names) / len(names) for s in ("train", "val", "test")}
    assert abs(share["train"] - 0.7) < 0.015 and abs(share["val"] - 0.1) < 0.015 and abs(share["test"] - 0.2) < 0.015
    assert data.hash_split("000000005001.jpg") == data.hash_split("000000005001.jpg")


def test_bad_data_is_named(coco, tmp_path):
    with pytest.raises(data.DataError, match="unknown data set 'dotz'"):
        data.load_dataset("dotz")
    with pytest.raises(data.DataError, match="unknown split"):
        data.load_dataset("dots", None, "tset")
    with pytest.raises(data.DataError, match="needs --data-root"):
        data.load_dataset("coco")
    with pytest.raises(data.DataError, match="is not a folder"):
        data.load_dataset("coco", tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="instances_"):
        data.load_dataset("coco", coco / "val2017")
    file = coco / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(data.DataError, match="instances_val2017.json is not a COCO"):
        data.load_dataset("coco", coco)
    file.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(data.DataError, match="split of coco .* is empty"):
        data.load_dataset("coco", coco)
    with pytest.raises(data.DataError, match="gone.jpg does not exist"):
        data.open_image(coco / "gone.jpg")
    (coco / "half.jpg").write_bytes((coco / "val2017" / "a.jpg").read_bytes()[:300])
    with pytest.raises(data.DataError, match="half.jpg cannot be read"):
        data.open_image(coco / "half.jpg")
    (coco / "text.jpg").write_text("hello")
    with pytest.raises(data.DataError, match="text.jpg cannot be read"):
        data.open_image(coco / "text.jpg")


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
    splits, left_out = data.read_dataset("coco", root)
    assert [(i.name, i.label, i.path.parent.name) for i in splits["test"]] == [("valrem/v.jpg/cat", 2, "val2017")]
    assert {i.path.name for i in splits["val"]} == {
        f"t{i}.jpg" for i in range(10) if data.hash_split(f"t{i}.jpg") == "val"
    }
    assert len(splits["train"]) + len(splits["val"]) == 10 and not left_out
    # One annotation file as the root: only it, divided by hash.
    splits, _ = data.read_dataset("coco", root / "instances_valrem.json")
    assert [len(splits[s]) for s in splits] == [int(data.hash_split("v.jpg") == s) for s in splits]
    # A file name in the annotations must not lead out of the data set's folder.
    (tmp_path / "secret.jpg").write_bytes((root / "val2017/v.jpg").read_bytes())
    whole = (root / "instances_valrem.json").read_text()
    for outside in ("../secret.jpg", "../../secret.jpg", str(tmp_path / "secret.jpg")):
        (root / "instances_valrem.json").write_text(whole.replace("v.jpg", outside))
        with pytest.raises(data.DataError, match=r"secret\.jpg, cat: the path leads out of "):
            data.read_dataset("coco", root)
    (root / "instances_valrem.json").write_text(whole)
    # The same images under two annotation files would stand in two splits.
    (root / "instances_val2017.json").write_text((root / "instances_valrem.json").read_text())
    with pytest.raises(data.DataError, match=r"both annotate v\.jpg"):
        data.read_dataset("coco", root)


def test_coco_counts_what_it_leaves_out(coco):
    splits, left_out = data.read_dataset("coco", coco)
    assert sum(map(len, splits.values())) == 4  # see the fixture
    assert [(out.where.split(", ", 1)[1], out.bad) for out in left_out] == [("b.jpg, dog", False)]


def make_images(root, names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(8, 8, seed=number).save(root / name)


def everything(name, root, **kwargs):
    splits, left_out = data.read_dataset(name, root, **kwargs)
    return {i.name: i for items in splits.values() for i in items}, left_out


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
    make_images(tmp_path, ["116_1_0_20170112213500903.jpg.chip.jpg"])
    with pytest.raises(data.DataError, match="listed twice, and first at: .*116_1_0"):
        data.load_dataset("utkface", tmp_path)


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
        data.load_dataset("ava", tmp_path)
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
    splits, left_out = data.read_dataset("ava", tmp_path, skip_bad=True)
    assert {s: [i.name for i in items] for s, items in splits.items()} == {
        "train": ["953619"],
        "val": [],
        "test": ["953958"],
    }
    assert [out.where[-6:] for out in left_out if out.why == "stands in no list file"] == ["line 3"]
    # One's own lists go before AVA's; without a list of train, train is what is in no list.
    (tmp_path / "test.txt").write_text("954184.jpg\n")
    (tmp_path / "aesthetics_image_lists/generic_ls_train.jpgl").unlink()
    splits, _ = data.read_dataset("ava", tmp_path, skip_bad=True)
    assert {s: [i.name for i in items] for s, items in splits.items()} == {
        "train": ["953619", "953958"],
        "val": [],
        "test": ["954184"],
    }
    with pytest.raises(data.DataError, match="val split of ava .* is empty"):
        data.load_dataset("ava", tmp_path, "val", skip_bad=True)
    (tmp_path / "val.txt").write_text("954184.jpg\n")
    with pytest.raises(data.DataError, match=r"954184\.jpg is in the lists of val and test"):
        data.read_dataset("ava", tmp_path, skip_bad=True)
    (tmp_path / "val.txt").unlink()
    (tmp_path / "test.txt").write_text("954184.jpg 5.7\n")
    with pytest.raises(data.DataError, match="no image .* one name or id a line"):
        data.read_dataset("ava", tmp_path, skip_bad=True)


TABLE = [
    {"path": "a b/ä 1.jpg", "label": "1", "split": "train", "group": "sharp"},
    {"path": "a b/ä 1.jpg", "label": "2.5", "split": "train", "group": "bright"},  # one image, two questions
    {"path": "./c.png", "label": "5", "split": "test", "group": "sharp"},
    {"path": "d.jpg", "label": "4.5", "split": "val", "group": "bright"},
]


def write_table(root, kind, rows):
    root.mkdir(exist_ok=True)
    if kind == "jsonl":
        (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
        (root / "labels.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")  # as spreadsheets write it
    return root


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_with_splits_and_groups(tmp_path, kind):
    """delta is a quarter of the range of a group's labels: sharp (5 - 1) / 4 = 1, bright (4.5 - 2.5) / 4 = 0.5."""
    root = write_table(tmp_path, kind, TABLE)
    make_images(root, {row["path"]: 0 for row in TABLE})
    splits, left_out = data.read_dataset(kind, root)
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
    assert data.read_dataset(kind, root / f"labels.{kind}")[0]["val"][0].name == "d.jpg/bright"
    (root / f"labels.{kind}").rename(root / f"x.{kind}")
    (root / f"y.{kind}").write_text("")
    with pytest.raises(data.DataError, match=f"holds 2 .{kind} files"):
        data.load_dataset(kind, root)


def test_own_question_order_delta_decimals(tmp_path):
    root = write_table(tmp_path, "csv", TABLE)
    make_images(root, {row["path"]: 0 for row in TABLE})
    overrides = {"question": "How {group} is it, up to {high}?", "order": "by {group}", "delta": 3.0, "decimals": 2}
    items = data.load_dataset("csv", root, "train", overrides)
    assert items[0].task == data.Task("rating sharp", "How sharp is it, up to 5.00?", "by sharp", 3.0, 2)
    # The same question for all: the groups still stand apart.
    items = data.load_dataset("csv", root, "train", {"question": "How good?", "order": None, "delta": 1, "decimals": 0})
    assert items[0].task.question == items[1].task.question and items[0].task != items[1].task
    assert data.load_dataset("dots", None, "val", {"delta": 2.0})[0].task.delta == 2
    for wrong, text in (({"delta": 0}, "--delta 0"), ({"delta": float("nan")}, "--delta nan"), ({"decimals": -1}, "--decimals"),
                        ({"question": " "}, "must not be empty"), ({"dleta": 1}, "dleta")):  # fmt: skip
        with pytest.raises(data.DataError, match=text):
            data.load_dataset("dots", None, "val", wrong)
    write_table(root, "csv", [{"path": "d.jpg", "label": 2}])
    with pytest.raises(data.DataError, match="all labels are 2, so delta is unknown: set --delta"):
        data.read_dataset("csv", root)
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
        (["gone.jpg", 3], "the image file does not exist: .*gone.jpg"),
        (["", 3], "has no path"),
        (["a.jpg", ""], "has no label"),
        (["a.jpg", "nan"], "not a finite number: 'nan'"),
        (["a.jpg", "1e999"], "not a finite number"),
        (["a.jpg", "old"], "not a finite number: 'old'"),
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
            data.read_dataset(kind, root)
        items, left_out = everything(kind, root, skip_bad=True)
        assert list(items) == ["a.jpg", "b.jpg"] and [out.bad for out in left_out] == [True]
    file.write_text(good.rstrip("\n") + ('\n{"path": "a.jpg"' if kind == "jsonl" else "\nc, d.jpg,3\n"))
    with pytest.raises(data.DataError, match=f"line {number}: .*(JSON object|more columns)"):
        data.read_dataset(kind, root)
    # A link that the user made is the user's to make.
    (root / "linked").symlink_to(tmp_path)
    write_table(root, kind, [{"path": "linked/secret.jpg", "label": 1}, {"path": "b.jpg", "label": 2}])
    assert everything(kind, root)[0]["linked/secret.jpg"].image().size == (8, 8)
    write_table(
        root, kind, [{"path": "a.jpg", "label": 1, "split": "valid"}, {"path": "b.jpg", "label": 2, "split": "train"}]
    )
    with pytest.raises(data.DataError, match="the split is none of train, val, test: 'valid'"):
        data.read_dataset(kind, root)
    file.write_bytes("path,label\nä.jpg,1".encode("latin-1"))
    with pytest.raises(data.DataError, match="is not UTF-8"):
        data.read_dataset(kind, root)
    file.write_text("")
    if kind == "csv":
        with pytest.raises(data.DataError, match="must begin with a line path,label"):
            data.read_dataset(kind, root)
    else:
        with pytest.raises(data.DataError, match="is empty"):
            data.load_dataset(kind, root)


def test_folder_per_label(tmp_path):
    make_images(tmp_path, ["1/a.jpg", "1/b.jpg", "2.5/a.jpg", "-3/deep/c.png"])
    items, _ = everything("folder", tmp_path)
    assert {n: i.label for n, i in items.items()} == {"1/a.jpg": 1, "1/b.jpg": 1, "2.5/a.jpg": 2.5, "-3/deep/c.png": -3}
    assert items["1/a.jpg"].task.delta == pytest.approx((2.5 + 3) / 4, abs=0.01) and items["1/a.jpg"].task.decimals == 1
    for wrong, text in (("unrated/d.jpg", "'unrated'"), ("nan/d.jpg", "'nan'"), ("d.jpg", "in no folder")):
        make_images(tmp_path, [wrong])
        with pytest.raises(data.DataError, match=f"{wrong}: .*{text}"):
            data.load_dataset("folder", tmp_path)
        assert everything("folder", tmp_path, skip_bad=True)[0].keys() == items.keys()
        (tmp_path / wrong).unlink()
    make_images(tmp_path / "parted", ["train/1/a.jpg", "test/2/b.jpg", "val/3/c.jpg"])
    splits, _ = data.read_dataset("folder", tmp_path / "parted")
    assert {s: [i.label for i in items] for s, items in splits.items()} == {"train": [1], "test": [2], "val": [3]}


@pytest.mark.parametrize("name", ["utkface", "coco", "ava", "csv", "jsonl", "folder"])
def test_empty_folders_are_refused(tmp_path, name):
    with pytest.raises(data.DataError, match=str(tmp_path)):
        data.load_dataset(name, tmp_path)
    with pytest.raises(data.DataError, match="is not a folder"):
        data.load_dataset(name, tmp_path / "gone")


def test_adding_images_moves_none_between_splits(tmp_path):
    make_images(tmp_path, [f"{i % 5}/{i}.png" for i in range(40)])
    before, _ = data.read_dataset("folder", tmp_path)
    make_images(tmp_path, [f"{i % 5}/{i}.png" for i in range(40, 80)])
    after, _ = data.read_dataset("folder", tmp_path)
    for split in data.SPLITS:
        assert {i.name for i in before[split]} <= {i.name for i in after[split]}
    assert sum(map(len, after.values())) == 80
    # Fixed for ever: the SHA-1 of a5.jpg ... a9.jpg, as a number, ends in 0, 1, 9, 2, 7.
    assert [data.hash_split(f"a{i}.jpg") for i in range(5, 10)] == ["train", "train", "test", "train", "val"]


# --- image files -----------------------------------------------------------------------------------------------------


def saved(tmp_path, image, name="x.png", **kwargs):
    image.save(tmp_path / name, **kwargs)
    return np.asarray(data.open_image(tmp_path / name)).astype(int)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    # 65535 -> 255, 32768 -> 127.5, 257 -> 1, 0 -> 0: value / 257
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name in ("x.png", "x.tif"):
        got = saved(tmp_path, Image.fromarray(grey), name)
        assert got[0, :, 0].tolist() == [0, 1, 128, 255] and (got == got[:, :, :1]).all()
    (tmp_path / "x.pgm").write_bytes(b"P5 4 1 65535\n" + grey.astype(">u2").tobytes())  # Pillow: mode I
    assert np.asarray(data.open_image(tmp_path / "x.pgm"))[0, :, 0].tolist() == [0, 1, 128, 255]
    for odd in (np.full((2, 2), 70000, np.int32), np.full((2, 2), 0.5, np.float32)):
        with pytest.raises(data.DataError, match=r"x\.tif cannot be read .*no known range"):
            saved(tmp_path, Image.fromarray(odd), "x.tif")


def test_transparency_is_laid_on_white_as_transformers_does(tmp_path):
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    red.putpixel((1, 0), (255, 0, 0, 51))  # 20 % red on white: 255 - 0.2 * 255 = 204
    got = saved(tmp_path, red)
    assert got.tolist() == [[[255, 0, 0], [255, 204, 204]], [[255, 255, 255], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert saved(tmp_path, grey).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert saved(tmp_path, palette).tolist() == [[[0, 0, 255], [0, 255, 0]]]
    assert saved(tmp_path, palette, transparency=1).tolist() == [[[0, 0, 255], [255, 255, 255]]]
    assert saved(tmp_path, palette, "x.gif").tolist() == [[[0, 0, 255], [0, 255, 0]]]
    for mode in ("RGBA", "LA", "P", "L", "1", "RGB"):
        image = Image.merge("RGBA", [noise_image(9, 7, c).getchannel(0) for c in range(4)]).convert(mode)
        image.save(tmp_path / "y.png")
        expected = convert_to_rgb(Image.open(tmp_path / "y.png"), return_numpy=True)
        assert np.array_equal(np.asarray(data.open_image(tmp_path / "y.png")), expected)


def test_cmyk_and_exif(tmp_path):
    # 100 % yellow, no other ink
    assert saved(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 255, 0)), "x.jpg")[4, 4].tolist() == pytest.approx(
        [255, 255, 0], abs=3
    )
    # Orientation 6: the camera stood on its side, turn by 90 degrees clockwise. The left half, red, comes to the top.
    lying = Image.new("RGB", (16, 8), "blue")
    lying.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    got = saved(tmp_path, lying, "x.png", exif=exif)
    assert got.shape == (16, 8, 3) and got[0, 4].tolist() == [255, 0, 0] and got[15, 4].tolist() == [0, 0, 255]


def test_sizes(tmp_path):
    processor = Qwen2VLImageProcessorPil()
    for size in ((1, 1), (1, 200), (10_000, 50)):  # 200 times as long is the processor's limit
        path = tmp_path / f"{size[0]} x {size[1]} größe.png"
        noise_image(*size).save(path)
        data.image_patches(data.open_image(path), processor)
    for size in ((1, 201), (10_000, 49)):
        noise_image(*size).save(tmp_path / "long.png")
        with pytest.raises(data.DataError, match=r"long\.png has .* more than 200 times as long"):
            data.open_image(tmp_path / "long.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    for limit in (10_000, None):  # just within; switched off by the user
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        data.open_image(tmp_path / "bomb.png")
    for limit in (9_999, 6_000, 4_999):  # Pillow itself raises only from twice the limit on
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(data.DataError, match=r"image file .*bomb\.png"):
            data.open_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on broken tags
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "tif", "bmp", "ppm"])
def test_broken_files_are_named(tmp_path, ending):
    """Cut short at many places and with bytes spoiled: an image or a DataError with the file's name, nothing else."""
    path = tmp_path / f"half.{ending}"
    exif = {"exif": data.Image.Exif()} if ending in ("jpg", "png", "webp") else {}
    noise_image(40, 30).save(path, **exif)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(60):
        broken = bytearray(whole[: rng.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(8 if trial % 2 == 0 else 0):
            broken[rng.randrange(min(200, len(broken)))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            assert data.open_image(path).mode == "RGB"
        except data.DataError as error:
            refused += 1
            assert f"half.{ending}" in str(error)
    assert refused >= 20


def test_postscript_is_never_run(tmp_path):
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(data.DataError, match=r"a\.jpg cannot be read .*cannot identify"):
        data.open_image(tmp_path / "a.jpg")


def test_skip_bad_opens_every_image_and_counts(tmp_path, capsys):
    make_images(tmp_path, [f"train/{i}/a.jpg" for i in range(4)] + ["test/1/a.jpg"])
    (tmp_path / "train/2/a.jpg").write_bytes((tmp_path / "train/2/a.jpg").read_bytes()[:200])
    items = data.load_dataset("folder", tmp_path)  # files are there, nothing is opened
    assert len(items) == 4
    with pytest.raises(data.DataError, match="2/a.jpg cannot be read"):
        [i.image() for i in items]
    train, test = data.load_splits("folder", tmp_path, ("train", "test"), skip_bad=True)
    assert [i.label for i in train] == [0, 1, 3] and len(test) == 1
    assert "left out 1\n  1 x image cannot be used" in capsys.readouterr().err
    assert [i.label for i in data.load_dataset("folder", tmp_path, "train", skip_bad=True)] == [0, 1, 3]


# --- looking at it ---------------------------------------------------------------------------------------------------


def test_duplicates_across_splits_are_found(tmp_path):
    make_images(tmp_path, ["train/1/a.png", "train/1/b.png", "test/2/c.png", "val/2/d.png"])
    (tmp_path / "test/2/copy of a.png").write_bytes((tmp_path / "train/1/a.png").read_bytes())
    (tmp_path / "train/1/copy of b.png").write_bytes((tmp_path / "train/1/b.png").read_bytes())  # same split: no leak
    same_size = bytearray((tmp_path / "val/2/d.png").read_bytes())
    same_size[-1] ^= 1
    (tmp_path / "train/1/same size.png").write_bytes(same_size)
    (group,) = data.duplicates(data.read_dataset("folder", tmp_path)[0])
    assert [(s, p.relative_to(tmp_path).as_posix()) for s, p in group] == [
        ("test", "test/2/copy of a.png"),
        ("train", "train/1/a.png"),
    ]


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
    assert data.format_histogram([1, 1, 1, 1, 3], width=4) == "  1       4 ####\n  3       1 #"
    # 100 different values in 4 bins of 25, the last with 50 more
    lines = data.format_histogram([*range(100), *(99 for _ in range(50))], bins=4, width=30).split("\n")
    assert [line.split()[-2:] for line in lines] == [["25", 10 * "#"]] * 3 + [["75", 30 * "#"]]
