"""Items, samples, prompts: what the policy is shown must be what the label is about, and nothing of the test set."""

import copy
import dataclasses
import os
import random
import re

import numpy as np
import pytest
import torch
from small_data import item, noise_image
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import rarl
import reward
from support.datasets import drawings, load_dataset


class Processor(Qwen2_5_VLProcessor):
    """transformers' own processor, less the demand for a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, *args):
        return None


def tokenizers(policy):
    found = [policy.tokenizer]
    if folder := os.environ.get("RARL_QWEN_TOKENIZER"):
        found.append(AutoTokenizer.from_pretrained(folder))
    return found


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(84, 84), (28, 28), (1, 1), (300, 200), (201, 299), (640, 480), (30, 1500), (57, 1999), (3000, 17)]
)
@pytest.mark.parametrize(
    "limits, mean",
    [((56 * 56, 28 * 28 * 1280), [0.48145466, 0.4578275, 0.40821073]), ((56 * 56, 112 * 112), [0.5] * 3)],
)
def test_patches_equal_transformers_processor_exactly(size, limits, mean):
    theirs = Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits[0], "longest_edge": limits[1]}, image_mean=mean, image_std=[0.3, 0.1, 0.7]
    )
    image = noise_image(*size)
    expected = theirs(images=[image], return_tensors="pt")
    patches, grid = data.image_patches(image, theirs)
    assert patches.dtype == np.uint8 and patches.shape[1] == 588
    floats = rarl.float_patches(torch.from_numpy(patches), rarl.color_levels(theirs), theirs.temporal_patch_size)
    assert floats.dtype == torch.float32 and torch.equal(floats, expected.pixel_values)
    assert [list(grid)] == expected.image_grid_thw.tolist()


def test_too_long_images_are_refused():
    with pytest.raises(data.DataError, match="200 times as long"):
        data.image_patches(noise_image(1, 201), Qwen2VLImageProcessorPil())


def test_prompt_equals_transformers_processor_token_for_token(policy):
    items = load_dataset("dials", None, "test")
    wide = data.Item("wide", 3, drawings.DIALS, lambda: noise_image(150, 90))
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
            embed = policy.model.model.visual.patch_embed
            assert torch.equal(rarl.float_patches(prompt.pixels, embed.levels, 2), expected.pixel_values)
            assert torch.equal(embed(prompt.pixels), embed([expected.pixel_values]))  # either may be given to it
            assert torch.equal(prompt.grid, expected.image_grid_thw)


def test_chat_text_is_what_a_template_for_images_writes(policy):
    sample = data.Sample(tuple(load_dataset("dots", None, "val")[:2]))
    parts = [
        p
        for i in (1, 2)
        for p in ({"type": "text", "text": f"Image {i}: "}, {"type": "image"}, {"type": "text", "text": "\n"})
    ]
    parts.append({"type": "text", "text": data.question_text(drawings.DOTS, 2)})
    expected = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert data.chat_text(policy.tokenizer, sample) == expected


@pytest.mark.parametrize("field", ["question", "order"])
@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|im_end|>", "<tool_call>"])
def test_a_question_cannot_smuggle_what_the_tokenizer_takes_for_a_mark(policy, field, mark):
    """Whatever was added to the tokenizer, also where it is not spelled <|...|>. What only looks like one is text."""
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.add_tokens("<tool_call>", special_tokens=True)

    def asked(text):
        task = dataclasses.replace(drawings.DOTS, **{field: text})
        return data.chat_text(tokenizer, data.Sample((data.Item("a", 1, task, None),) * 2))

    with pytest.raises(data.DataError, match=rf"must not contain {re.escape(mark)}, a mark of the tokenizer's own"):
        asked(f"x {mark}?")
    assert "<think> a < b | c > d?" in asked("<think> a < b | c > d?")


# --- references and samples ------------------------------------------------------------------------------------------


def test_reference_answer_by_hand():
    sample = data.Sample((item("a", 7), item("b", 3), item("c", 7)))
    assert data.reference_answer(sample) == (
        '[{"image_id": 2, "value": 3}, {"image_id": 1, "value": 7}, {"image_id": 3, "value": 7}]'
    )
    scores = data.Task("score", "?", "up", delta=1, decimals=2)
    assert data.reference_answer(data.Sample((item("a", 5.4, scores),))) == '[{"image_id": 1, "value": 5.40}]'


def test_reference_answers_earn_full_marks():
    items = load_dataset("dots", None, "train") + load_dataset("dials", None, "train")
    for n in (1, 2, 4, 8):
        for sample in data.make_samples(items, n, 200):
            got = reward.compute_reward(data.reference_answer(sample), sample.labels, sample.task.delta)
            assert got == (1, 1, 1 if n > 1 else 0, 3 if n > 1 else 2)


def test_samples_have_different_labels_one_task_and_no_item_twice():
    items = load_dataset("dots", None, "train") + load_dataset("dials", None, "train")
    for sample in data.make_samples(items, 8, 300):
        assert len({i.task for i in sample.items}) == 1
        assert len({i.name for i in sample.items}) == len(set(sample.labels)) == 8


def test_labels_repeat_only_where_they_must():
    few = [item(str(i), i % 2) for i in range(6)]  # two different labels
    for sample in data.make_samples(few, 4, 50):
        assert len({i.name for i in sample.items}) == 4 and set(sample.labels) == {0, 1}


def test_prompts_without_a_comparable_pair_are_drawn_only_where_no_other_can_be():
    """Task `same` has one label, `rare` has 499 ones and a single 2: found by luck in 64 draws, but not always."""
    same, rare = (data.Task(name, "?", "up", 1) for name in ("same", "rare"))
    items = [item(f"same {i}", 5, same) for i in range(500)]
    items += [item(f"rare {i}", 1, rare) for i in range(499)] + [item("two", 2, rare)]
    for sample in data.make_samples(items, 2, 100):
        assert set(sample.labels) == {1, 2} and len({i.name for i in sample.items}) == 2
    assert all(s.task == same for s in data.make_samples(items[:500], 2, 5))  # no other can be drawn
    assert {s.task for s in data.make_samples(items, 1, 1000)} == {same, rare}  # one image has no pair to compare


def test_position_in_the_prompt_says_nothing_about_the_label():
    # Mean label at each place within 5 standard errors of the overall mean.
    samples = data.make_samples(load_dataset("dots", None, "train"), 4, 2000)
    labels = np.array([s.labels for s in samples])
    assert (abs(labels.mean(0) - labels.mean()) < 5 * labels.std() / 2000**0.5).all()


def test_sampler_is_a_pure_function_of_the_step():
    items = load_dataset("dots", None, "train")
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


def test_a_pool_is_looked_through_once_however_often_it_is_drawn_from():
    """All labels alike but the last: each prompt of two gets the odd one, and only the first draw looks for it."""
    pool = data.Pool(item(str(i), float(i == 20_000)) for i in range(20_001))
    rng = random.Random(0)
    assert sorted(data.draw_sample({drawings.DOTS: pool}, 2, rng).labels) == [0, 1]
    found = pool.with_other_labels(0.0)
    assert [x.name for x in found] == ["20000"] and pool.with_other_labels(0.0) is found
