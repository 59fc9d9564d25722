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
