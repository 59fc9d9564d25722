"""Qwen2.5-VL in its published sizes with random weights: for what depends on the size, and not on what the weights know.

    python -m experiments.full_size --out qwen-3b                                        # 7.5 GB; the tokenizer is tiny's
    python -m experiments.full_size --out qwen-3b --tokenizer Qwen/Qwen2.5-VL-3B-Instruct    # or a folder that holds one
    python train.py --preset utkface --model qwen-3b --data-root /data/utkface --lora-rank 16

With it a run is rehearsed before the weights are there: loading, memory, a step, a checkpoint, `--resume`, `eval.py`. docs/memory.md
says what came out. bench.py measures speed on it.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import rarl
from experiments import make_tiny
from experiments.commands import CommandError, check_writable, run_command

SHAPES: dict[str, dict[str, int]] = {  # config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064),
}  # fmt: skip


def random_policy(
    shape: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, tokenizer: Any = None,
    layers: int | None = None, blocks: int | None = None,
) -> rarl.Policy:  # fmt: skip
    """The published architecture of `shape`. Image processor and chat template are tiny's, which are Qwen's in short.

    tokenizer  Qwen2.5's; None: tiny's, which has a few hundred tokens
    layers     of text, blocks  of vision: fewer than published
    """
    small, sizes = make_tiny.build_policy(), SHAPES[shape]
    if tokenizer is None:
        tokenizer = small.tokenizer
    tokenizer.chat_template = small.tokenizer.chat_template
    number, depth = tokenizer.convert_tokens_to_ids, blocks or 32
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **sizes | {"num_hidden_layers": layers or sizes["num_hidden_layers"]}, max_position_embeddings=128000,
            rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=dict(
            depth=depth, fullatt_block_indexes=[7, 15, 23, 31] if blocks is None else [depth - 1], hidden_size=1280,
            intermediate_size=3420, num_heads=16, out_hidden_size=sizes["hidden_size"], window_size=112, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2,
        ),
        tie_word_embeddings=shape == "3b", image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    return rarl.Policy(model.eval(), tokenizer, small.image_processor)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="experiments.full_size", description="Write Qwen2.5-VL with random bf16 weights as a Hugging Face folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="the published size")
    parser.add_argument("--tokenizer", help="folder or hub id with Qwen2.5's tokenizer; None is tiny's")
    parser.add_argument("--out", required=True, help="folder to write")
    return parser.parse_args(argv)


def make(argv: list[str] | None) -> None:
    """Raises CommandError, OSError."""
    args = parse(argv)
    check_writable(Path(args.out) / "config.json", "--out")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
    except (OSError, ValueError) as error:
        raise CommandError(f"--tokenizer {args.tokenizer} cannot be read ({error})") from None
    torch.manual_seed(0)
    policy = random_policy(args.shape, dtype=torch.bfloat16, tokenizer=tokenizer)
    rarl.save_policy(policy, args.out, shard_size="4GB")  # in files as the hub has them
    print(f"wrote {args.out}/: {sum(p.numel() for p in policy.parameters()) / 1e9:.2f} B random parameters in bf16")


def main(argv: list[str] | None = None) -> None:
    hint = "the weights take 7.5 GB (3b) or 16.6 GB (7b)"
    run_command("experiments.full_size", lambda: make(argv), out_of_memory=hint)


if __name__ == "__main__":
    main()
