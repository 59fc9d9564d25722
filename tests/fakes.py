"""Policies for tests that are dictionaries or functions: what they are asked and what they say is known exactly."""

import json
from types import SimpleNamespace

import torch
from PIL import Image

import data
import rarl

TASK = data.Task("dots", "How many?", "from the fewest to the most", delta=4)
COLOURS = [(25 * i, 0, 250 - 25 * i) for i in range(10)]  # one for each image of a sample


def sample(*labels, prefix="s", task=TASK):
    """Image i of a sample is one solid colour and 40 x 20 pixels."""
    items = [
        data.Item(f"{prefix}{i}", label, task, lambda c=c: Image.new("RGB", (40, 20), c))
        for i, (label, c) in enumerate(zip(labels, COLOURS, strict=False), 1)
    ]
    return data.Sample(tuple(items))


def answer(*pairs):
    return json.dumps([{"image_id": i, "value": value} for i, value in pairs])


def scripted_policy(monkeypatch):
    """A policy that says `said[name of image 1]`; `calls` records (names, max_new_tokens) of every batch."""
    fake = SimpleNamespace(said={}, calls=[])

    def generate(policy, prompts, group_size, max_new_tokens, temperature, generator):
        assert (group_size, temperature, generator) == (1, 0.0, None) and not torch.is_grad_enabled()
        fake.calls.append((prompts, max_new_tokens))
        return SimpleNamespace(ids=prompts, mask=None)

    monkeypatch.setattr(data, "make_prompts", lambda policy, samples: [s.items[0].name for s in samples])
    monkeypatch.setattr(data, "max_answer_tokens", lambda policy, samples: 100 + len(samples))
    monkeypatch.setattr(rarl, "generate", generate)
    monkeypatch.setattr(rarl, "decode", lambda policy, ids, mask: [fake.said[name] for name in ids])
    return fake


def talking_policy(monkeypatch):
    """A policy that answers a prompt by calling `say(names)`. `prompts`: names asked for, `tokens`: their limits."""
    fake = SimpleNamespace(prompts=[], tokens=[], batches=[])

    def generate(policy, prompts, group_size, max_new_tokens, temperature, generator):
        assert (group_size, temperature, generator) == (1, 0.0, None) and not torch.is_grad_enabled()
        fake.prompts += prompts
        fake.tokens.append(max_new_tokens)
        fake.batches.append(len(prompts))
        return SimpleNamespace(ids=prompts, mask=None)

    monkeypatch.setattr(data, "make_prompts", lambda policy, samples: [[i.name for i in s.items] for s in samples])
    monkeypatch.setattr(data, "max_answer_tokens", lambda policy, samples: len(data.reference_answer(samples[0])))
    monkeypatch.setattr(rarl, "generate", generate)
    monkeypatch.setattr(rarl, "decode", lambda policy, ids, mask: [fake.say(names) for names in ids])
    return fake
