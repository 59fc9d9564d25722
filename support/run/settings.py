"""The settings of a training run: one flat block, presets for real data, reading and checking them, and what may change
when a run is resumed."""

import argparse
import dataclasses
import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpo
import rmo


class SettingError(ValueError):
    """A setting that cannot work, or a run folder that cannot be used; the message says what to do."""


def setting(default, text: str, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class Settings:
    """The defaults are those of the embedded run. What the paper states is marked [paper]; the rest is our choice.

    A `title` begins a group of `--help`; what is asked for most comes first.
    """

    # fmt: off
    model: str = setting("tiny", "policy to start from: a Hugging Face folder or hub id; tiny is the embedded one", title="the run")
    data: str = setting("dots", "data set, see data.py")
    data_root: str | None = setting(None, "folder of the data set")
    name: str = setting("rarl", "results go to runs/NAME; an earlier run of that name is moved aside")
    resume: bool = setting(False, "go on from the newest sound checkpoint of runs/NAME")
    stage: int | None = setting(None, "run only this stage; 2 starts from runs/NAME/stage1 (default: both)", choices=(1, 2))
    seed: int = setting(0, "seed of the batches, the sampled answers and RMO")
    steps1: int = setting(40, "rollouts of stage 1 (regression, one image); 0 skips the stage")
    steps2: int = setting(100, "rollouts of stage 2 (joint, several images); 0 skips the stage")
    batch_size: int = setting(16, "prompts in a step, over all processes [paper: batch size 64]")
    group_size: int = setting(8, "G, answers to each prompt")
    images: tuple[int, ...] = setting((1, 2, 4, 8), "numbers of images in a prompt of stage 2, in turn [paper's data: 1, 2, 4, 8]")

    question: str | None = setting(None, "what is asked about the images (default: the task's, see data.py)", title="the task and its images")
    order: str | None = setting(None, 'how to say "lowest first", e.g. "from the youngest to the oldest"')
    decimals: int | None = setting(None, "decimals of a value in the reference answer")
    columns: str | None = setting(None, "of parquet files: image=COLUMN,label=COLUMN (default: found by their names)")
    skip_bad: bool = setting(False, "leave out unreadable images and bad rows, and say how many, in the place of refusing them")
    balance: bool = setting(True, "draw rare labels more often, where images come from files (README, choice 9)")
    max_pixels: int | None = setting(None, "larger images are shrunk to this area; 784 pixels are a token (default: the model's)")

    delta: float | None = setting(None, "tolerance of R_reg in label units (default: the task's, see data.py)", title="reward")
    w_reg: float = setting(1.0, "weight of R_reg")
    w_rank: float = setting(1.0, "weight of R_rank (stage 2; stage 1 has no order to judge)")
    w_format: float = setting(1.0, "weight of R_format")

    rmo_k: int = setting(1, "answers of a group that RMO replaces; 0 switches it off", title="RMO")
    rmo_probability: float = setting(0.5, "that a homogeneous and poor group is mutated")
    rmo_source: str = setting("truth", "the ground truth, or an answer made of the best earlier values for those images", choices=("truth", "history"))
    rmo_spread: float = setting(rmo.SPREAD, "homogeneous: the rewards' std is at most this share of the best possible reward")
    rmo_poor: float = setting(rmo.POOR, "poor: the best reward is at most this share of the best possible reward")

    lr: float = setting(3e-4, "peak learning rate of AdamW [paper: 1e-6, for Qwen2.5-VL]", title="GRPO")
    warmup: int = setting(10, "steps of linear warm-up; afterwards a linear decay to a tenth of the peak")
    beta: float = setting(grpo.BETA, "weight of the KL to the policy that the stage began with; 0 drops its forward pass too")
    temperature: float = setting(1.0, "temperature of sampling; the update scores the same distribution")
    max_new_tokens: int = setting(0, "longest answer in tokens; 0: the longest reference answer and some slack")
    updates: int = setting(1, "optimiser steps per rollout; from the second on the ratio is off-policy")
    clip: float = setting(0.2, "epsilon: the ratio is clipped to 1 - clip and 1 + clip (matters with several --updates)")
    normalize: str = setting("sequence", "loss: mean over answers of token means, or mean over all tokens", choices=("sequence", "token"))

    lora_rank: int = setting(0, "train adapters of this rank, not the weights: for one GPU; 0 trains all weights", title="LoRA")
    lora_alpha: float = setting(32.0, "an adapter's product is scaled by alpha / rank")
    lora_targets: str = setting("language", "the model's parts whose linear layers all get an adapter", choices=("language", "language+vision"))

    device: str = setting("auto", "auto: a GPU if there is one", title="machine and memory", choices=("auto", "cpu", "cuda"))
    rollout_batch: int = setting(
        64, "prompts of a process that are encoded and decoded together: bounds the memory of rollout and evaluation; 0: the most that fit the GPU")
    max_tokens_per_forward: int = setting(
        32768, "packed tokens (prompts and their answers) in one forward of the update: bounds its memory; 0: the most that fit the GPU")
    activation_checkpointing: bool = setting(False, "keep only each layer's input, run it again in the backward: less memory, a third slower")
    freeze_vision: bool = setting(False, "leave the vision tower as it is; its features are then computed once a step")
    offload: bool = setting(False, "Adam's moments in host memory: 8 bytes per parameter less on the GPU (one process)")
    workers: int = setting(1, "threads that read and resize the images of the next two steps; 0: none")

    checkpoint_every: int = setting(50, "steps between checkpoints", title="checkpoints, validation, evaluation, pictures")
    validate_every: int = setting(25, "steps between validations on the val split, which choose the policy that a stage ends with; 0: none, it ends with its last")
    val_samples: int = setting(20, "validation prompts for each number of images of the stage")
    eval_samples: int = setting(200, "test prompts for each number of images")
    watch_every: int = setting(24, "steps between pictures: a group of answers for each number of images, the curves so far; 0: none")
    track: str | None = setting(None, "also send the metrics to this tracker; its package must be installed", choices=("tensorboard", "wandb"))
    # fmt: on


# For a real backbone. The paper states AdamW, lr 1e-6, batch size 64, two stages, up to 8 images; ours is all the rest, such as
# the numbers of steps and the pixels. Model and data root are the user's to give.
FULL_SIZE = {"model": None, "data_root": None, "lr": 1e-6, "batch_size": 64, "images": (1, 2, 4, 8), "steps1": 500, "steps2": 500,
         "warmup": 10, "max_pixels": 448 * 448, "workers": 4, "activation_checkpointing": True, "val_samples": 100, "eval_samples": 500,
         "rollout_batch": 8, "max_tokens_per_forward": 16384}  # fmt: skip
PRESETS = {
    name: FULL_SIZE | {"data": name, "name": name}
    for name in ("utkface", "coco", "ava", "csv", "jsonl", "folder", "parquet")
}


# Settings of the machine. They change numbers by rounding at most, so a resumed run may have others; the name is
# that of the folder, which may have been renamed.
MACHINE = {
    "name", "resume", "device", "workers", "checkpoint_every",
    "rollout_batch", "max_tokens_per_forward", "activation_checkpointing", "watch_every", "track",
    "offload",
}  # fmt: skip


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def number(kind: Callable[[str], Any], low: float = -math.inf) -> Callable[[str], Any]:
    """For a parser: an int or a float, not below `low`. Python itself reads 1_0 as 10."""

    def read(text: str) -> Any:
        if "_" in text:
            raise ValueError
        if kind(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return kind(text)

    read.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid whole number value: 'x'"
    return read


def make_parser() -> argparse.ArgumentParser:
    """A flag for each setting. The result holds what was typed and nothing else, so that a preset can fill in the rest."""
    parser = argparse.ArgumentParser(
        description="Train a vision-language policy with RARL.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # --image for --images would be a guess
    )
    preset = "defaults for a real backbone on this kind of data"
    for f in dataclasses.fields(Settings):
        if title := f.metadata.get("title"):
            group = parser.add_argument_group(title)
        if f.name == "model":
            group.add_argument("--preset", choices=PRESETS, help=preset)
        kind: Any = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type  # "int | None" is an int
        how: dict[str, Any]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind == tuple[int, ...]:
            how = {"type": number(int), "nargs": "+"}
        else:
            how = {"type": kind if kind is str else number(kind), "choices": f.metadata.get("choices")}
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = f.metadata["help"] + ("" if default is None else f" (default: {default})")
        group.add_argument(flag(f.name), help=text.replace("%", "%%"), **how)
    return parser


def parse_settings(argv: list[str] | None = None, needed: tuple[str, ...] = ("model", "data_root")) -> Settings:
    """Defaults, then the preset, then what was typed; of a resumed run, its own. Raises SettingError.

    needed  what must be given with a preset, which does not know it
    """
    typed = vars(make_parser().parse_args(argv))
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    preset = typed.pop("preset", None)
    values = dataclasses.asdict(Settings()) | PRESETS.get(preset, {}) | typed
    check_name(values["name"])
    if values["resume"]:
        run = Path("runs") / values["name"]
        if (run / "settings.json").is_file():
            values = resumed_settings(run, {"data": preset} | typed if preset else typed)
        elif run.is_dir() and any(file.suffix != ".writing" for file in run.iterdir()):
            raise SettingError(f"--resume: {run} has no settings.json: put it back, or start without --resume")
        else:
            print(f"--resume: nothing is saved in {run} yet, so the run starts", file=sys.stderr)
            values["resume"] = False
    for name in needed:
        if preset and values[name] is None:
            raise SettingError(f"--preset {preset} needs {flag(name)}")
    settings = Settings(**values)
    check_settings(settings)
    return settings


def read_settings(file: Path) -> dict[str, Any]:
    """What a run was started with. Raises SettingError, which names the file, if it is damaged."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        saved["images"] = tuple(saved["images"])
        if odd := ", ".join(sorted(saved.keys() ^ dataclasses.asdict(Settings()).keys())):
            raise ValueError(f"it differs in {odd}")
        check_settings(Settings(**saved))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{file} is damaged or of another version of this program ({error}): restore it, or start without --resume"
        ) from None
    return saved


def resumed_settings(run: Path, typed: dict[str, Any]) -> dict[str, Any]:
    """A resumed run is the same run: its settings are those it was started with, but for those of the machine.

    After a stop by bad steps a smaller --lr is allowed too: nothing else would end them.
    """
    saved = read_settings(run / "settings.json")
    free = set(MACHINE)
    if (run / "bad_steps").is_dir() and typed.get("lr", math.inf) < saved["lr"]:
        free.add("lr")
    for name in sorted(typed.keys() - free):
        if saved[name] != typed[name]:
            old, new = (" ".join(map(str, x)) if isinstance(x, tuple) else x for x in (saved[name], typed[name]))
            raise SettingError(f"--resume: the run in {run} has {flag(name)} {old}, not {new}: leave it out")
    return saved | {name: typed[name] for name in typed.keys() & free} | {"name": run.name, "resume": True}


def comparable(s: Settings) -> dict:
    """The settings that make a run what it is, without those of the machine."""
    return {name: value for name, value in dataclasses.asdict(s).items() if name not in MACHINE}


def check_name(name: str) -> None:
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\") or len(name.encode()) > 200:
        raise SettingError(f"--name {name[:80]!r} must be a plain folder name")


def check_settings(s: Settings) -> None:
    """Raise SettingError for the first value that cannot work."""
    at_least_1 = ("batch_size", "updates", "checkpoint_every", "val_samples", "eval_samples")
    not_negative = ("w_reg", "w_rank", "w_format", "rmo_spread", "warmup", "beta", "max_new_tokens", "workers", "validate_every", "watch_every", "lora_rank", "rollout_batch", "max_tokens_per_forward")  # fmt: skip
    positive = ("lr", "temperature", "lora_alpha")
    rules = [
        *((name, getattr(s, name) >= 1, "must be at least 1") for name in at_least_1),
        *((name, 0 <= getattr(s, name) < math.inf, "must be finite and not negative") for name in not_negative),
        *((name, 0 < getattr(s, name) < math.inf, "must be positive and finite") for name in positive),
        ("group_size", s.group_size >= 2, "must be at least 2: a group of one has no spread, so no advantage"),
        ("steps1", s.steps1 >= (s.stage == 1), "must not be negative, and not 0 with --stage 1"),
        ("steps2", s.steps2 >= (s.stage == 2), "must not be negative, and not 0 with --stage 2"),
        ("images", all(n >= 1 for n in s.images), "must be numbers of images, each at least 1"),
        ("max_pixels", s.max_pixels is None or s.max_pixels >= 56 * 56, "must be at least 3136 (56 x 56 pixels)"),
        ("delta", s.delta is None or 0 < s.delta < math.inf, "must be positive and finite"),
        ("w_reg", s.w_reg + s.w_format > 0, "and --w-format are both 0: stage 1 would have nothing to reward"),
        ("rmo_k", 0 <= s.rmo_k < s.group_size, "must be from 0 to group_size - 1, to leave an answer for contrast"),
        ("rmo_probability", 0 <= s.rmo_probability <= 1, "must be from 0 to 1"),
        ("rmo_poor", 0 <= s.rmo_poor <= 1, "must be from 0 to 1"),
        ("clip", 0 <= s.clip <= 1, "must be from 0 to 1"),
        ("offload", not (s.offload and s.lora_rank), "is of no use with --lora-rank: adapters have few moments"),
        ("freeze_vision", "vision" not in s.lora_targets or not s.freeze_vision, "goes with --lora-targets language"),
    ]
    for name, ok, what in rules:
        if not ok:
            raise SettingError(f"{flag(name)} {getattr(s, name)} {what}")
