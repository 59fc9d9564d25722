"""Qwen2.5-VL-3B as published, with random weights and cut to 2 text layers and 2 vision blocks: real widths, vocabulary and
tokenizer. Runs where the environment variable RARL_QWEN_TOKENIZER names a folder with Qwen2.5's tokenizer. It takes 4 GB
and a minute of one core."""

import os

import pytest
import torch
from transformers import AutoTokenizer

import data
import rarl
from experiments import full_size, usual_way
from support.datasets import load_dataset
from support.datasets.drawings import DOTS
from support.learner import lora

FOLDER = os.environ.get("RARL_QWEN_TOKENIZER")
pytestmark = pytest.mark.skipif(not FOLDER, reason="RARL_QWEN_TOKENIZER names no folder")
T = 8


@pytest.fixture(scope="module")
def wide_policy():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    torch.manual_seed(0)
    wide = full_size.random_policy("3b", tokenizer=tokenizer, layers=2, blocks=2)
    with torch.no_grad():
        # As published, logits would be nearly alike at first, and tokens would hardly depend on the prompt.
        for name, p in wide.model.named_parameters():
            if "norm" not in name:
                p.mul_(2)
    assert wide.banned.sum() > 0 and not wide.banned[wide.eos_id]
    return wide


@pytest.fixture(scope="module")
def prompts(wide_policy):
    """1, 2, 4 and 8 images in a prompt, of different sizes: some of several attention windows."""
    items = load_dataset("dots", None, "test")
    sizes = [(84, 84), (196, 140), (112, 224), (56, 168), (140, 84), (28, 112), (84, 56), (168, 168)]
    resized = [
        data.Item(f"{i}", 3, DOTS, lambda i=i, size=size: items[i].image().resize(size)) for i, size in enumerate(sizes)
    ]
    return data.make_prompts(wide_policy, [data.Sample(tuple(resized[:n])) for n in (1, 2, 4, 8)])


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_greedy_tokens_and_log_probs_are_those_of_transformers(wide_policy, prompts, adapted):
    if adapted:
        lora.add_lora(wide_policy, 8, 16, "language+vision", torch.Generator().manual_seed(0))
        for layer in lora.lora_layers(wide_policy).values():
            layer.B.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    rollout = rarl.generate(wide_policy, prompts, 1, T, temperature=0)
    ours, _ = rarl.logprobs(wide_policy, prompts, rollout.ids, rollout.mask)
    torch.testing.assert_close(ours, rollout.logp, atol=1e-5, rtol=1e-5)
    if adapted:
        with lora.adapters_off(wide_policy):
            base, _ = rarl.logprobs(wide_policy, prompts, rollout.ids, rollout.mask)
        assert (ours - base).abs().max() > 0.1
        lora.merge(wide_policy)  # transformers gets plain linear layers
    with usual_way.transformers_alone(wide_policy):
        inputs = usual_way.repeat_inputs(wide_policy, prompts, 1)
        width = inputs["input_ids"].shape[1]
        sampled = wide_policy.model.generate(**inputs, do_sample=False, max_new_tokens=T)[:, width:]
        theirs, _ = usual_way.usual_logprobs(wide_policy, prompts, rollout.ids, rollout.mask)
    for row, (answer, mask) in enumerate(zip(rollout.ids, rollout.mask, strict=True)):
        assert sampled[row][: mask.sum()].tolist() == answer[mask].tolist()
    assert len({tuple(answer.tolist()) for answer in rollout.ids}) == len(prompts)  # they do depend on the prompt
    torch.testing.assert_close(ours[rollout.mask], theirs[rollout.mask], atol=1e-5, rtol=1e-5)
