"""RARL (arXiv 2601.20585): the two-stage training loop.

    python train.py                                   # both stages of the embedded default, minutes on a laptop
    torchrun train.py --stage 1                       # regression only, one image in a prompt
    torchrun train.py --stage 2                       # then everything jointly, several images; starts from stage 1
    torchrun --nproc_per_node 8 train.py --preset coco --model Qwen/Qwen2.5-VL-3B-Instruct --data-root /data/coco
    python train.py --help                            # every setting

A step reads as the algorithm (the first four in `collect`, the last two in `update`):

    rollout    G answers to each of B prompts, sampled from the policy
    reward     R_final of each answer: tolerance regression, Kendall's tau, format            reward.py
    mutate     RMO: a good answer into groups that are all alike and poor                     rmo.py
    advantage  A = (r - mean) / std within each group                                         grpo.py
    loss       clipped policy ratio, KL to the policy that the stage began with               grpo.py
    step       AdamW

Everything goes to runs/NAME/: settings.json, metrics.jsonl (one line a step, on the CPU the same to the last digit for
the same seed; the times are apart, in timing.jsonl), stage1/ and stage2/ (policies in Hugging Face layout),
predictions_*.jsonl, predictions.png, results.txt and results.json, checkpoints/ while a stage runs, and bad_steps/ if
there were any.

All that is drawn at random in a step is drawn from generators seeded by (seed, stage, step, prompt). So a step has no
random state to save, and does not depend on how many processes share it.

Several processes (torchrun): FSDP2 shards weights, gradients and optimiser; prompts are dealt to the ranks; each rank
decodes alone from a copy of the weights that is gathered once a step, so uneven answers make nobody wait inside
decoding; the loss is divided by counts over all ranks, so N processes take the step that one would.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import types
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import eval as evaluation
import grpo
import rarl
import reward
import rmo

HERE = Path(__file__).resolve().parent


class SettingError(ValueError):
    """A setting that cannot work; the message names it and says what to do."""


# --------------------------------------------------------------------------------------------------------------------
# Settings: one flat block, one help text each


def setting(default, text: str, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class Settings:
    """The defaults are those of the embedded run. What the paper states is marked [paper]; the rest is our choice."""

    # What
    model: str = setting("tiny", "policy to start from: a Hugging Face folder or hub id; tiny is the embedded one")
    data: str = setting("dots", "data set, see data.py")
    data_root: str | None = setting(None, "folder of the data set")
    name: str = setting("rarl", "results go to runs/NAME; an earlier run of that name is moved aside")
    stage: int | None = setting(
        None, "run only this stage; 2 starts from runs/NAME/stage1 (default: both)", choices=(1, 2)
    )
    resume: bool = setting(False, "go on from the newest sound checkpoint of runs/NAME")
    seed: int = setting(0, "seed of the batches, the sampled answers and RMO")
    skip_bad: bool = setting(False, "leave out unreadable images and bad rows, counted, instead of refusing them")
    question: str | None = setting(None, "what is asked about the images (default: the task's, see data.py)")
    order: str | None = setting(None, 'how to say "lowest first", e.g. "from the youngest to the oldest"')
    decimals: int | None = setting(None, "decimals of a value in the reference answer")
    min_gap: float = setting(0.0, "labels in a prompt differ by at least this, where possible")
    # How much
    steps1: int = setting(150, "rollouts of stage 1 (regression, one image); 0 skips the stage")
    steps2: int = setting(144, "rollouts of stage 2 (joint, several images); 0 skips the stage")
    batch_size: int = setting(16, "B, prompts in a step over all processes [paper: batch size 64]")
    group_size: int = setting(8, "G, answers to each prompt")
    images: tuple[int, ...] = setting(
        (1, 2, 4, 8), "numbers of images in a prompt of stage 2, in turn [paper's data: 1, 2, 4, 8]"
    )
    # Reward
    delta: float | None = setting(None, "tolerance of R_reg in label units (default: the task's, see data.py)")
    w_reg: float = setting(1.0, "weight of R_reg")
    w_rank: float = setting(1.0, "weight of R_rank (stage 2; stage 1 has no order to judge)")
    w_format: float = setting(1.0, "weight of R_format")
    # RMO
    rmo_k: int = setting(1, "answers of a group that RMO replaces; 0 switches it off")
    rmo_probability: float = setting(0.5, "that a homogeneous and poor group is mutated")
    rmo_source: str = setting(
        "truth",
        "the ground truth, or an answer made of the best earlier values for those images",
        choices=("truth", "history"),
    )
    rmo_spread: float = setting(0.05, "homogeneous: the rewards' std is at most this share of full marks")
    rmo_poor: float = setting(0.7, "poor: the best reward is at most this share of full marks")
    # GRPO
    lr: float = setting(5e-4, "peak learning rate of AdamW [paper: 1e-6, for Qwen2.5-VL]")
    warmup: int = setting(10, "steps of linear warm-up; afterwards a linear decay to a tenth of the peak")
    weight_decay: float = setting(0.0, "weight decay of AdamW")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    temperature: float = setting(1.0, "temperature of sampling; the update scores the same distribution")
    beta: float = setting(
        0.02, "weight of the KL to the policy that the stage began with; 0 drops its forward pass too"
    )
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low (matters with several updates per rollout)")
    clip_high: float = setting(0.2, "and above 1 + clip_high")
    normalize: str = setting(
        "sequence", "loss: mean over answers of token means, or mean over all tokens", choices=("sequence", "token")
    )
    updates: int = setting(1, "optimiser steps per rollout; from the second on the ratio is off-policy")
    max_new_tokens: int = setting(0, "longest answer in tokens; 0: the longest reference answer and some slack")
    # Machine
    max_pixels: int | None = setting(
        None, "larger images are shrunk to this area; 784 pixels are a token (default: the model's)"
    )
    freeze_vision: bool = setting(False, "leave the vision tower as it is; its features are then computed once a step")
    device: str = setting("auto", "auto (a GPU if there is one), cpu or cuda")
    max_tokens_per_forward: int = setting(
        32768, "packed tokens, padding too, in one forward of the update: bounds its memory"
    )
    rollout_batch: int = setting(
        64, "prompts of a process that are encoded and decoded together: bounds the rollout's memory"
    )
    activation_checkpointing: bool = setting(
        False, "keep only each layer's input, run it again in the backward: less memory, a third slower"
    )
    workers: int = setting(1, "processes that read and resize the next steps' images; 0: none")
    # Safety
    checkpoint_every: int = setting(50, "steps between checkpoints")
    keep: int = setting(2, "newest checkpoints that are kept")
    max_bad_steps: int = setting(5, "stop after this many steps in a row whose loss or gradient is not finite")
    # Evaluation
    eval_samples: int = setting(200, "test prompts for each number of images")
    eval_batch_size: int = setting(50, "test prompts at a time")


# For a real backbone. The paper states AdamW, lr 1e-6, batch size 64, two stages, up to 8 images; ours is all the rest, such as
# the numbers of steps and the pixels. Model and data root are the user's to give.
FULL_SIZE = {"model": None, "data_root": None, "lr": 1e-6, "batch_size": 64, "images": (1, 2, 4, 8), "steps1": 500, "steps2": 500,
         "warmup": 10, "max_pixels": 448 * 448, "workers": 4, "activation_checkpointing": True, "eval_samples": 500}  # fmt: skip
PRESETS = {
    name: FULL_SIZE | {"data": name, "name": name} for name in ("utkface", "coco", "ava", "csv", "jsonl", "folder")
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Without "(default: None)", where the text says what happens by default."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_settings(argv: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        description="Train a vision-language policy with RARL.",
        formatter_class=Help,
        allow_abbrev=False,  # --image for --images would be a guess
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="defaults for a real backbone on this kind of data, see PRESETS"
    )
    for f in dataclasses.fields(Settings):
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type  # "int | None" is an int if given
        how: dict[str, Any]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            many = kind == tuple[int, ...]
            how = {"type": int if many else kind, "nargs": "+" if many else None, "choices": f.metadata.get("choices")}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **how)
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))  # what is given on the command line still wins
    values = vars(parser.parse_args(argv))
    del values["preset"]
    for name in ("model", "data_root"):
        if preset and values[name] is None and not values["resume"]:  # a resumed run has its own
            raise SettingError(f"--preset {preset} needs --{name.replace('_', '-')}")
    if values["resume"]:
        words = sys.argv[1:] if argv is None else argv
        typed = {w.split("=")[0].removeprefix("--").replace("-", "_") for w in words if w.startswith("--")}
        values = resumed_settings(values, typed)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    settings = Settings(**given)
    check_settings(settings)
    return settings


def resumed_settings(values: dict, typed: set[str]) -> dict:
    """A resumed run is the same run: its settings are those it was started with.

    Settings of the machine, which change numbers by rounding at most, may be given anew; any other must be the same.
    """
    file = Path("runs") / values["name"] / "settings.json"
    if not file.is_file():
        raise SettingError(f"--resume: there is no run in {file.parent}")
    free = {
        "resume",
        "device",
        "workers",
        "checkpoint_every",
        "keep",
        "eval_batch_size",
        "max_bad_steps",
        "rollout_batch",
    }
    saved = json.loads(file.read_text())
    for name in sorted(typed & (values.keys() - free)):
        new = list(values[name]) if isinstance(values[name], tuple) else values[name]
        if saved[name] != new:
            raise SettingError(
                f"--resume: the run in {file.parent} has --{name.replace('_', '-')} {saved[name]}, not {new}; "
                "leave it out, or start a run of another --name"
            )
    return saved | {name: values[name] for name in typed & free}


def check_settings(s: Settings) -> None:
    """Raise SettingError for the first value that cannot work."""
    at_least_1 = ("batch_size", "rollout_batch", "updates", "max_tokens_per_forward", "checkpoint_every", "keep", "max_bad_steps", "eval_samples", "eval_batch_size")  # fmt: skip
    not_negative = ("w_reg", "w_rank", "w_format", "rmo_spread", "warmup", "weight_decay", "beta", "clip_high", "max_new_tokens", "workers", "min_gap")  # fmt: skip
    positive = ("lr", "max_grad_norm", "temperature")
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
        ("clip_low", 0 <= s.clip_low <= 1, "must be from 0 to 1"),
        ("name", s.name not in ("", ".", "..") and "/" not in s.name, "must be a plain folder name"),
    ]
    for name, ok, what in rules:
        if not ok:
            raise SettingError(f"--{name.replace('_', '-')} {getattr(s, name)} {what}")


# --------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class World:
    """Who else takes part: torchrun starts `size` processes, this is number `rank`."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, thing) -> list:
        """Everybody's `thing`, by rank."""
        if self.size == 1:
            return [thing]
        things: list = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        self.gather(None)


