"""What a run needs in memory, computed from the model's config before anything is loaded.

    python -m support.learner.plan --gpu-memory 80 --preset utkface --model Qwen/Qwen2.5-VL-3B-Instruct

takes the settings of train.py and prints a table. No weights are read, no GPU is needed. Without --data-root every image is
taken to be of --max-pixels. Each figure is a sum over tensors that the code is known to hold; what they are is said beside
the formula. tests/test_plan.py holds the parameters, the cache and the activations against real ones on a CPU. On a GPU
nothing has been measured: figures for it follow from its dtypes alone.

Letters: P tokens, S image patches of the longest prompt; T tokens of the longest answer; G answers to a prompt; W processes;
C hidden size, I width of the MLP. GB is 10^9 bytes.
"""

import support.run.quiet_end  # noqa: F401  first: Ctrl-C during the slow imports below is one line

# isort: split
import argparse
import copy
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Backbone

import data
import rarl
from support.datasets.drawings import DRAWN
from support.datasets.loader import AHEAD
from support.datasets.readers import READERS
from support.datasets.splits import load_splits
from support.learner import lora
from support.learner.world import World
from support.run.interrupts import leave
from support.run.preflight import hardest_samples, task_overrides
from support.run.settings import SettingError, Settings, number, parse_settings
from support.show.results import format_table

GB = 1e9
RESERVE = 2 * GB  # of a card: CUDA's own, libraries' workspaces, gaps that the allocator leaves
PROCESSES = (1, 2, 4, 8)
PROCESS = 5 * GB  # host memory of Python, torch, and a checkpoint's file while it is written
TINY = Path(__file__).resolve().parent.parent.parent / "tiny"


class Longest(NamedTuple):
    """Tokens and image patches of the longest prompt, tokens of the longest answer."""

    P: int
    S: int
    T: int


