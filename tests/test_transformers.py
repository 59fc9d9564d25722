"""Before another version of transformers is taken: does what the code relies on still hold?

python -m pytest tests/test_transformers.py
"""

import runpy
import sys
import types

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration as Backbone

import data
import rarl
from support.datasets import load_dataset

NAMES = {  # modules and what is read of them, by rarl.py, lora.py, the learner and the memory plan
    "lm_head": "weight",
    "model": "get_rope_index",
    "model.language_model": "layers embed_tokens norm rotary_emb",
    "model.language_model.norm": "weight variance_epsilon",
    "model.language_model.layers.0": "self_attn mlp input_layernorm post_attention_layernorm",
    "model.language_model.layers.0.self_attn": "q_proj k_proj v_proj o_proj",
    "model.visual": "blocks merger patch_embed spatial_merge_size",
    "model.visual.patch_embed": "proj temporal_patch_size",
}


def test_what_is_relied_on_still_holds(policy_folder, monkeypatch):
    policy = rarl.load_policy(policy_folder)
    model = policy.model
    for module, names in NAMES.items():
        missing = [name for name in names.split() if not hasattr(model.get_submodule(module), name)]
        assert not missing, f"names: {module} has no {missing}"

    # Weights are loaded into a model on the device "meta": what is not in the file, transformers has to compute afterwards.
    fresh = dict(Backbone(model.config.__class__.from_dict(model.config.to_dict())).named_buffers())
    for name, buffer in model.named_buffers():
        assert name.endswith("levels") or torch.equal(buffer, fresh[name]), (
            f"buffers: {name} is not what it is when made anew"
        )

    dots = load_dataset("dots", None, "test")
    prompt = data.make_prompts(policy, [data.Sample(tuple(dots[:3]))])[0]
    images = (prompt.ids == model.config.image_token_id).int()[None]
    theirs, _ = model.model.get_rope_index(prompt.ids[None], images, image_grid_thw=prompt.grid)
    ours = rarl.rope_positions(prompt.ids, prompt.grid, model.config.image_token_id, 2)
    assert torch.equal(ours, theirs[:, 0]), "positions: they are not those of get_rope_index"

    called = []
    for name in ("packed_attention", "window_attention"):
        honest = getattr(rarl, name)
        spy = lambda *args, honest=honest, **kwargs: called.append((honest, args, kwargs)) or honest(*args, **kwargs)
        for key, function in rarl.AttentionInterface._global_mapping.items():
            if function is honest:
                monkeypatch.setitem(rarl.AttentionInterface._global_mapping, key, spy)
    with torch.no_grad():
        rarl.logprobs(policy, [prompt], prompt.ids[None, :4], torch.ones(1, 4, dtype=torch.bool))
    text = [args[4] for function, args, _ in called if function is rarl.packed_attention]
    windows = [kwargs for function, _, kwargs in called if function is rarl.window_attention]
    assert len(text) == len(model.model.language_model.layers), (
        "attention: a decoder layer does not call the registered one"
    )
    assert all(isinstance(mask, rarl.Packing) for mask in text), (
        "attention: the packing does not arrive in the mask's place"
    )
    assert len(windows) == len(model.model.visual.blocks), "attention: a vision block calls it once a window"
    assert all({"cu_seq_lens_q", "max_length_q"} <= kwargs.keys() for kwargs in windows), (
        "attention: no windows' bounds"
    )


def test_another_version_is_named(monkeypatch):
    other = types.ModuleType("transformers")
    other.__version__ = "4.1"
    monkeypatch.setitem(sys.modules, "transformers", other)
    with pytest.raises(ImportError, match="transformers 4.1 is not a version for rarl.py .*: see requirements.txt"):
        runpy.run_path(rarl.__file__)
