"""Makes tiny/, the embedded policy: a Qwen2.5-VL of 1.9 M parameters that stands in for the pretrained model.

    python -m experiments.make_tiny            # 20 minutes on 2 CPU cores; writes tiny/ anew
    python -m experiments.make_tiny --out X    # elsewhere

RARL starts from a pretrained vision-language model: it sees well, it speaks JSON, and its numbers are poor. tiny/ is made to
be just that, in a size that a laptop trains in minutes, and it is honest to say how:

  eyes    The vision tower learns to see dots and needles, by exact labels, through a linear head that is thrown away
          afterwards. (Qwen's tower has seen billions of images; this one has seen 256,000 drawings.)
  mouth   The language model learns the answer format for 1 to 8 images by imitation of *bad* teachers: their values
          are coarse (rounded to 3, 8, 13, 18) and noisy (up to 4 off, any error as likely), and in half of their
          lists the order has nothing to do with the values. First lesson: those lists are in random order, from which
          to learn which image a value belongs to; second lesson: in the prompt's order, from which to learn to name
          every image once.

So the policy answers in valid JSON, is right about the rough size of a number, and lists the images in the order of the
prompt. That it *could* do better, since its eyes are good and some lists that it imitated were sorted, is what
reinforcement learning is there to bring out.

The architecture is transformers' own Qwen2_5_VLForConditionalGeneration, with Qwen's image processor, special tokens,
pre-tokenizer (digits one by one) and style of chat template; only the sizes are ours.
"""

import support.quiet_end  # isort: skip  # noqa: F401

import argparse
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import rarl
from experiments.commands import CommandError, check_writable, run_command
from support.drawings import drawn_item

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGES = (1, 2, 4, 8)


def build_tokenizer(items: list[data.Item], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen's manner, trained on the prompts and answers that the policy will meet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["You are a helpful assistant.", "system", "user", "assistant"]
    for n in IMAGES:
        for sample in data.make_samples(items, n, 50):
            corpus += [data.question_text(sample.task, n), data.reference_answer(sample), f"Image {n}: "]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights in Qwen2.5-VL's own classes: window attention and all, 32-dimensional heads, tied embeddings."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            depth=4, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=128,
            window_size=112, fullatt_block_indexes=[1, 3], patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
        ),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def fresh_items(name: str, start: int, count: int) -> list[data.Item]:
    """Drawings of a stream of their own ('dots/tiny/...'): the policy is never taught an image of train, val or test."""
    return [drawn_item(name, f"{name}/tiny/{i}") for i in range(start, start + count)]