def start_world(device: str) -> World:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingError(f"--device {device}: this machine has no CUDA GPU; take --device cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    elif name != "cpu":
        raise SettingError(f"--device {device}: choose auto, cpu or cuda")
    if size > 1 and not dist.is_initialized():
        # gloo carries Python objects (rewards, predictions) between CPUs, nccl the tensors between GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if name != "cpu" else "gloo")
    return World(rank, size, torch.device(name))


class Learner:
    """The policy in its three roles: trained (float32 weights), sampled from, and referred to.

    policy     float32 master weights, computed with in bf16 on a GPU (lr 1e-6 vanishes in bf16 weights: from 1 to the
               next bf16 number is 0.8 %). On several processes it is sharded: one FSDP unit for each decoder layer and
               vision block, the rest (embeddings, head, norms) in the root's.
    actor      whole and unsharded, bf16 on a GPU: samples without any communication, reads half the bytes per token, and
               its weights stay where a captured CUDA graph expects them. On one CPU process it is the policy itself.
    reference  the policy as the stage began, frozen; None if beta is 0
    """

    def __init__(self, policy: rarl.Policy, world: World, s: Settings):
        cuda = world.device.type == "cuda"
        self.world, self.settings, self.policy = world, s, policy
        self.actor = policy
        if cuda or world.size > 1:
            self.actor = copy.deepcopy(policy).requires_grad_(False)
            if cuda:
                for parameter in self.actor.parameters():  # not the buffers: in bf16, rotary angles would be far off
                    parameter.data = parameter.data.bfloat16()
            self.actor.to(world.device)
        if s.activation_checkpointing:
            policy.model.activation_checkpointing_enable()
        self.shard(policy)
        self.reference: rarl.Policy | None = None

    def shard(self, policy: rarl.Policy) -> None:
        world = self.world
        if world.size == 1:
            policy.to(world.device)
            return
        mesh = init_device_mesh(world.device.type, (world.size,))
        precision = MixedPrecisionPolicy()
        if world.device.type == "cuda":
            # Inputs are left alone: the vision tower's rotary angles come in float32, and lose in bf16.
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        layers = [*policy.model.model.visual.blocks, *policy.model.model.language_model.layers]
        for module in [*layers, policy]:
            fully_shard(module, mesh=mesh, mp_policy=precision)

    def set_reference(self) -> None:
        """The reference becomes what the policy is now."""
        self.reference = None  # frees the last stage's first
        if self.settings.beta == 0:
            return
        if self.world.size == 1:  # computed with exactly as the policy is: their KL begins at 0
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        else:  # the actor holds the same weights whole
            self.reference = copy.deepcopy(self.actor).cpu().requires_grad_(False)
            self.shard(self.reference)

    @torch.no_grad()
    def sync_actor(self) -> None:
        """Gather the weights once; between two syncs every rank samples on its own."""
        if self.actor is self.policy:
            return
        for ours, theirs in zip(self.actor.parameters(), self.policy.parameters(), strict=True):
            ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)

    def autocast(self):
        # No cache: it would hold a bf16 copy of all weights; each is used once in a forward anyway.
        return torch.autocast("cuda", torch.bfloat16, enabled=self.world.device.type == "cuda", cache_enabled=False)

    def save(self, path: Path) -> None:
        """The float32 weights as a Hugging Face folder, written beside and renamed."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self.policy, options=options)
        if self.world.main:
            beside = path.with_name(path.name + ".writing")
            shutil.rmtree(beside, ignore_errors=True)
            whole = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            if self.actor.model.config.tie_word_embeddings:
                whole.pop("lm_head.weight", None)  # the embeddings' own, listed twice
            rarl.save_policy(self.actor, beside, whole)
            replace_folder(beside, path)
        self.world.barrier()


# --------------------------------------------------------------------------------------------------------------------
# Rewards of a stage


@dataclass(frozen=True)
class Weights:
    """Of R_reg, R_rank and R_format in R_final. Stage 1 has one image in a prompt, so no order."""

    w_reg: float
    w_rank: float
    w_format: float

    def full_marks(self, num_images: int) -> float:
        return self.w_reg + self.w_format + (self.w_rank if num_images > 1 else 0.0)


def score(text: str, sample: data.Sample, weights: Weights) -> reward.Reward:
    return reward.compute_reward(text, sample.labels, sample.task.delta, **dataclasses.asdict(weights))


def preflight(policy: rarl.Policy, samples: list[data.Sample], weights: Weights, budget: int) -> None:
    """Refuse to start unless the reference answer of every training prompt earns full marks.

    A wrong delta, a broken parser, swapped image ids or a tokenizer that does not give the text back would corrupt
    every gradient, and nothing would look wrong. Each prompt's reference makes the whole round: text -> tokens ->
    text -> reward. Full marks up to 1 %, as a label may have more decimals than the answer.
    """
    references = [data.reference_answer(sample) for sample in samples]
    unique = sorted(set(references))
    tokens = dict(zip(unique, rarl.encode(policy, unique), strict=True))
    read_back = {text: rarl.decode(policy, ids[None], torch.ones(1, len(ids)))[0] for text, ids in tokens.items()}
    for sample, text in zip(samples, references, strict=True):
        got, full = score(read_back[text], sample, weights), weights.full_marks(len(sample.items))
        if got.total < 0.99 * full or len(tokens[text]) > budget:
            raise SettingError(
                f"preflight: the reference answer of a training prompt does not earn full marks, {got.total:.3f} of {full:g}.\n"
                f"  images     {[item.name for item in sample.items]}\n  labels     {sample.labels}\n"
                f"  reference  {text}\n  read back  {read_back[text]}\n  rewards    {got}\n"
                f"  tokens     {len(tokens[text])} of {budget} allowed\n"
                "Check --delta, the labels, the tokenizer and --max-new-tokens."
            )


# --------------------------------------------------------------------------------------------------------------------
# One step: collect


@dataclass
class Batch:
    """What a rollout leaves for the update, this rank's part. N = B*G rows, answer g of prompt b in row b*G + g."""

    prompts: list  # B
    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) bool
    sampled_logp: Tensor  # (N, T), 0 at mutated answers
    mutated: Tensor  # (N,) bool
    advantages: Tensor  # (B, G)
    texts: list[str]  # N, for the report of a step that went wrong

    def take(self, groups: list[int]) -> "Batch":
        """Some of the groups, as wide as their longest answer."""
        G = self.advantages.shape[1]
        rows = (torch.tensor(groups)[:, None] * G + torch.arange(G)).flatten()  # (their N,)
        width = int(self.mask[rows].sum(1).max())
        ids, mask, sampled_logp = (x[rows, :width] for x in (self.ids, self.mask, self.sampled_logp))
        prompts, texts = [self.prompts[b] for b in groups], [self.texts[row] for row in rows.tolist()]
        return Batch(prompts, ids, mask, sampled_logp, self.mutated[rows], self.advantages[groups], texts)


