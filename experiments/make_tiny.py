"""Makes tiny/, the embedded policy: a Qwen2.5-VL of 1.9 M parameters that stands in for the pretrained model.

    python -m experiments.make_tiny            # about an hour on one CPU core; writes tiny/ anew
    python -m experiments.make_tiny --out X    # elsewhere
    python -m experiments.make_tiny --data utkface --data-root /data/utkface --out runs/tiny-faces

RARL starts from a pretrained vision-language model: it sees well, it speaks JSON, and its numbers are poor. tiny/ is made to
be just that, in a size that a laptop trains in minutes, and it is honest to say how (lessons.py):

  eyes        The vision tower learns to see dots and needles by exact labels, through a linear head of its own.
  sorting     The language model learns the answer format, which value belongs to which image, and to sort up to eight images,
              by imitation of exact lists. (What was never learned cannot be brought out. Qwen has learned to sort lists, too.)
  bad habits  It then imitates a *bad* teacher, whose values are coarse and noisy, and only a fifth of whose lists are sorted.

So the policy answers in valid JSON, is right about the rough size of a number, and hardly ever sorts when it takes the most
likely token. That it *could* do better is what reinforcement learning is there to bring out. An examination at the end
shows whether there is something to bring out. A lesson that was interrupted goes on where it was.

With --data the same lessons are about a data set of files (subjects.py): its train split alone, moved and mirrored for the eyes, which
end as they were when they erred least on the val split. They begin with tiny/, which can sort and tell images apart, so they take
fewer steps. The eyes' head is kept beside the policy (eyes.safetensors): what it says is the most that the policy can know.

The architecture is transformers' own Qwen2_5_VLForConditionalGeneration, with Qwen's image processor, special tokens,
pre-tokenizer (digits one by one) and style of chat template; only the sizes are ours.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import rarl
from experiments.ceiling import EYES
from experiments.commands import CommandError, at_least, check_writable, run_command
from experiments.lessons import Eyes, Seen, examine, teach_bad_habits, teach_eyes, teach_lists
from experiments.runs import ROOT
from experiments.subjects import IMAGES, drawn_subjects, file_subjects
from support.datasets.readers import READERS
from support.run.atomic_files import write_text
from support.run.settings import flag

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUMBERS = {  # setting -> default for drawings, for files; least; what it is
    "eyes_steps": (4500, 3000, 1, "steps that teach the vision tower"),
    "eyes_batch": (32, 64, 1, "pictures in each of them"),
    "rotated_steps": (600, 300, 1, "steps of exact lists that are rotated"),
    "sorted_steps": (2400, 1500, 1, "and that are sorted"),
    "habits_steps": (600, 300, 1, "steps of bad lists"),
    "pictures": (8192, 8192, 64, "pictures of each task for the lists, at most"),
    "max_pixels": (224 * 224, 84 * 84, 56 * 56, "larger pictures are shrunk to this area"),
}
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


def build_processor(max_pixels: int) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": max_pixels})


def build_policy(max_pixels: int = 224 * 224) -> rarl.Policy:
    """The untaught policy, for tests and for what follows."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([item for subject in drawn_subjects() for item in subject.fresh(0, 100)])
    return rarl.Policy(build_model(tokenizer).eval(), tokenizer, build_processor(max_pixels))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises CommandError."""
    parser = argparse.ArgumentParser(
        prog="experiments.make_tiny", description="Make a small policy: tiny/ anew, or one for a data set.", allow_abbrev=False
    )  # fmt: skip
    out_text = "folder to write (default without --data: tiny); OUT.lessons is beside it meanwhile"
    parser.add_argument("--out", help=out_text)
    parser.add_argument("--data", choices=list(READERS), help="data set of files (default: drawn dots and dials)")
    parser.add_argument("--data-root", help="its folder")
    for name, (drawn, files, least, what) in NUMBERS.items():
        usual = f"{drawn}; with --data: {files}" if files != drawn else drawn
        parser.add_argument(flag(name), type=at_least(least), help=f"{what} (default: {usual})")
    args = parser.parse_args(argv)
    for name, (drawn, files, *_) in NUMBERS.items():
        if getattr(args, name) is None:
            setattr(args, name, files if args.data else drawn)
    if args.data_root and not args.data:
        raise CommandError("--data-root goes with --data: drawings have no files")
    if args.out is None and args.data:
        raise CommandError("--data needs --out, the folder to write: tiny/ is the policy for drawings")
    args.out = "tiny" if args.out is None else args.out
    if not args.out:
        raise CommandError("--out must name a folder")
    return args


def make(argv: list[str] | None) -> None:
    """Raises CommandError, DataError, OSError."""
    args = parse(argv)
    subjects = drawn_subjects()
    if args.data:
        subjects = file_subjects(args.data, args.data_root, build_processor(args.max_pixels))
    out = Path(args.out)
    check_writable(out / "config.json", "--out")
    lessons = out.with_name(out.name + ".lessons")
    lessons.mkdir(exist_ok=True)
    settings, begun = {k: v for k, v in vars(args).items() if k != "out"}, lessons / "settings.json"
    if begun.is_file() and begun.read_text(encoding="utf-8") != json.dumps(settings):
        raise CommandError(f"{lessons} holds lessons of other settings ({begun.name}): give the same, or delete it")
    write_text(begun, json.dumps(settings))
    if args.data:
        policy = rarl.load_policy(ROOT / "tiny", torch.device("cpu"), torch.float32)
        policy.image_processor.size = build_processor(args.max_pixels).size
    else:
        policy = build_policy(args.max_pixels)
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(policy.tokenizer)} tokens")
    eyes = Eyes(policy, subjects)
    teach_eyes(eyes, args.eyes_steps, lessons / "eyes.pt", args.eyes_batch)
    policy.model.model.visual.requires_grad_(False)  # the eyes stay as they are
    seen = Seen(policy, subjects, args.pictures)
    teach_lists(policy, seen, "rotated", args.rotated_steps, lessons / "rotated.pt", lr=2e-3)
    teach_lists(policy, seen, "sorted", args.sorted_steps, lessons / "sorted.pt", lr=2e-3)
    teach_bad_habits(policy, seen, args.habits_steps, lessons / "habits.pt")
    out.mkdir(exist_ok=True)
    eyes.save(out / EYES)  # before the policy, which makes all weights in its folder as readable as its config
    rarl.save_policy(rarl.cast_copy(policy, torch.bfloat16), out)
    shutil.rmtree(lessons)
    size = sum(f.stat().st_size for f in out.iterdir())
    table, wrong = examine(policy, seen)
    print(f"wrote {out}/ ({size / 1e6:.1f} MB)\n\nExamination:\n\n{table}\n")
    print(*(wrong or ["passed"]), sep="\n")


def main(argv: list[str] | None = None) -> None:
    run_command("experiments.make_tiny", lambda: make(argv))


if __name__ == "__main__":
    main()