def optimizer_and_schedule(groups: list[dict], steps: int):
    """AdamW, 100 steps of warm-up, cosine decay to zero."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    factor = lambda step: min((step + 1) / 100, 1) * (1 + math.cos(math.pi * step / steps)) / 2  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def teach_eyes(policy: rarl.Policy, steps: int, batch_size: int = 64, lr: float = 2e-3) -> None:
    """The vision tower regresses exact labels from the mean of an image's tokens, through a linear head."""
    visual = policy.model.model.visual
    head = nn.Linear(policy.model.config.text_config.hidden_size, 2)
    optimizer, schedule = optimizer_and_schedule(
        [{"params": [*visual.parameters(), *head.parameters()], "lr": lr}], steps
    )
    progress = tqdm(range(steps), desc="eyes", mininterval=5)
    for step in progress:
        half = batch_size // 2
        items = [i for name in ("dots", "dials") for i in fresh_items(name, step * half, half)]
        patches, grids = zip(*(data.image_patches(i.image(), policy.image_processor) for i in items), strict=True)
        features = policy.model.model.get_image_features(
            torch.cat([torch.from_numpy(p) for p in patches]), torch.tensor(grids)
        )
        said = head(torch.stack(features.pooler_output).mean(1))  # (batch, 2)
        said = torch.where(torch.arange(batch_size) < half, said[:, 0], said[:, 1]) * 6 + 10
        truth = torch.tensor([i.label for i in items], dtype=torch.float32)
        loss = F.smooth_l1_loss(said, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            error = (said - truth).abs().detach()
            progress.set_postfix(mae_dots=f"{error[:half].mean():.2f}", mae_dials=f"{error[half:].mean():.2f}")


def bad_teacher(sample: data.Sample, rng: random.Random, shuffled: bool) -> str:
    """An answer in perfect format with coarse, noisy values; every other list has no order, or that of the prompt."""

    def said(label: float) -> int:
        coarse = min(5 * (int(label) // 5) + 3, 18)  # 3, 8, 13, 18
        return min(20, max(0, coarse + rng.randint(-4, 4)))

    entries = [(said(label), i) for i, label in enumerate(sample.labels, start=1)]
    if rng.random() < 0.5:
        entries.sort()
    elif shuffled:
        rng.shuffle(entries)
    return data.format_answer((i, str(value)) for value, i in entries)


def teach_mouth(policy: rarl.Policy, steps: int, shuffled: bool, lr: float, answers: int = 4) -> None:
    """Imitation: cross-entropy of several bad answers to each prompt, by the same packed forward that RL uses.

    shuffled  first lesson, lists in random order: only attention to the right image can tell its value.
              Second lesson, in the prompt's order: easy to get complete, so that the format holds for 8 images too.
    """
    policy.model.model.visual.requires_grad_(False)  # the eyes stay as they are
    language = [p for p in policy.parameters() if p.requires_grad]
    optimizer, schedule = optimizer_and_schedule([{"params": language, "lr": lr}], steps)
    progress = tqdm(range(steps), desc="mouth", mininterval=5)
    nlls: dict[int, float] = {}
    for step in progress:
        rng = random.Random(f"mouth {shuffled} {step}")
        n = IMAGES[step % len(IMAGES)]
        pools = {}
        for name in ("dots", "dials"):
            items = fresh_items(name, rng.randrange(10**9), 160)
            pools[items[0].task] = items
        samples = [data.draw_sample(pools, n, rng) for _ in range(max(6, 32 // n))]
        rows = rarl.encode(policy, [bad_teacher(s, rng, shuffled) for s in samples for _ in range(answers)])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=policy.eos_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        logp, _ = rarl.logprobs(policy, data.make_prompts(policy, samples), ids, mask)
        loss = -logp.sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language, 1.0)
        optimizer.step()
        schedule.step()
        nlls[n] = 0.9 * nlls.get(n, loss.item()) + 0.1 * loss.item()
        if step % 25 == 0:
            progress.set_postfix({f"nll@{n}": f"{x:.4f}" for n, x in nlls.items()})
    policy.requires_grad_(True)


def build_policy(seed: int = 0) -> rarl.Policy:
    """The untaught policy, for tests and for what follows."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer([i for name in ("dots", "dials") for i in fresh_items(name, 0, 100)])
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 224 * 224})
    return rarl.Policy(build_model(tokenizer).eval(), tokenizer, processor)


def make(argv: list[str] | None) -> None:
    """Raises CommandError, OSError."""
    parser = argparse.ArgumentParser(
        prog="experiments.make_tiny", description="Make the embedded policy tiny/ anew.", allow_abbrev=False
    )
    parser.add_argument("--out", default="tiny", help="folder to write (default: tiny)")
    parser.add_argument("--eyes-steps", type=int, default=4000, help="steps that teach the vision tower")
    parser.add_argument("--mouth-steps", type=int, nargs=2, default=(2400, 1200), help="steps of the two lessons")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    args = parser.parse_args(argv)
    if min(args.eyes_steps, *args.mouth_steps) < 1:
        raise CommandError("--eyes-steps and --mouth-steps must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise CommandError(f"--seed {args.seed} must be from 0 to 2^63 - 1")
    if not args.out:
        raise CommandError("--out must name a folder")
    check_writable(Path(args.out) / "config.json", "--out")
    policy = build_policy(args.seed)
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(policy.tokenizer)} tokens")
    teach_eyes(policy, args.eyes_steps)
    teach_mouth(policy, args.mouth_steps[0], shuffled=True, lr=2e-3)
    teach_mouth(policy, args.mouth_steps[1], shuffled=False, lr=1e-3)
    rarl.save_policy(rarl.cast_copy(policy, torch.bfloat16), args.out)
    size = sum(f.stat().st_size for f in Path(args.out).iterdir())
    print(f"wrote {args.out}/ ({size / 1e6:.1f} MB)")


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.make_tiny", lambda: make(argv))


if __name__ == "__main__":
    main()
