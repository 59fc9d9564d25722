"""What a run says at its end: a few sentences on what was learned, and a model card beside the weights."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from data import IMAGE, Item, question_text
from support.learner import lora
from support.run.atomic_files import write_text
from support.run.settings import MACHINE, Settings, flag
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

BLIND_VALUE, BLIND_ORDER = "best constant by MAE", "prompt order"  # rows of results.blind_rows


def what_was_learned(results: Results) -> str:
    """How far values and order came from the first policy to the last, what a blind one would get, and how many answers
    that rests on.

    results: rows of policies, the first and the last of them are compared, and those of results.blind_rows.
    """
    policies = [name for name in results if name == "base" or name.startswith("stage")]
    first, last = policies[0], policies[-1]
    numbers = sorted(results[last])
    errors, blind = (_change(results, names, "mae", numbers) for names in ((first, last), (BLIND_VALUE,)))
    said = [
        f"From {first} to {last}, the mean error of the values went from {errors[0]} to {errors[1]} at "
        f"{' / '.join(map(str, numbers))} image{'s' * (numbers != [1])} in a prompt; the best constant errs by {blind[0]}."
    ]
    several = [n for n in numbers if n > 1]
    if several:
        taus, blind = (_change(results, names, "tau", several) for names in ((first, last), (BLIND_ORDER,)))
        said.append(
            f"Tau of the order went from {taus[0]} to {taus[1]} at {' / '.join(map(str, several))} images; "
            f"the order of the prompt has {blind[0]}."
        )
    valid = _change(results, (first, last), "valid", numbers, ".0%")
    said.append(f"This is of valid answers alone: {valid[0]} of {first}'s answers, {valid[1]} of {last}'s.")
    return " ".join(said)


def _change(results: Results, names: tuple[str, ...], metric: str, numbers: list[int], form: str = "") -> list[str]:
    shown = lambda x: format(x, form) if form and x is not None and not math.isnan(x) else format_number(x, 2)
    return [" / ".join(shown(results.get(name, {}).get(n, {}).get(metric)) for n in numbers) for name in names]


def _how_to_load(folder: Path) -> tuple[str, str, str]:
    """What is needed, its imports, and the lines that make `model` of `folder`."""
    load = "Qwen2_5_VLForConditionalGeneration.from_pretrained"
    if not (folder / lora.CONFIG).exists():
        return "transformers alone", "", f"model = {load}(folder)"
    base = lora.read_config(folder)["base_model_name_or_path"]
    lines = f'base = {load}("{base}")\nmodel = PeftModel.from_pretrained(base, folder)'
    return "transformers and peft", "from peft import PeftModel\n", lines


def write_model_card(folder: Path, name: str, s: Settings, items: Sequence[Item], results: Results) -> None:
    """README.md in a saved policy's folder.  name: its row in the results.  items: what it was trained on"""
    questions = sorted({item.task.question for item in items})
    more = [f"and {len(questions) - 5} more"] if len(questions) > 5 else []
    stages = [f"{s.steps1} steps with 1 image in a prompt (stage 1)"]
    if name == "stage 2":
        stages.append(f"{s.steps2} steps with {' / '.join(map(str, s.images))} images (stage 2)")
    needs, imports, load = _how_to_load(folder)
    card = CARD.substitute(
        base=s.model,
        data=s.data,
        name=name,
        questions="\n\n".join([f"> {question}" for question in questions[:5]] + more),
        images=f"{len(items):,}",
        prompts=s.eval_samples,
        results=results_table(
            {row: known for row, known in results.items() if not row.startswith("stage") or row <= name}
        ),
        length=" and then ".join(stages),
        settings=_changed_settings(s) or "    (none)",
        needs=needs,
        imports=imports,
        load=load,
        folder=folder,
        content=json.dumps(f"Image 1: {IMAGE}\n" + question_text(items[0].task, 1), ensure_ascii=False),
    )
    write_text(folder / "README.md", card)


def _changed_settings(s: Settings) -> str:
    """A line for each that is not the default, but for those of the machine."""
    names = [field.name for field in dataclasses.fields(s) if field.name not in MACHINE]
    changed = {name: getattr(s, name) for name in names if getattr(s, name) != getattr(Settings(), name)}
    return "\n".join(
        f"    {flag(k)} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items()
    )