def seed_of(*place) -> int:
    """A 63-bit seed for a place such as (seed, stage, step, prompt): each has a stream of its own, on any rank."""
    return random.Random(repr(place)).getrandbits(63)


def collect(learner: Learner, samples, prompts, weights: Weights, budget: int, place: tuple, best: dict):
    """rollout -> reward -> mutate -> advantage, on this rank's prompts. -> batch, what to log, RMO's new memories.

    place  (stage, step): with the seed and a prompt's number in the batch it fixes all random draws
    best   RMO's history: an image's name -> (smallest error of an earlier answer about it, the value it gave)
    """
    s, actor, world = learner.settings, learner.actor, learner.world
    B, G = len(samples), s.group_size
    numbers = range(world.rank, B * world.size, world.size)  # of this rank's prompts in the whole batch

    # rollout
    if world.device.type == "cuda":  # once for the rollout, the update and the reference; bf16, as they are multiplied
        for prompt in prompts:
            prompt.pixels = prompt.pixels.to(world.device, torch.bfloat16)
    if s.freeze_vision:
        rarl.encode_images(actor, prompts)  # once, likewise
    generators = [torch.Generator().manual_seed(seed_of(s.seed, *place, b)) for b in numbers]
    rollouts = []
    for b in range(0, B, s.rollout_batch):
        these = slice(b, b + s.rollout_batch)
        rollouts.append(rarl.generate(actor, prompts[these], G, budget, s.temperature, generators[these]))
    rollout = rarl.concatenate(rollouts, actor.eos_id)
    texts = rarl.decode(actor, rollout.ids, rollout.mask)

    # reward
    rewards = [score(text, samples[i // G], weights) for i, text in enumerate(texts)]
    totals = torch.tensor([r.total for r in rewards], dtype=torch.float64).view(B, G)
    spreadless = (totals.amax(1) == totals.amin(1)).tolist()
    facts = rollout_facts(texts, rewards, samples, rollout) | {"zero_spread": spreadless}

    # mutate
    mutated = torch.zeros(B, G, dtype=torch.bool)
    memories: dict = {}
    for b, (number, sample) in enumerate(zip(numbers, samples, strict=True)):
        full = weights.full_marks(len(sample.items))
        if s.rmo_source == "truth":
            references = [data.reference_answer(sample)]
        else:
            references = recall(best, sample)
            remember(memories, sample, texts[b * G : (b + 1) * G])
        texts[b * G : (b + 1) * G], changed = rmo.mutate(
            texts[b * G : (b + 1) * G],
            totals[b],
            references,
            s.rmo_k,
            s.rmo_probability,
            spread=s.rmo_spread * full,
            poor=s.rmo_poor * full,
            rng=random.Random(seed_of("rmo", s.seed, *place, number)),
        )
        mutated[b] = torch.tensor(changed)
        for g in mutated[b].nonzero().flatten().tolist():
            totals[b, g] = score(texts[b * G + g], sample, weights).total
    mutated = mutated.flatten()
    ids, mask, logp = put_answers(
        actor, rollout, mutated, [t for t, m in zip(texts, mutated.tolist(), strict=True) if m]
    )
    facts["mutated"] = mutated.tolist()

    # advantage
    advantages = grpo.group_advantages(totals).float()
    facts["advantage"] = advantages.flatten().tolist()
    return Batch(prompts, ids, mask, logp, mutated, advantages, texts), facts, memories


def remember(memories: dict, sample: data.Sample, texts: list[str]) -> None:
    """Keep the best value that the policy's own answers gave for each image. Smallest (error, value): no ties."""
    for text in texts:
        for image, value in reward.parse_response(text, len(sample.items)) or []:
            item = sample.items[image - 1]
            memory = (abs(value - item.label), value)
            memories[item.name] = min(memory, tuple(memories.get(item.name, memory)))


def recall(best: dict, sample: data.Sample) -> list[str]:
    """The answer made of the best earlier values of the sample's images; none if one of them earned nothing yet.

    Whole earlier answers would hardly ever serve: a prompt of several random images does not come twice.
    """
    known = [best.get(item.name, (math.inf, 0.0)) for item in sample.items]
    if any(error >= sample.task.delta for error, _ in known):
        return []
    entries = sorted((value, i) for i, (_, value) in enumerate(known, start=1))
    return [data.format_answer((i, f"{value:.12g}") for value, i in entries)]


def put_answers(policy, rollout: rarl.Rollout, rows: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The rollout's ids, mask and logp with other answers in some rows (their logp is 0: they were not sampled)."""
    if not texts:
        return rollout.ids, rollout.mask, rollout.logp
    answers = rarl.encode(policy, texts)
    wide = rollout.padded(max(rollout.ids.shape[1], *map(len, answers)), policy.eos_id)
    ids, mask, logp = wide.ids, wide.mask, wide.logp
    for row, answer in zip(rows.nonzero().flatten().tolist(), answers, strict=True):
        ids[row], mask[row], logp[row] = policy.eos_id, False, 0.0
        ids[row, : len(answer)] = answer.to(ids.device)
        mask[row, : len(answer)] = True
    return ids, mask, logp


def rollout_facts(texts, rewards, samples, rollout) -> dict[str, list]:
    """What to average over the sampled answers (before any mutation) of all ranks: name -> numbers."""
    G = len(texts) // len(samples)
    errors = []
    for i, text in enumerate(texts):
        labels = samples[i // G].labels
        answer = reward.parse_response(text, len(labels))
        errors += [] if answer is None else [abs(value - labels[image - 1]) for image, value in answer]
    return {
        "reward": [r.total for r in rewards],
        "format": [r.format for r in rewards],
        "regression": [r.regression for r in rewards],
        "ranking": [r.ranking for i, r in enumerate(rewards) if len(samples[i // G].items) > 1],
        "mae": errors,  # of the values in valid answers
        "tokens": rollout.mask.sum(1).tolist(),
    }


def means(facts: list[dict[str, list]]) -> dict[str, float | None]:
    """Every rank's numbers -> their means over all; None where there is nothing to average."""
    joined = {name: [x for f in facts for x in f[name]] for name in facts[0]}
    spread = torch.tensor(joined["advantage"]).var(correction=0).item()
    return {name: sum(xs) / len(xs) if xs else None for name, xs in joined.items() if name != "advantage"} | {
        "advantage_var": spread
    }


# --------------------------------------------------------------------------------------------------------------------
# One step: update


def micro_batches(batch: Batch, wanted: list[int], limit: int) -> list[list[int]]:
    """Prompts in micro-batches whose packed rectangle (prompts, answers and padding) holds at most `limit` tokens.

    Sorted by length, so that little of a rectangle is padding. One prompt that is over the limit goes alone.
    """
    G = batch.advantages.shape[1]
    prompt = [len(p.ids) for p in batch.prompts]
    answer = batch.mask.view(len(prompt), G, -1).sum(-1).amax(1).tolist()  # longest answer of each group
    micros: list[list[int]] = []
    for b in sorted(wanted, key=lambda b: (prompt[b] + G * answer[b], b)):
        more = [*micros[-1], b] if micros else [b]
        if micros and len(more) * (max(prompt[i] for i in more) + G * max(answer[i] for i in more)) <= limit:
            micros[-1] = more
        else:
            micros.append([b])
    return micros


def update(learner: Learner, optimizer, batch: Batch) -> dict:
    """The GRPO update on one batch, `updates` times. -> what to log; "bad" is True if a step was skipped."""
    s, policy, reference, world = learner.settings, learner.policy, learner.reference, learner.world
    B, G = batch.advantages.shape
    # A group without advantage and without KL has no gradient at all: it is not run.
    wanted = [b for b in range(B) if reference is not None or batch.advantages[b].any()]
    micros = [batch.take(groups) for groups in micro_batches(batch, wanted, s.max_tokens_per_forward)]
    # Counts over all ranks, not a mean of the ranks' means; FSDP averages gradients over ranks, hence "/ size".
    everywhere = world.gather({"micros": len(micros), "answers": B * G, "tokens": int(batch.mask.sum())})
    count = sum(e["answers" if s.normalize == "sequence" else "tokens"] for e in everywhere)
    # FSDP gathers weights in each forward, so ranks must run equally many: one with fewer repeats some, with weight 0.
    real = len(micros)
    micros += [micros[0] if micros else batch.take([0])] * (max(e["micros"] for e in everywhere) - real)

    # transformers checkpoints activations in training mode only; there is no dropout that this could switch on.
    policy.train(s.activation_checkpointing)
    old_logps: list[Tensor] = []  # per micro-batch, from the first pass: the policy before the first update
    log: dict = {}
    for epoch in range(s.updates):
        parts: list[dict[str, float]] = []
        for i, micro in enumerate(micros):
            with learner.autocast():
                logp, entropy = rarl.logprobs(policy, micro.prompts, micro.ids, micro.mask, s.temperature)  # (N, T)
                ref_logp = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logp, _ = rarl.logprobs(reference, micro.prompts, micro.ids, micro.mask, s.temperature)
            if epoch == 0:
                old_logps.append(logp.detach())
            loss, stats = grpo.grpo_loss(
                logp,
                old_logps[i] if epoch else None,  # None: on-policy, ratio 1
                ref_logp,
                micro.advantages.flatten().to(logp.device),
                micro.mask,
                s.clip_low,
                s.clip_high,
                s.beta,
                s.normalize,
                denominator=count / world.size,
            )
            (loss if i < real else 0.0 * loss).backward()
            if i < real:
                parts.append(measure(micro, logp.detach(), entropy, loss.detach(), stats))
        norm = 0.0
        if micros:
            total_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), s.max_grad_norm)
            norm = float(total_norm.full_tensor() if isinstance(total_norm, DTensor) else total_norm)
        measured = summarize([part for parts in world.gather(parts) for part in parts], world.size)
        # The norm is the same on all ranks, and so is the loss: they skip together or not at all.
        bad = not (math.isfinite(norm) and math.isfinite(measured["loss"]))
        if micros and not bad:
            optimizer.step()
        optimizer.zero_grad()
        if epoch == 0:
            log = measured | {"grad_norm": norm}
        else:  # how far the policy has moved from the one that sampled
            log |= {name: measured.get(name) for name in ("ratio", "clip_low", "clip_high")}
        log["bad"] = bad
        if bad:
            break
    policy.eval()
    return log


def measure(micro: Batch, logp: Tensor, entropy: Tensor, loss: Tensor, stats: dict[str, Tensor]) -> dict[str, float]:
    """What to log of one forward, as sums over its tokens, which add up over micro-batches and ranks; means would not."""
    sampled = micro.mask & ~micro.mutated[:, None].to(micro.mask.device)  # (N, T), False on mutated answers
    gap = (logp - micro.sampled_logp).abs().masked_fill(~sampled, 0.0)
    sums: dict[str, Tensor] = {
        "loss": loss,
        "policy_loss": stats["policy_loss"],
        "tokens": stats["tokens"],
        **{k: stats[k] * stats["tokens"] for k in ("kl", "ratio", "clip_low", "clip_high") if k in stats},
        "sampled": sampled.sum(),
        "entropy": entropy.masked_fill(~sampled, 0.0).sum(),
        "gap": gap.sum(),
        "gap_max": gap.max(),
        "mutated_logp": logp.masked_fill(sampled, 0.0).sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def summarize(parts: list[dict[str, float]], size: int) -> dict[str, Any]:
    """What `measure` said of all micro-batches of all `size` ranks -> means, and the loss. None: nothing to average."""
    total = {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}
    tokens, sampled = total.get("tokens", 0.0), total.get("sampled", 0.0)
    mean = lambda name, count: total[name] / count if count else None
    return {
        "loss": total.get("loss", 0.0) / size,  # each rank's is `size` times its share, see `denominator`
        "policy_loss": total.get("policy_loss", 0.0) / size,
        "entropy": mean("entropy", sampled),  # of the policy's own answers
        **{name: mean(name, tokens) for name in ("kl", "ratio", "clip_low", "clip_high") if name in total},
        # How far the update's log-probs are from those under which the answers were sampled: rounding, or a bug.
        "logp_gap_mean": mean("gap", sampled),
        "logp_gap_max": max((part["gap_max"] for part in parts), default=None),
        "mutated_logp": mean("mutated_logp", tokens - sampled),
    }


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak: linear warm-up, then linear decay to a tenth (our choice; the paper states the peak)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


def replace_folder(new: Path, path: Path) -> None:
    """Put the finished folder `new` in the place of `path`; a crash in between leaves one of them whole."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def checksums(folder: Path, files: list[Path]) -> dict[str, int]:
    sums = {}
    for file in files:
        crc = 0
        with open(file, "rb") as f:
            while piece := f.read(2**24):
                crc = zlib.crc32(piece, crc)
            os.fsync(f.fileno())
        sums[str(file.relative_to(folder))] = crc
    return sums


def make_state(policy: rarl.Policy, optimizer) -> None:
    """Make the optimiser's state now, so that a checkpoint has something to save and to load into.

    get_state_dict does it by a step with lr 0, which counts: Adam would take the first real step for its second.
    """
    get_state_dict(policy, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


class Checkpoints:
    """The newest checkpoints of a run: runs/NAME/checkpoints/STAGE-STEP, the state *before* that step.

    Written beside under another name and renamed when complete, with a checksum of every file: a crash while writing
    costs nothing, and damage is noticed on reading. There is no random state in one (see the top of this file).
    """

    def __init__(self, folder: Path, world: World, keep: int):
        self.folder, self.world, self.keep = folder, world, keep

    def names(self) -> list[str]:
        found = self.folder.glob("[12]-[0-9]*") if self.folder.is_dir() else []
        return sorted((p.name for p in found if p.name[2:].isdigit()), reverse=True)  # newest first

    def save(self, stage: int, step: int, learner: Learner, optimizer, extra: dict) -> None:
        name = f"{stage}-{step:07d}"
        beside = self.folder / f"{name}.writing"
        try:
            if self.world.main:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            self.world.barrier()
            model, optim = get_state_dict(learner.policy, optimizer)
            dcp.save({"model": model, "optimizer": optim}, checkpoint_id=beside, no_dist=self.world.size == 1)
            if self.world.main:
                (beside / "extra.json").write_text(json.dumps(extra))
                files = sorted(p for p in beside.rglob("*") if p.is_file())
                (beside / "checksums.json").write_text(json.dumps(checksums(beside, files)))
                replace_folder(beside, self.folder / name)
                for old in self.names()[self.keep :]:
                    shutil.rmtree(self.folder / old)
        except (OSError, CheckpointException) as error:  # a full disk, a read-only folder
            shutil.rmtree(beside, ignore_errors=True)
            good = next((f"the last good one is {self.folder / n}" for n in self.names()), "there is none before it")
            causes = (
                [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
            )
            reason = "; ".join(map(str, causes))
            raise SettingError(f"the checkpoint {self.folder / name} could not be written ({reason}); {good}") from None
        self.world.barrier()

    def damage(self, name: str) -> str | None:
        """What is wrong with a checkpoint, or None."""
        folder = self.folder / name
        try:
            expected = json.loads((folder / "checksums.json").read_text())
            for file, crc in expected.items():
                if checksums(folder, [folder / file])[file] != crc:
                    return f"{folder / file} was altered"
        except (OSError, ValueError) as error:
            return f"{folder} is incomplete ({error})"
        return None

    def newest(self) -> str | None:
        """Name of the newest sound checkpoint; says which ones it passes over."""
        verdicts = []
        for name in self.names():
            damage = self.damage(name) if self.world.main else None
            verdicts.append((name, damage))
            if damage is None:
                break
            print(f"checkpoint {self.folder / name} is damaged: {damage}", file=sys.stderr)
        return self.world.gather(next((name for name, damage in verdicts if damage is None), None))[0]

    def extra(self, name: str) -> dict:
        return json.loads((self.folder / name / "extra.json").read_text())

    def load(self, name: str, learner: Learner, optimizer) -> None:
        model, optim = get_state_dict(learner.policy, optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optim}
        dcp.load(state, checkpoint_id=self.folder / name, no_dist=self.world.size == 1)
        set_state_dict(learner.policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        learner.sync_actor()


class Stop:
    """SIGTERM and SIGINT ask for an end after the step in progress; a second one kills as usual."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: somebody imports this file and knows better
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


# --------------------------------------------------------------------------------------------------------------------
# A stage


class Watch:
    """Says once, plainly, when a run shows a known failure of RL with verifiable rewards. Thresholds are ours."""

    def __init__(self, steps: int = 20):
        self.steps = steps
        self.logs: list[dict] = []
        self.said: set[str] = set()

    def __call__(self, log: dict, full: float) -> str | None:
        self.logs.append(log | {"full": full})
        if len(self.logs) < 2 * self.steps:
            return None

        def mean(name: str, logs: list[dict]) -> float:
            values = [l[name] / (l["full"] if name == "reward" else 1) for l in logs if l.get(name) is not None]
            return sum(values) / len(values) if values else 0.0

        first, last = self.logs[: self.steps], self.logs[-self.steps :]
        gain = {k: mean(k, last) - mean(k, first) for k in ("format", "regression", "ranking")}
        reward_now = mean("reward", last)
        signs = {
            "collapse": (
                mean("zero_spread", last) > 0.8 and reward_now < 0.9,
                "the answers of most groups are alike and not good: raise --temperature, --rmo-probability or --beta",
            ),
            "reward hacking": (
                gain["format"] > 0.1 and gain["regression"] < 0.01 and gain["ranking"] < 0.01,
                "the format improves, values and order do not: lower --w-format, or look at the predictions",
            ),
            "stuck": (
                mean("grad_norm", last) < 1e-4 and reward_now < 0.5,
                "hardly any gradient while the reward is low: raise --rmo-k, --rmo-probability or --group-size",
            ),
        }
        for name, (present, advice) in signs.items():
            if present and name not in self.said:
                self.said.add(name)
                return f"{name}: over the last {self.steps} steps {advice}"
        return None


class Steps(torch.utils.data.Dataset):
    """Step number -> this rank's samples and prompts, so that worker processes can read images ahead."""

    def __init__(self, sampler: data.Sampler, policy: rarl.Policy, world: World):
        self.sampler, self.world = sampler, world
        # Not the policy itself: a worker needs no weights.
        self.front = types.SimpleNamespace(tokenizer=policy.tokenizer, image_processor=policy.image_processor)

    def __getitem__(self, step: int):
        try:
            samples = self.sampler.batch(step)[self.world.rank :: self.world.size]
            return samples, data.make_prompts(self.front, samples)
        except data.DataError as error:  # raised by a worker, it would arrive wrapped in the worker's traceback
            return error, None

    def ahead(self, first: int, last: int, workers: int) -> Iterator:
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
        )
        for samples, prompts in loader:
            if isinstance(samples, data.DataError):
                raise samples
            yield samples, prompts


@dataclass
class Plan:
    """A stage before it starts: all that follows from the settings and the data."""

    stage: int
    steps: int
    sampler: data.Sampler
    weights: Weights
    budget: int  # tokens that an answer may take


def make_plan(stage: int, policy: rarl.Policy, items: list[data.Item], s: Settings) -> Plan:
    """Stage 1: one image, regression. Stage 2: several images, everything. Every prompt of the stage is checked."""
    steps, images = (s.steps1, (1,)) if stage == 1 else (s.steps2, s.images)
    weights = Weights(s.w_reg, s.w_rank if stage == 2 else 0.0, s.w_format)
    sampler = data.Sampler(items, images, s.batch_size, seed_of(s.seed, stage), s.min_gap)
    samples = [sample for step in range(steps) for sample in sampler.batch(step)]
    budget = s.max_new_tokens or data.answer_budget(policy, samples)
    preflight(policy, samples, weights, budget)
    return Plan(stage, steps, sampler, weights, budget)


def train_stage(plan: Plan, learner: Learner, out: Path, resume_from: str | None, stop: Stop, best: dict) -> None:
    """Run one stage: the loop of the method, and around it what keeps days of work safe.

    best  RMO's history, extended in place
    """
    s, world = learner.settings, learner.world
    stage, steps, weights = plan.stage, plan.steps, plan.weights
    checkpoints = Checkpoints(out / "checkpoints", world, s.keep)
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    make_state(learner.policy, optimizer)
    learner.set_reference()  # before a checkpoint is loaded: the policy as the stage began
    first, bad = 0, 0
    if resume_from:
        checkpoints.load(resume_from, learner, optimizer)
        extra = checkpoints.extra(resume_from)
        first, bad = extra["step"], extra["bad"]
        best |= extra["best"]
    else:
        checkpoints.save(stage, 0, learner, optimizer, {"step": 0, "best": best, "bad": bad})
    watch = Watch()
    metrics = open(out / "metrics.jsonl" if world.main else os.devnull, "a")  # noqa: SIM115
    progress = tqdm(
        range(first, steps), initial=first, total=steps, desc=f"stage {stage}", unit="step", disable=not world.main
    )
    with metrics, progress:
        for step, (samples, prompts) in zip(
            progress, Steps(plan.sampler, learner.actor, world).ahead(first, steps, s.workers), strict=True
        ):
            start = time.time()
            for group in optimizer.param_groups:
                group["lr"] = s.lr * learning_rate(step, steps, s.warmup)
            # rollout -> reward -> mutate -> advantage, then loss -> step
            batch, facts, memories = collect(learner, samples, prompts, weights, plan.budget, (stage, step), best)
            log = update(learner, optimizer, batch)
            learner.sync_actor()
            everywhere = world.gather((facts, memories, stop.signal))
            for _, memory, _ in everywhere:
                best |= {name: min(new, tuple(best.get(name, new))) for name, new in memory.items()}
            log = {"images": len(samples[0].items)} | means([f for f, _, _ in everywhere]) | log

            bad = bad + 1 if log["bad"] else 0
            if log["bad"]:
                keep_evidence(out / "bad_steps" / f"{stage}-{step:07d}-rank{world.rank}.json", samples, batch, log)
            if world.main:
                metrics.write(json.dumps(evaluation.finite({"stage": stage, "step": step} | log)) + "\n")
                metrics.flush()
                with open(out / "timing.jsonl", "a") as timing:
                    timing.write(json.dumps({"stage": stage, "step": step, "seconds": time.time() - start}) + "\n")
                short = {"reward": "reward", "format": "format", "regression": "reg", "ranking": "rank", "mae": "mae",
                         "entropy": "entropy", "kl": "kl", "zero_spread": "zero"}  # fmt: skip
                shown = [f"{word}={log[k]:.2f}" for k, word in short.items() if log.get(k) is not None]
                progress.set_postfix_str(" ".join(shown), refresh=False)
                if warning := watch(log, weights.full_marks(len(samples[0].items))):
                    progress.write(f"step {step}: {warning}", file=sys.stderr)
            if bad >= s.max_bad_steps:
                raise SettingError(
                    f"{bad} steps in a row had a loss or gradient that is not finite; the batches are in {out / 'bad_steps'}, "
                    f"the last sound weights in {checkpoints.folder}: lower --lr or --max-grad-norm, or look at the images"
                )
            killed = max(number for _, _, number in everywhere)
            if killed or (step + 1 < steps and (step + 1) % s.checkpoint_every == 0):
                if world.main:
                    os.fsync(metrics.fileno())  # the log must not be older than the checkpoint
                checkpoints.save(stage, step + 1, learner, optimizer, {"step": step + 1, "best": best, "bad": bad})
            if killed:
                progress.close()
                raise SystemExit(
                    f"train.py: stopped by {signal.Signals(killed).name} after step {step + 1} of stage {stage}; "
                    f"saved, go on with --resume"
                )


def keep_evidence(path: Path, samples, batch: Batch, log: dict) -> None:
    """What was in a step whose numbers went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    G = batch.advantages.shape[1]
    groups = [
        {
            "images": [item.name for item in sample.items],
            "labels": sample.labels,
            "answers": batch.texts[b * G : (b + 1) * G],
            "advantages": batch.advantages[b].tolist(),
        }
        for b, sample in enumerate(samples)
    ]
    path.write_text(json.dumps({"log": log, "groups": groups}, indent=1))


def evaluate(name: str, learner: Learner, items, out: Path) -> dict[int, dict]:
    """The policy on held-out prompts with 1 and with `images` images -> metrics of each. Shared among the ranks."""
    s, world = learner.settings, learner.world
    rows: dict[int, dict] = {}
    samples: list[data.Sample] = []
    predictions: list[dict] = []
    for n in sorted({1, *s.images}):
        few = data.make_samples(items, n, s.eval_samples, min_gap=s.min_gap)
        mine = few[world.rank :: world.size]
        budget = data.answer_budget(learner.actor, few)
        _, answers = evaluation.evaluate(learner.actor, mine, s.eval_batch_size, budget)
        parts = world.gather(answers)
        answers = [parts[i % world.size][i // world.size] for i in range(len(few))]
        rows[n] = evaluation.summarize(answers)
        samples, predictions = samples + few, predictions + answers
    if world.main:
        evaluation.write_predictions(predictions, out / f"predictions_{name}.jsonl")
        evaluation.draw_predictions(samples, predictions, out / "predictions.png")
    return rows


def results_table(results: dict[str, dict[int, dict]]) -> str:
    """base / stage 1 / stage 2 in lines; valid answers over everything, MAE at one image, tau at several."""
    several = sorted({n for rows in results.values() for n in rows} - {1})
    lines = [f"{'':10} {'valid':>7} {'MAE':>7} " + " ".join(f"{f'tau@{n}':>7}" for n in several)]
    for name, rows in results.items():
        valid = sum(r["valid"] * r["n"] for r in rows.values()) / sum(r["n"] for r in rows.values())
        taus = " ".join(f"{rows[n]['tau']:7.3f}" for n in several)
        lines.append(f"{name:10} {valid:7.1%} {rows[1]['mae']:7.2f} {taus}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# A run


def load_items(s: Settings) -> list[list[data.Item]]:
    """The items of train and test; DataError if one of them has too few for a prompt, or an image cannot be read.

    Every image is decoded once beforehand where they are few enough for that to take a minute at most. Of larger data
    sets, an unreadable image stops the run when its turn comes, with a checkpoint behind it; or use --skip-bad.
    """
    overrides = {name: getattr(s, name) for name in ("question", "order", "delta", "decimals")}
    splits = data.load_splits(s.data, s.data_root, ("train", "test"), overrides, s.skip_bad)
    for items in splits:
        for n in {1, *s.images}:
            data.make_pools(items, n)
    files = [item for items in splits for item in items if item.path is not None]
    if len(files) <= 5000 and (broken := data.unreadable(files)):
        raise data.DataError(f"{next(iter(broken.values()))}; {len(broken)} such in all, --skip-bad leaves them out")
    return splits


def read_results(file: Path) -> dict[str, dict[int, dict]]:
    """What `run` returns, from results.json: whose keys are strings, and whose undefined metrics are null."""
    nan = lambda row: {k: math.nan if v is None else v for k, v in row.items()}
    known = json.loads(file.read_text())
    return {stage: {int(n): nan(row) for n, row in rows.items()} for stage, rows in known.items()}


def free_name(path: Path) -> Path:
    """path~1, path~2, ...: the first that does not exist."""
    return next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}~{i}")).exists())


def open_run(out: Path, s: Settings, checkpoint: str | None, checkpoints: Checkpoints) -> dict[str, dict[int, dict]]:
    """Make runs/NAME ready, on the main rank. -> results so far.

    Fresh: whatever lies there is moved to NAME~1, ~2, ...; nothing is overwritten. Stage 2 alone: only what an earlier
    stage 2 made gives way, its policy to stage2~1. Resumed: the metrics' lines from the checkpoint's step on are taken
    back, they will be written again.
    """
    metrics, results, whole = out / "metrics.jsonl", out / "results.json", out / "results.txt"

    def take_back(place: tuple[int, int]) -> None:
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        sound = [l for l in lines if l.endswith("\n")]  # a killed process may have left half a line
        before = [l for l in sound if ((d := json.loads(l))["stage"], d["step"]) < place]
        beside = metrics.with_name("metrics.writing")
        beside.write_text("".join(before))
        beside.rename(metrics)

    if checkpoint:
        take_back((int(checkpoint[0]), checkpoints.extra(checkpoint)["step"]))
    elif s.stage == 2:
        if (out / "stage2").exists():
            (out / "stage2").rename(free_name(out / "stage2"))
        whole.unlink(missing_ok=True)
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        take_back((2, 0))
    else:
        if out.exists():
            aside = free_name(out)
            out.rename(aside)
            print(f"the earlier {out} is now {aside}", file=sys.stderr)
        out.mkdir(parents=True)
    known = read_results(results) if results.exists() else {}
    if not checkpoint:
        known.pop("stage 2", None)
        saved = dataclasses.asdict(s) | {"resume": False}
        (out / "settings.json").write_text(json.dumps(saved, indent=2) + "\n")
    return known


def run(s: Settings) -> dict[str, dict[int, dict]]:
    """Everything: base evaluation, the stages with an evaluation after each, the files in runs/NAME. -> results"""
    world = start_world(s.device)
    if s.batch_size % world.size:
        raise SettingError(f"--batch-size {s.batch_size} must be a multiple of the number of processes, {world.size}")
    out = Path("runs") / s.name
    stages = (s.stage,) if s.stage else (1, 2)
    checkpoints = Checkpoints(out / "checkpoints", world, s.keep)
    checkpoint = None
    if s.resume:
        if (out / "results.txt").exists():  # written last
            print(f"the run in {out} is complete:\n\n{(out / 'results.txt').read_text()}")
            return read_results(out / "results.json")
        checkpoint = checkpoints.newest()
        if checkpoint is None and checkpoints.names():
            raise SettingError(f"--resume: {checkpoints.folder} holds no sound checkpoint; start without --resume")
    if s.stage == 2 and not (out / "stage1").is_dir():
        raise SettingError(
            f"--stage 2 starts from {out / 'stage1'}, which does not exist: run --stage 1 --name {s.name} first"
        )
    train_items, test_items = load_items(s)
    at = int(checkpoint[0]) if checkpoint else stages[0]  # the stage to begin with
    begun = at == 2 and (s.stage == 2 or s.steps1 > 0)  # stage 1 is done
    start = out / "stage1" if begun else HERE / "tiny" if s.model == "tiny" else s.model
    policy = rarl.load_policy(start)
    if s.max_pixels:
        policy.image_processor.size = {
            "shortest_edge": 56 * 56,
            "longest_edge": s.max_pixels,
        }  # areas, in spite of the names
    if s.freeze_vision:
        policy.model.model.visual.requires_grad_(False)
    lengths = {1: s.steps1, 2: s.steps2}
    plans = [make_plan(stage, policy, train_items, s) for stage in range(at, stages[-1] + 1) if lengths[stage]]
    results = open_run(out, s, checkpoint, checkpoints) if world.main else {}
    learner = Learner(policy, world, s)
    stop = Stop()
    best: dict = {}

    def report(name: str) -> None:
        rows = evaluate(name.replace(" ", ""), learner, test_items, out)
        if world.main:
            results[name] = rows
            beside = out / "results.writing"
            beside.write_text(json.dumps(evaluation.finite(results), indent=2) + "\n")
            beside.rename(out / "results.json")

    begun_with = "stage 1" if begun else "base"
    if begun_with not in world.gather(results)[0]:
        report(begun_with)
    for plan in plans:
        train_stage(plan, learner, out, checkpoint if plan.stage == at else None, stop, best)
        learner.save(out / f"stage{plan.stage}")
        report(f"stage {plan.stage}")
    if world.main:
        shutil.rmtree(checkpoints.folder, ignore_errors=True)  # the run is whole
        table = results_table(results)
        (out / "results.txt").write_text(table + "\n")
        print(f"\n{s.data}, {s.eval_samples} test prompts for each number of images\n\n{table}\n\nwrote {out}/")
    return results


def main(argv: list[str] | None = None) -> None:
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, on purpose
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and the image workers' fork do not mix
    try:
        run(parse_settings(argv))
    except (SettingError, data.DataError, rarl.ModelError, OSError) as error:
        if dist.is_initialized():  # the others may wait in a collective: leave at once, torchrun ends them
            print(f"train.py: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(f"train.py: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
