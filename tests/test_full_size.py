"""experiments/full_size.py: as large as the published models, and a folder that loads like theirs."""

from functools import partial

import pytest
import torch

import rarl
from experiments import full_size

PUBLISHED = {"3b": 7_509_245_952, "7b": 16_584_333_312}  # total_size of model.safetensors.index.json, in bf16


@pytest.mark.parametrize("shape", PUBLISHED)
def test_as_large_as_published(shape):
    policy = full_size.random_policy(shape, "meta", torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in policy.parameters()) == PUBLISHED[shape]


def test_the_folder_loads(here, monkeypatch, capsys):
    """Narrow, with one layer and one block: the full ones take 17 GB and minutes."""
    narrow = dict(hidden_size=256, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, vocab_size=512)
    monkeypatch.setitem(full_size.SHAPES, "3b", full_size.SHAPES["3b"] | narrow)
    monkeypatch.setattr(full_size, "random_policy", partial(full_size.random_policy, layers=1, blocks=1))
    with pytest.raises(SystemExit) as end:
        full_size.main(["--out", "random"])
    assert end.value.code is None and "wrote random/" in capsys.readouterr().out
    policy = rarl.load_policy("random", dtype=torch.bfloat16)
    assert policy.model.config.text_config.num_hidden_layers == len(policy.model.model.visual.blocks) == 1
    assert policy.model.config.dtype == torch.bfloat16


def test_a_tokenizer_that_is_not_there_is_named(here, capsys):
    with pytest.raises(SystemExit):
        full_size.main(["--out", "random", "--tokenizer", "./nowhere"])
    assert "--tokenizer ./nowhere" in capsys.readouterr().err
