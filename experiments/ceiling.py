"""What the eyes of a small policy see: the head that make_tiny kept beside it says a value for each image, asked like a policy."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import rarl
from experiments.lessons import see
from experiments.subjects import median
from support.datasets import load_splits

EYES = "eyes.safetensors"  # "TASK.weight" (V, C), "TASK.bias" (V,) and "TASK.values" (V,), see lessons.Eyes


@cache
def ceiling(model: str, name: str, root: str, images: tuple[int, ...], count: int) -> list[dict]:
    """Predictions (eval.judge) of the eyes for the test prompts that train.py draws; [] for a policy without such a head.

    The values are the medians of what the head says, the lists their order: what a policy would answer that writes down all that it
    sees. Raises DataError, ModelError.
    """
    file = Path(model) / EYES
    if not file.is_file():
        return []
    parts, policy = load_file(file), rarl.load_policy(model)
    (items,) = load_splits(name, root, ("test",))
    samples = [sample for n in images for sample in data.make_samples(items, n, count)]
    shown = list({item.name: item for sample in samples for item in sample.items}.values())
    said: dict[str, str] = {}
    for i in range(0, len(shown), 64):
        some = shown[i : i + 64]
        with torch.no_grad():
            features, _ = see(policy, some)  # (image tokens, C) each
        for item, of_one in zip(some, features, strict=True):
            weight, bias, values = (parts[f"{item.task.name}.{part}"] for part in ("weight", "bias", "values"))
            value = median(values, of_one.mean(0) @ weight.T + bias)
            said[item.name] = data.format_value(float(value), item.task.decimals)
    entries = [[(i, said[item.name]) for i, item in enumerate(sample.items, start=1)] for sample in samples]
    texts = [data.format_answer(sorted(of_one, key=lambda entry: float(entry[1]))) for of_one in entries]
    return [evaluation.judge(sample, text) for sample, text in zip(samples, texts, strict=True)]
