"""What a run says at its end: a few sentences on what was learned, and a model card beside the weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

from data import IMAGE, Item, question_text
from support.learner import lora
from support.run.atomic_files import write_text
from support.run.settings import Settings, comparable, flag
from support.show.results import Results, format_number, results_table

CARD = Template("""---
library_name: transformers
pipeline_tag: image-text-to-text
base_model: $base
tags: [rarl, grpo, ordinal-regression, ranking]
---

# $data, $name of RARL

A Qwen2.5-VL trained by ranking-aware reinforcement learning (RARL, arXiv 2601.20585) to answer, for one or several images,
with a JSON list `[{"image_id": 2, "value": 17}, {"image_id": 1, "value": 23}]` in ranked order, lowest first.

## Task

$questions

Data: $data, $images training images. The exact question, the order, the tolerance and the decimals are in `task.json`.

## Results

On the test split, greedy answers, $prompts prompts at most for each number of images. The last rows of each block are policies that look at no image.

```
$results
```

## Settings

Trained for $length. All but these settings are the defaults of train.py:

$settings

## Use

With $needs:

```python
${imports}from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

folder = "$folder"
$load
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

photos = processor([Image.open("photo.png").convert("RGB")], return_tensors="pt")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": $content}], add_generation_prompt=True, tokenize=False
)
for grid in photos["image_grid_thw"]:  # each image's mark becomes as many as it has tokens
    prompt = prompt.replace("<|image_pad|>", "<|mark|>" * (int(grid.prod()) // 4), 1)
tokens = tokenizer(prompt.replace("<|mark|>", "<|image_pad|>"), add_special_tokens=False, return_tensors="pt")
tokens["mm_token_type_ids"] = (tokens["input_ids"] == model.config.image_token_id).int()  # where the images are
answer = model.generate(**tokens, **photos, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
```

With the code that trained it: `python eval.py --model $folder --rank PHOTOS`.
""")


def what_was_learned(results: Results) -> str:
    """How far values and order came from the first policy to the last, what a blind one would get, and how many answers
    that rests on.  results: rows of policies, and those of results.blind_rows
    """
    policies = [name for name in results if name == "base" or name.startswith("stage")]
    first, last, numbers = policies[0], policies[-1], sorted(results[policies[-1]])

    def shown(name: str, metric: str) -> str:
        rows = results.get(name, {})
        return " / ".join(format_number(rows.get(n, {}).get(metric), 2) for n in numbers)

    images, order = "1 image", ""
    if numbers != [1]:
        images = f"{' / '.join(map(str, numbers))} images"
        order = (
            f" Tau of the order went from {shown(first, 'tau')} to {shown(last, 'tau')}; the order of the prompt has "
            f"{shown('prompt order', 'tau')}."
        )
    return (
        f"From {first} to {last}, with {images} in a prompt: the mean error of the values went from "
        f"{shown(first, 'mae')} to {shown(last, 'mae')}; the best constant errs by {shown('best constant by MAE', 'mae')}.{order} "
        f"This is of valid answers alone: {shown(first, 'valid')} of {first}'s, {shown(last, 'valid')} of {last}'s."
    )


def write_model_card(folder: Path, name: str, s: Settings, items: Sequence[Item], results: Results) -> None:
    """README.md in a saved policy's folder.  name: its row in the results.  items: what it was trained on"""
    load = "Qwen2_5_VLForConditionalGeneration.from_pretrained"
    how = dict(needs="transformers alone", imports="", load=f"model = {load}(folder)")
    if (folder / lora.CONFIG).exists():
        base = f'base = {load}("{lora.read_config(folder)["base_model_name_or_path"]}")'
        peft = f"{base}\nmodel = PeftModel.from_pretrained(base, folder)"
        how = dict(needs="transformers and peft", imports="from peft import PeftModel\n", load=peft)
    questions = sorted({item.task.question for item in items})
    more = [f"and {len(questions) - 5} more"] if len(questions) > 5 else []
    stages = [f"{s.steps1} steps with 1 image in a prompt (stage 1)"]
    if name == "stage 2":
        stages.append(f"{s.steps2} steps with {' / '.join(map(str, s.images))} images (stage 2)")
    card = CARD.substitute(
        how,
        base=s.model,
        data=s.data,
        name=name,
        questions="\n\n".join([f"> {question}" for question in questions[:5]] + more),
        images=f"{len(items):,}",
        prompts=s.eval_samples,
        results=results_table({row: x for row, x in results.items() if not row.startswith("stage") or row <= name}),
        length=" and then ".join(stages),
        settings=_changed_settings(s) or "    (none)",
        folder=folder,
        content=json.dumps(f"Image 1: {IMAGE}\n" + question_text(items[0].task, 1), ensure_ascii=False),
    )
    write_text(folder / "README.md", card)


def _changed_settings(s: Settings) -> str:
    """A line for each that is not the default, but for those of the machine."""
    shown = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value
    changed = {name: value for name, value in comparable(s).items() if value != getattr(Settings(), name)}
    return "\n".join(f"    {flag(name)} {shown(value)}" for name, value in changed.items())