class Plan:
    """Bytes of one process of W on a GPU. With gpu=False: of one process on the CPU, where all is float32."""

    def __init__(self, config: Any, s: Settings, longest: Longest, W: int = 1, gpu: bool = True) -> None:
        self.s, self.W, self.gpu, self.longest = s, W, gpu, longest
        self.text, self.vision = config.text_config, config.vision_config
        model = without_weights(config)
        layers, blocks, visual = model.model.language_model.layers, model.model.visual.blocks, model.model.visual
        self.weights = parameters(model)
        self.layer = max(map(parameters, [*layers, *blocks]))  # the largest
        self.root = self.weights - parameters(layers) - parameters(blocks)  # embeddings, head, last norm, merger
        linear = {p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
        self.linear = sum(p.numel() for p in linear - {model.get_input_embeddings().weight})  # it may be the head's too
        if s.lora_rank:
            adapted = [model.get_submodule(name) for name in lora.target_names(model, s.lora_targets)]
            self.trained = sum(s.lora_rank * (x.in_features + x.out_features) for x in adapted)
            self.vision_trained = "vision" in s.lora_targets
        else:
            self.trained = self.weights - s.freeze_vision * parameters(visual)
            self.vision_trained = not s.freeze_vision
        self.prompts = math.ceil(s.batch_size / W)
        self.group = longest.P + s.group_size * (longest.T - 1)  # tokens of a prompt and its answers in the update
        self.groups = max(1, min(s.max_tokens_per_forward // self.group, self.prompts))  # that it packs into a forward
        patch = self.vision.in_channels * self.vision.patch_size**2  # bytes, as it travels
        self.patch = patch * self.vision.temporal_patch_size  # numbers, as it is multiplied
        self.pixels = self.prompts * longest.S * patch  # of a step
        # Bytes of a number: in matrix products; in the stream between layers, which is as wide as the embeddings' weights.
        self.m = 2 if gpu else 4
        self.cast = gpu and W == 1 and s.lora_rank == 0  # float32 weights under autocast. FSDP gathers bf16 ones
        self.stream = 4 if self.cast or not gpu else 2

    # What is always there

    def state(self) -> dict[str, float]:
        """Weights in their roles, as support/learner/learner.py (Learner) holds them."""
        s, W, base, kl = self.s, self.W, self.weights, self.s.beta > 0
        # Of all prompts of a step (Learner.prepare): their pixels as bytes, and in bf16 what a frozen vision tower made of them.
        # Of two steps, as the loop holds a batch until it has the next.
        features = 0 if self.vision_trained else self.text.hidden_size // self.vision.spatial_merge_size**2
        images = 2 * (self.pixels + self.prompts * self.longest.S * 2 * features)
        if s.lora_rank:  # one copy of the base in bf16, on every rank; adapters in float32
            weights, sampling = self.m * base + 4 * self.trained, 0
            reference = 4 * self.trained if kl and s.stage != 1 else 0  # stage 2: the adapters of stage 1
            W = 1
        else:
            weights, sampling = 4 * base / W, 2 * base if self.gpu else 0
            # One process casts linear layers alone. Several cast all and shard it, but FSDP keeps the gathered root.
            alone, sharded = self.m * self.linear + 4 * (base - self.linear), 2 * base / W + 2 * self.root
            reference = kl * (alone if W == 1 else sharded)
        moments = 0 if s.offload else 8 * self.trained / W
        return {"weights": weights, "gradients": 4 * self.trained / W, "Adam's moments": moments,
                "reference": reference, "copy that samples": sampling, "images of two steps": images}  # fmt: skip

    # The rollout

    def cache(self, prompts: int, group: int) -> float:
        """Keys and values of every layer: the prompt's once, and T of each answer."""
        each = 2 * self.text.num_key_value_heads * (self.text.hidden_size // self.text.num_attention_heads) * self.m
        return self.text.num_hidden_layers * each * prompts * (self.longest.P + group * self.longest.T)

    def rollout(self, prompts: int, group: int) -> float:
        """The most of: encoding the images, prefill, decoding."""
        P, S, T = self.longest
        # A layer without gradient: three tensors as wide as the MLP, or queries and keys rotated in float32.
        work = lambda tokens, x: tokens * (3 * x.intermediate_size * self.m + 20 * x.hidden_size)
        encoding = work(prompts * S, self.vision)
        prefill = self.cache(prompts, 0) + self.cache(prompts, group) + work(prompts * P, self.text)  # copied to ours
        # Dropping finished answers copies up to 3/4 of the cache. Sampling: log-probs, and two float64 tensors as large.
        decoding = 1.75 * self.cache(prompts, group) + 20 * prompts * group * self.text.vocab_size
        return max(encoding, prefill, decoding)

    # The update

    def norm(self, C: int, readers: int, stream: int) -> int:
        """A norm and the linear layers that read it keep, per token: its input in float32; what its weight is multiplied
        with, if that is trained; its output, cast for each reader where weights are float32."""
        weight = 0 if self.s.lora_rank else stream * C
        return 4 * C + weight + self.m * C * (readers if self.cast else min(readers, 1))

    def per_token(self, config: Any, stream: int, readers: int, attention: int) -> int:
        """Of a layer, what the backward pass needs of the forward pass: two norms; so many tensors of the attention; of the
        MLP gate, silu(gate), up and their product.  readers: of the first norm"""
        C, I = config.hidden_size, config.intermediate_size
        norms = self.norm(C, readers, stream) + self.norm(C, 2, stream)
        return norms + attention * self.m * C + 4 * self.m * I

    def text_layer(self, groups: int) -> float:
        """Of a packed row of `groups` prompts."""
        (P, _, T), G = self.longest, self.s.group_size
        # Kept of the attention: queries, output; on a CPU the output is put together anew.
        tokens = groups * self.group * self.per_token(self.text, self.stream, 3, 2 if self.gpu else 3)
        keys = groups * (P + G * (P + T - 1))  # gathered: each answer's prompt beside its own
        head = self.text.hidden_size // self.text.num_attention_heads
        mask = 0 if self.gpu else 4 * groups * G * (T - 1) * (P + T - 1)
        return tokens + keys * 2 * self.m * self.text.num_key_value_heads * head + mask

    def vision_block(self, groups: int) -> float:
        # Queries, keys and values as projected; queries and keys rotated; output. Between blocks it is as the patches: bf16 on a GPU.
        return groups * self.longest.S * self.per_token(self.vision, self.m, 1, 6)

    def activations(self, groups: int) -> float:
        """All that is kept from the forward to the backward pass of a packed row. With checkpointing a layer keeps its input."""
        checkpointing = self.s.activation_checkpointing
        C, c = self.text.hidden_size, self.vision.hidden_size
        tokens, patches = groups * self.group, groups * self.longest.S
        layer = tokens * self.stream * C if checkpointing else self.text_layer(groups)
        head = tokens * self.norm(C, 0, self.stream) + groups * self.s.group_size * self.longest.T * self.stream * C
        kept = self.text.num_hidden_layers * layer + head  # the last norm, and what the head reads
        if self.vision_trained:
            block = patches * self.m * c if checkpointing else self.vision_block(groups)
            merger = patches * (self.norm(c, 1, self.m) + 2 * self.m * c)
            pixels = 0 if self.s.lora_rank else patches * self.patch * self.m
            kept += self.vision.depth * block + merger + pixels
        if self.cast and not checkpointing:  # autocast's bf16 copies of the weights stay for the backward pass
            kept += 2 * self.linear
        return kept

    def update(self, groups: int) -> float:
        """Activations, and the most of what comes and goes: the head's logits, or a layer and its gradients."""
        text, vision, s = self.text, self.vision, self.s
        full, again = s.lora_rank == 0, s.activation_checkpointing  # all weights are trained; a layer is run again
        answers = groups * s.group_size * self.longest.T
        # A chunk of logits: four float32 tensors, and the head's own output. Its weight's bf16 copy and two gradients.
        chunk = min(max(rarl.HEAD_ELEMENTS, text.vocab_size), answers * text.vocab_size)
        head = (16 + self.m) * chunk + full * 8 * self.root
        gradients = lambda n, x: n * (3 * self.m * x.intermediate_size + 8 * x.hidden_size)
        decoder = gradients(groups * self.group, text) + again * self.text_layer(groups)
        tower = gradients(groups * self.longest.S, vision) + again * self.vision_block(groups)
        # The weights of two layers as gathered (or cast), and the gradients of one: bf16 and, to be summed, float32.
        layer = max(decoder, self.vision_trained * tower) + full * 10 * self.layer
        gathered_root = 2 * self.root if full and self.W > 1 else 0
        return self.activations(groups) + gathered_root + max(head, layer)

    # All of it

    def passing(self) -> dict[str, float]:
        """What comes and goes: one of these beside the state."""
        s = self.s
        batch, tokens = f"--rollout-batch {s.rollout_batch}", f"--max-tokens-per-forward {s.max_tokens_per_forward}"
        return {
            f"rollout, {batch}": self.rollout(min(s.rollout_batch, self.prompts), s.group_size),
            f"evaluation, {batch}": self.rollout(s.rollout_batch, 1),
            f"update, {tokens}": self.update(self.groups),
        }

    def peak(self) -> float:
        return sum(self.state().values()) + max(self.passing().values())

    def fit(self, card: float) -> tuple[int, int, float]:
        """The largest --rollout-batch and --max-tokens-per-forward for a card of so many bytes, 0 where not even one prompt
        fits; and the bytes that one prompt lacks, if positive."""
        room, G = card - RESERVE - sum(self.state().values()), self.s.group_size
        numbers = range(1, self.prompts + 1)
        prompts = max((n for n in numbers if max(self.rollout(n, G), self.rollout(n, 1)) <= room), default=0)
        groups = max((n for n in numbers if self.update(n) <= room), default=0)
        return prompts, groups * self.group, max(self.rollout(1, G), self.update(1)) - room

    # Beside the GPU

    def host(self) -> float:
        """Of all W processes, on one machine: one of them loads the whole model, and gathers it later to save it."""
        best = 4 * self.trained if self.s.validate_every else 0
        loading = self.weights * (2 if self.s.lora_rank else 4)
        saving = best + (4 * self.trained if self.s.lora_rank else 4 * self.weights)
        moments = 8 * self.trained if self.s.offload else 0
        return self.W * (PROCESS + (AHEAD + 1) * self.pixels) + moments + max(loading, saving)

    def checkpoint(self) -> float:
        """Trained weights and their two moments in float32, and those of the best policy once there is one."""
        return (16 if self.s.validate_every else 12) * self.trained


def without_weights(config: Any) -> Any:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # rarl's own is set when there are weights
    with torch.device("meta"):
        return Backbone(config)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # a shared one counts once


# --------------------------------------------------------------------------------------------------------------------
# What the plan is made from


def read_config(path: str | Path) -> Any:
    """config.json of a model's folder or hub id; of an adapter, its base's. Raises ModelError."""
    rarl.check_path(str(path))
    try:
        if (Path(path) / lora.CONFIG).is_file():
            path = lora.read_config(path)["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"the model is a {config.model_type}, and this code runs qwen2_5_vl")
        return config
    except Exception as error:  # damaged JSON makes transformers raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise rarl.ModelError(f"model {path}: cannot read config.json ({reason}): the plan needs that file") from None


def training_items(s: Settings, most: int) -> list[data.Item]:
    """The training images; without --data-root as many as a prompt holds, of `most` pixels, with labels of five digits."""
    if s.data_root or s.data not in READERS:  # drawn ones, or an unknown one, which is refused
        return load_splits(s.data, s.data_root, ("train",), task_overrides(s), s.skip_bad)[0]
    task = READERS[s.data][1]
    task = dataclasses.replace(task, decimals=3) if task.decimals < 0 else task  # unknown without labels
    side = math.isqrt(most)
    return [data.Item(str(i), 1e4, task, lambda: Image.new("L", (side, side))) for i in range(max(s.images))]


def longest_prompt(s: Settings, config: Any, items: Sequence[data.Item] | None = None) -> Longest:
    """From the sizes and labels of `items`; None: those of `training_items`.

    No tokenizer is asked: three letters of a question are taken for a token, two of an answer (in JSON each digit is one).
    """
    merge = config.vision_config.spatial_merge_size
    edge = merge * config.vision_config.patch_size
    most = s.max_pixels or 16384 * edge**2  # what Qwen's own preprocessor_config.json allows
    items = items or training_items(s, most)
    n = 1 if s.stage == 1 else max(s.images)
    tokens = 0  # of the largest image
    for item in items[:1] if s.data in DRAWN else items:  # drawings have one size
        width, height = size_of(item)
        height, width = data.smart_size(height, width, edge, 56 * 56, most)
        tokens = max(tokens, height * width // edge**2)
        if tokens == most // edge**2:
            break
    question = max(len(s.question or data.question_text(task, n)) for task in {item.task for item in items})
    P = n * (tokens + 9) + question // 3 + 24  # 9: "Image 1: " and the image's marks; 24: the chat's
    every_second_letter = SimpleNamespace(tokenizer=lambda texts: {"input_ids": [text[::2] for text in texts]})
    T = s.max_new_tokens or data.max_answer_tokens(every_second_letter, hardest_samples(list(items), (n,)))
    return Longest(P, n * tokens * merge**2, T)


def size_of(item: data.Item) -> tuple[int, int]:
    if item.path is None or not item.path.is_file():  # drawn, or a row of a file
        return item.image().size
    with Image.open(item.path) as image:  # reads no more than its header
        return image.size


# --------------------------------------------------------------------------------------------------------------------
# In a run


def filled_in(s: Settings, model: Any, items: Sequence[data.Item], world: World) -> Settings:
    """The settings with the largest --rollout-batch and --max-tokens-per-forward that fit this card, where they are 0.

    On a CPU: the defaults. Raises SettingError if nothing fits.
    """
    if world.device.type != "cuda" or (s.rollout_batch and s.max_tokens_per_forward):
        return with_usual_batches(s)
    plan, card = Plan(model.config, s, longest_prompt(s, model.config, items), world.size), card_bytes(world)
    prompts, tokens, missing = plan.fit(card)
    if missing > 0:
        raise SettingError(
            f"not even one prompt fits this card of {card / GB:.0f} GB: by the plan {missing / GB:.1f} GB are missing "
            "(python -m support.learner.plan says for what)"
        )
    prompts, tokens = s.rollout_batch or prompts, s.max_tokens_per_forward or tokens
    if world.main:
        print(f"by the memory plan: --rollout-batch {prompts} --max-tokens-per-forward {tokens}", file=sys.stderr)
    return dataclasses.replace(s, rollout_batch=prompts, max_tokens_per_forward=tokens)


def with_usual_batches(s: Settings) -> Settings:
    """The settings with the defaults of --rollout-batch and --max-tokens-per-forward where they are 0."""
    usual = Settings()
    batch, tokens = s.rollout_batch or usual.rollout_batch, s.max_tokens_per_forward or usual.max_tokens_per_forward
    return dataclasses.replace(s, rollout_batch=batch, max_tokens_per_forward=tokens)


def card_bytes(world: World) -> int:
    """Free bytes of the smallest card, before anything of the run is on it."""
    return min(world.gather(torch.cuda.mem_get_info(world.device)[0]))


def beside_the_plan(s: Settings, model: Any, prompts: Sequence[rarl.Prompt], T: int, world: World) -> str:
    """The most that this process has had on its GPU, and what the plan says of such a step."""
    longest = Longest(max(len(p.ids) for p in prompts), max(int(p.grid.prod(1).sum()) for p in prompts), T)
    planned, real = Plan(model.config, s, longest, world.size).peak(), torch.cuda.max_memory_allocated(world.device)
    return f"GPU memory after the first step: at most {real / GB:.1f} GB so far, by the plan {planned / GB:.1f} GB"


# --------------------------------------------------------------------------------------------------------------------
# The command


def column(plan: Plan, card: float) -> dict[str, str]:
    """The figures of one number of processes, for cards of so many bytes."""
    figures = plan.state() | plan.passing()
    figures["all at once, at most"] = plan.peak()
    figures["host memory of all processes"] = plan.host()
    figures["a checkpoint"] = plan.checkpoint()
    shown = {name: f"{x / GB:.1f}" if x >= 0.05 * GB else f"{x / GB:.2g}" for name, x in figures.items()}
    prompts, tokens, missing = plan.fit(card)
    shown["largest --rollout-batch"] = str(prompts or "-")
    shown["largest --max-tokens-per-forward"] = str(tokens or "-")
    shown[f"too much for a card of {card / GB:g} GB"] = f"{missing / GB:.1f}" if missing > 0 else "-"
    return shown


def plan_text(s: Settings, path: str | Path, card: float) -> str:
    """The table that is printed, for cards of so many GB. Raises ModelError or DataError."""
    config = read_config(path)
    longest = longest_prompt(s, config)
    plans = [Plan(config, s, longest, W) for W in (PROCESSES[:1] if s.offload else PROCESSES)]
    columns = [column(plan, card * GB) for plan in plans]
    table = [["GB per GPU, computed, not measured", *(f"W = {plan.W}" for plan in plans)]]
    table += [[name, *(figures[name] for figures in columns)] for name in columns[0]]
    head = (
        f"{s.model}: {plans[0].weights / 1e9:.2f} B parameters, {plans[0].trained / 1e9:.3g} B of them trained; "
        f"the longest prompt has {longest.P} tokens ({longest.S} patches), the longest answer {longest.T}"
    )
    return f"{head}\n\n{format_table(table)}"


def parse(argv: list[str] | None = None) -> tuple[Settings, float]:
    """The settings of the run, and GB of a card. Raises SettingError."""
    parser = argparse.ArgumentParser(
        prog="python -m support.learner.plan", allow_abbrev=False, epilog="All other arguments are those of train.py.",
        description="Compute what a run needs in memory, on 1 to 8 processes.",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory", type=number(float, 0), default=80.0, metavar="GB", help="of a card (default: 80)"
    )
    own, others = parser.parse_known_args(argv)
    return with_usual_batches(parse_settings(others, needed=("model",))), own.gpu_memory


def main(argv: list[str] | None = None) -> None:
    try:
        s, card = parse(argv)
        print(plan_text(s, TINY if s.model == "tiny" else s.model, card))
    except (SettingError, data.DataError, rarl.ModelError, OSError) as error:
        leave("plan", error)


if __name__ == "__main__":
    main()
