"""support/show/model_card.py: what a run says of itself at its end."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from runs import ROOT

import data
import eval as evaluation
import rarl
from support.datasets import load_dataset
from support.learner import lora
from support.run.settings import Settings
from support.show.model_card import what_was_learned, write_model_card

RESULTS = {
    "base": {1: {"n": 9, "valid": 0.25, "mae": 3.0}, 2: {"n": 9, "valid": 1.0, "mae": 3.5, "tau": 0.1}},
    "stage 1": {1: {"n": 9, "valid": 1.0, "mae": 1.0}, 2: {"n": 9, "valid": 1.0, "mae": 2.0, "tau": math.nan}},
    "stage 2": {1: {"n": 9, "valid": 1.0, "mae": 0.5}, 2: {"n": 9, "valid": 1.0, "mae": 0.75, "tau": 0.9}},
    "best constant by MAE": {
        1: {"n": 9, "valid": 1.0, "mae": 5.0, "constant": 10.0},
        2: {"n": 9, "valid": 1.0, "mae": 5.25},
    },
    "prompt order": {2: {"n": 9, "valid": 1.0, "tau": -0.02}},
}


def test_sentences_by_hand():
    said = what_was_learned(RESULTS)
    for part in ("mean error of the values went from 3.00 / 3.50 to 0.50 / 0.75", "the best constant errs by 5.00 / 5.25",
                 "Tau of the order went from - / 0.10 to - / 0.90", "the order of the prompt has - / -0.02", "0.25 / 1.00 of base's"):  # fmt: skip
        assert part in said
    alone = what_was_learned({name: {1: row[1]} for name, row in RESULTS.items() if 1 in row})
    assert alone.startswith("From base to stage 2, with 1 image in a prompt: the mean error") and "Tau" not in alone


def test_card_says_task_results_and_settings(tmp_path):
    write_model_card(tmp_path, "stage 1", Settings(seed=5, images=(2,)), load_dataset("dots"), RESULTS)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\n") and "base_model: tiny" in text and "> How many dots are in the image?" in text
    assert "    --images 2\n" in text and "    --seed 5\n" in text
    assert "stage 1" in text and "stage 2" not in text and "best constant by MAE" in text
    assert json.dumps({"image_id": 2, "value": 17}) in text


@pytest.mark.parametrize("adapted", [False, True])
def test_the_cards_program_gives_the_answer_that_was_evaluated(here, adapted):
    """What a user of transformers alone gets, or of peft, is what eval.py gets."""
    folder = Path("runs/rarl/stage1")
    policy = rarl.load_policy(ROOT / "tiny")
    rarl.save_policy(policy, folder)  # in float32, as training does
    if adapted:
        rarl.save_policy(policy, "base")
        policy = rarl.load_policy("base")
        lora.add_lora(policy.model, 4, 8, "language", torch.Generator().manual_seed(0))
        for number, layer in enumerate(lora.lora_layers(policy.model).values()):
            layer.B.data = 0.05 * torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(number))
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
        lora.save_adapter(policy.model, folder)
    items = load_dataset("dots")
    write_model_card(folder, "stage 1", Settings(), items, RESULTS)
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    for item in items[:3]:
        item.image().save("photo.png")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {})
        (expected,) = evaluation.answer_greedily(policy, [data.Sample((item,))], 1, 64)
        assert printed.getvalue().strip() == expected and '"value"' in expected
