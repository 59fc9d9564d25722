"""What a run needs in memory, computed from the model's config before anything is loaded.

    python -m support.learner.plan --gpu-memory 80 --preset utkface --model Qwen/Qwen2.5-VL-3B-Instruct

takes the settings of train.py (without --data-root every image is taken to be of --max-pixels) and prints a table. No weights are read, no GPU is needed. Each figure is a sum over tensors that the code is known to hold; what they are is
said beside the formula. On a CPU the parameters, the cache and the activations are held against real ones in
tests/test_plan.py. On a GPU nothing has been measured: figures for it follow from its dtypes alone.

Letters: P tokens, S image patches of the longest prompt; T tokens of the longest answer; G answers to a prompt; W processes;
C hidden size, I width of the MLP, H query heads, D head size, V vocabulary. GB is 10^9 bytes.
"""

import support.run.quiet_end  # noqa: F401  first: Ctrl-C during the slow imports below is one line

# isort: split
import argparse
import copy
import dataclasses
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from support.run.preflight import task_overrides
from support.run.settings import SettingError, Settings, parse_settings
from support.show.results import format_table

GB = 1e9
RESERVE = 2 * GB  # of a card: CUDA's own, libraries' workspaces, gaps that the allocator leaves
PROCESSES = (1, 2, 4, 8)
PROCESS = 3 * GB  # host memory of Python and torch
FILE = 2**30  # bytes of a file of a checkpoint, see support/run/checkpoints.py
TINY = Path(__file__).resolve().parent.parent.parent / "tiny"


@dataclass(frozen=True)
class Longest:
    """The longest prompt and the longest answer of the data."""

    P: int
    S: int
    T: int


class Plan:
    """Bytes of one process of W on a GPU. With gpu=False: of one process on the CPU, where all is float32."""

    def __init__(self, model: Any, s: Settings, longest: Longest, W: int = 1, gpu: bool = True) -> None:
        self.s, self.W, self.gpu, self.longest = s, W, gpu, longest
        self.text, self.vision = model.config.text_config, model.config.vision_config
        core = model.model
        size: Callable[[Any], int] = lambda module: sum(
            p.numel() for p in module.parameters()
        )  # a shared weight counts once
        self.weights, self.layer = size(model), max(size(x) for x in [*core.language_model.layers, *core.visual.blocks])
        self.root = self.weights - size(core.language_model.layers) - size(core.visual.blocks)
        kept = {id(p) for m in model.modules() if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
        self.linear = sum(p.numel() for p in model.parameters() if id(p) not in kept)
        if s.lora_rank:
            layers = [model.get_submodule(name) for name in lora.target_names(model, s.lora_targets)]
            self.trained = sum(s.lora_rank * (x.in_features + x.out_features) for x in layers)
        else:
            self.trained = self.weights - s.freeze_vision * size(core.visual)
        self.vision_trained = not s.freeze_vision if s.lora_rank == 0 else "vision" in s.lora_targets
        # Bytes of a number: in matrix products; in the stream between layers, which is as wide as the embeddings' weights.
        self.m = 2 if gpu else 4
        self.cast = gpu and W == 1 and s.lora_rank == 0  # float32 weights under autocast. FSDP gathers bf16 ones
        self.stream = 4 if self.cast or not gpu else 2
        self.prompts = math.ceil(s.batch_size / W)

    # What is always there

    def state(self) -> dict[str, float]:
        """Weights in their roles, as support/learner/learner.py (Learner) holds them."""
        s, W, base, kl = self.s, self.W, self.weights, self.s.beta > 0
        # Of all prompts of a step (Learner.prepare): their pixels as bytes, and in bf16 what a frozen vision tower made of them.
        # Of two steps, as the loop holds a batch until it has the next.
        features = 0 if self.vision_trained else self.text.hidden_size // self.vision.spatial_merge_size**2
        images = 2 * (self.pixels() + self.prompts * self.longest.S * 2 * features)
        if s.lora_rank:  # one copy of the base in bf16, on every rank; adapters in float32
            weights, sampling = 2 * base + 4 * self.trained, 0
            reference = 4 * self.trained if kl and s.stage != 1 else 0  # stage 2: the adapters of stage 1
            W = 1
        else:
            weights, sampling = 4 * base / W, 2 * base
            # One process casts linear layers alone. Several cast all and shard it, but FSDP keeps the gathered root.
            reference = kl * (2 * self.linear + 4 * (base - self.linear) if W == 1 else 2 * base / W + 2 * self.root)
        moments = 0 if s.offload else 8 * self.trained / W
        return {"weights": weights, "gradients": 4 * self.trained / W, "Adam's moments": moments,
                "reference": reference, "copy that samples": sampling, "images of two steps": images}  # fmt: skip

    def pixels(self) -> int:
        """Of all prompts of a step, as they travel."""
        return self.prompts * self.longest.S * self.patch() // self.vision.temporal_patch_size

    def patch(self) -> int:
        """Numbers of a patch as it is multiplied."""
        return self.vision.in_channels * self.vision.temporal_patch_size * self.vision.patch_size**2

    # The rollout

    def cache(self, prompts: int, group: int) -> float:
        """Keys and values of every layer: the prompt's once, and T of each answer."""
        each = 2 * self.text.num_key_value_heads * (self.text.hidden_size // self.text.num_attention_heads) * self.m
        return self.text.num_hidden_layers * each * prompts * (self.longest.P + group * self.longest.T)

    def rollout(self, prompts: int, group: int) -> float:
        """The most of: encoding the images, prefill, decoding."""
        P, S = self.longest.P, self.longest.S
        text, vision = self.text, self.vision
        # A layer without gradient: three tensors as wide as the MLP, or queries and keys rotated in float32.
        work = lambda tokens, x: tokens * (3 * x.intermediate_size * self.m + 20 * x.hidden_size)
        own_prompts = self.cache(prompts, 0)
        prefill = (
            own_prompts + self.cache(prompts, group) + work(prompts * P, text)
        )  # transformers' cache is copied to ours
        # Dropping finished answers copies up to 3/4 of the cache. Sampling: log-probs, and two float64 tensors as large.
        logits = 20 * prompts * group * text.vocab_size
        # What each query may see, of all answers' places: two tensors of bool become the bias. A copy is made with the cache's.
        queries = group * text.num_attention_heads // text.num_key_value_heads
        bias = (2 * self.m + 2) * prompts * queries * (P + group * self.longest.T)
        return max(work(prompts * S, vision), prefill, 1.75 * self.cache(prompts, group) + logits) + bias

    # The update

    def norm(self, C: int, readers: int, stream: int) -> int:
        """A norm and the linear layers that read it keep, per token: its input in float32; what its weight is multiplied
        with, if that is trained; its output, cast for each reader where weights are float32."""
        weight = 0 if self.s.lora_rank else stream * C
        return 4 * C + weight + self.m * C * (readers if self.cast else min(readers, 1))

    def text_layer(self, groups: int) -> float:
        """What the backward pass of a decoder layer needs of its forward, for a packed row of `groups` prompts."""
        (P, T), (C, I, H), G, m = (self.longest.P, self.longest.T), sizes(self.text), self.s.group_size, self.m
        tokens, keys = groups * (P + G * (T - 1)), groups * (P + G * (P + T - 1))
        attention = (
            2 * m * C + 4 * H + (0 if self.gpu else m * C)
        )  # queries, output (on a CPU put together anew), log-sums
        mlp = 4 * m * I  # gate, silu(gate), up, their product
        gathered = keys * 2 * m * self.text.num_key_value_heads * (C // H)  # each answer's prompt beside its own
        mask = 0 if self.gpu else 4 * groups * G * (T - 1) * (P + T - 1)
        return (
            tokens * (self.norm(C, 3, self.stream) + self.norm(C, 2, self.stream) + attention + mlp) + gathered + mask
        )

    def vision_block(self, groups: int) -> float:
        C, I, H = sizes(self.vision)
        attention = 6 * self.m * C + 4 * H  # queries, keys and values as projected; queries and keys rotated; output
        norms = self.norm(C, 1, self.m) + self.norm(C, 2, self.m)  # between blocks it is as the patches: bf16 on a GPU
        return groups * self.longest.S * (norms + attention + 4 * self.m * I)

    def activations(self, groups: int, checkpointing: bool) -> float:
        """All that is kept from the forward to the backward pass of a packed row."""
        (P, T, S), C, c, G = (
            (self.longest.P, self.longest.T, self.longest.S), self.text.hidden_size, self.vision.hidden_size, self.s.group_size,
        )  # fmt: skip
        tokens, patches, stream = groups * (P + G * (T - 1)), groups * S, self.stream
        # With checkpointing a layer keeps its input. The last norm and what the head reads are kept either way.
        layer = tokens * stream * C if checkpointing else self.text_layer(groups)
        kept = self.text.num_hidden_layers * layer + tokens * self.norm(C, 0, stream) + groups * G * T * stream * C
        if self.vision_trained:
            block = patches * self.m * c if checkpointing else self.vision_block(groups)
            merger = patches * (self.norm(c, 1, self.m) + 2 * self.m * c)
            pixels = 0 if self.s.lora_rank else patches * self.patch() * self.m
            kept += self.vision.depth * block + merger + pixels
        if self.cast and not checkpointing:  # autocast's bf16 copies of the weights stay for the backward pass
            kept += 2 * self.linear
        return kept

    def update(self, groups: int, checkpointing: bool) -> float:
        """Activations, and the most of what comes and goes: the head's logits, or a layer and its gradients."""
        text, vision, full = self.text, self.vision, self.s.lora_rank == 0
        answers = groups * self.s.group_size * self.longest.T
        # A chunk of logits: four float32 tensors, and the head's own output. Its weight's bf16 copy and two gradients.
        chunk = min(max(rarl.HEAD_ELEMENTS, text.vocab_size), answers * text.vocab_size)
        head = (16 + self.m) * chunk + full * 8 * self.root
        tokens = groups * self.group()
        gradients = lambda n, x: n * (3 * self.m * x.intermediate_size + 8 * x.hidden_size)
        blocks = gradients(tokens, text), self.vision_trained * gradients(groups * self.longest.S, vision)
        if checkpointing:
            blocks = blocks[0] + self.text_layer(groups), blocks[1] + self.vision_trained * self.vision_block(groups)
        # The weights of two layers as gathered (or cast), and the gradients of one: bf16 and, to be summed, float32.
        layer = max(blocks) + full * 10 * self.layer
        gathered_root = 2 * self.root if full and self.W > 1 else 0
        return self.activations(groups, checkpointing) + gathered_root + max(head, layer)

    # All of it

    def passing(self) -> dict[str, float]:
        """What comes and goes: one of these beside the state."""
        s, own = self.s, min(self.s.rollout_batch, self.prompts)
        return {
            "rollout": self.rollout(own, s.group_size),
            "evaluation": self.rollout(s.rollout_batch, 1),
            "update": self.update(self.groups(), s.activation_checkpointing),
        }

    def groups(self) -> int:
        """Of them the update packs so many into a forward."""
        return max(1, min(self.s.max_tokens_per_forward // self.group(), self.prompts))

    def group(self) -> int:
        """Tokens of a prompt and its answers in the update."""
        return self.longest.P + self.s.group_size * (self.longest.T - 1)

    def peak(self) -> float:
        return sum(self.state().values()) + max(self.passing().values())

    def most_prompts(self, room: float) -> int:
        """The largest --rollout-batch for which rollout and evaluation fit."""
        G = self.s.group_size
        return largest(lambda n: max(self.rollout(n, G), self.rollout(n, 1)) <= room, self.prompts)

    def most_tokens(self, room: float, checkpointing: bool) -> int:
        """The largest --max-tokens-per-forward."""
        return largest(lambda n: self.update(n, checkpointing) <= room, self.prompts) * self.group()

    # Beside the GPU

    def host(self) -> float:
        """Of all W processes, on one machine: one of them loads the whole model, and gathers it later to save it."""
        best = 4 * self.trained if self.s.validate_every else 0
        loading = self.weights * (2 if self.s.lora_rank else 4)
        saving = best + (4 * self.trained if self.s.lora_rank else 4 * self.weights)
        moments = 8 * self.trained if self.s.offload else 0
        files = 2 * min(FILE, self.checkpoint())  # of a checkpoint one is made in memory: its tensors, its bytes
        return self.W * (PROCESS + (AHEAD + 1) * self.pixels() + files) + moments + max(loading, saving)

    def checkpoint(self) -> float:
        """Trained weights and their two moments in float32, and those of the best policy once there is one."""
        return (16 if self.s.validate_every else 12) * self.trained


def sizes(config: Any) -> tuple[int, int, int]:
    return config.hidden_size, config.intermediate_size, config.num_attention_heads


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 0 if none does. By bisection: where n fits, so does less."""
    return bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))


def read_model(path: str | Path) -> Any:
    """The model of a folder or hub id, without weights. Of an adapter, its base. Raises ModelError."""
    rarl.check_path(str(path))
    try:
        if (Path(path) / lora.CONFIG).is_file():
            path = lora.read_config(path)["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"the model is a {config.model_type}, and this code runs qwen2_5_vl")
        text, vision = config.text_config, config.vision_config
        counts = (text.num_key_value_heads, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        if min(*sizes(text), *sizes(vision), *counts) < 1:
            raise ValueError("a size in it is not positive")
        with torch.device("meta"):
            return Backbone(config)
    except Exception as error:  # damaged JSON makes transformers raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise rarl.ModelError(f"model {path}: cannot read config.json ({reason}): the plan needs that file") from None


def longest_prompt(s: Settings, model: Any, items: Sequence[data.Item] | None = None) -> Longest:
    """From the sizes of the training images (`items`; None: they are read), or without --data-root from --max-pixels alone.

    No tokenizer is asked: three letters of a question are taken for a token, two of an answer (in JSON each digit is one).
    """
    vision = model.config.vision_config
    merge, edge = vision.spatial_merge_size, vision.spatial_merge_size * vision.patch_size
    most = s.max_pixels or 16384 * edge**2  # what Qwen's own preprocessor_config.json allows
    n = 1 if s.stage == 1 else max(s.images)
    if items is None:
        items = []
        if s.data in DRAWN or s.data_root:
            items = load_splits(s.data, s.data_root, ("train",), task_overrides(s), s.skip_bad)[0]
        elif s.data not in READERS:
            raise data.DataError(f"--data {s.data} is unknown: choose one of {', '.join([*DRAWN, *READERS])}")
    tokens = 0 if items else most // edge**2
    for item in items[:100] if s.data in DRAWN else items:  # drawings have one size
        if tokens < most // edge**2:
            width, height = size_of(item)
            height, width = data.smart_size(height, width, edge, 56 * 56, most)
            tokens = max(tokens, height * width // edge**2)
    # Of each task the labels that take the most letters.
    labels: dict[data.Task, list[float]] = {} if items else {READERS[s.data][1]: [1e4]}
    for item in items:
        labels.setdefault(item.task, []).append(item.label)
    ends = [
        data.Item("", x, task, lambda: Image.new("RGB", (1, 1)))
        for task, some in labels.items()
        for x in (min(some), max(some))
    ]
    question = max(len(s.question or data.question_text(task, n)) for task in labels)
    P = n * (tokens + 9) + question // 3 + 24  # 9: "Image 1: " and the image's marks; 24: the chat's
    guess = SimpleNamespace(tokenizer=lambda texts: {"input_ids": [text[::2] for text in texts]})
    T = s.max_new_tokens or data.max_answer_tokens(guess, [data.Sample((item,) * n) for item in ends])
    return Longest(P, n * tokens * merge**2, T)


def shapes(model: Any) -> Any:
    """The model without weights and adapters."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # rarl's own is set when there are weights
    with torch.device("meta"):
        return Backbone(config)


def filled_in(s: Settings, model: Any, items: Sequence[data.Item], world: World) -> Settings:
    """The settings with the largest --rollout-batch and --max-tokens-per-forward that fit this card, where they are 0.

    On a CPU: the defaults, as far as they go. Raises SettingError if nothing fits.
    """
    if s.rollout_batch and s.max_tokens_per_forward:
        return s
    if world.device.type == "cuda":
        plan, card = Plan(shapes(model), s, longest_prompt(s, model, items), world.size), card_bytes(world)
        room = card - RESERVE - sum(plan.state().values())
        batch = s.rollout_batch or plan.most_prompts(room)
        tokens = s.max_tokens_per_forward or plan.most_tokens(room, s.activation_checkpointing)
        if not (batch and tokens):
            least = max(plan.rollout(1, s.group_size), plan.update(1, s.activation_checkpointing))
            raise SettingError(
                f"not even one prompt fits this card of {card / GB:.0f} GB: by the plan {(least - room) / GB:.1f} GB are missing "
                "(python -m support.learner.plan says for what)"
            )
        if world.main:
            print(f"by the memory plan: --rollout-batch {batch} --max-tokens-per-forward {tokens}", file=sys.stderr)
        return dataclasses.replace(s, rollout_batch=batch, max_tokens_per_forward=tokens)
    return with_usual_batches(s)


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
    planned, real = Plan(shapes(model), s, longest, world.size).peak(), torch.cuda.max_memory_allocated(world.device)
    return f"GPU memory after the first step: at most {real / GB:.1f} GB so far, by the plan {planned / GB:.1f} GB"


def size_of(item: data.Item) -> tuple[int, int]:
    if item.path is None or not item.path.is_file():  # drawn, or a row of a file
        return item.image().size
    try:
        with Image.open(item.path) as image:  # its header
            return image.size
    except Exception as error:  # on broken bytes the decoders raise whatever they happen to run into
        raise data.DataError(f"image file {item.path} cannot be read ({error}): replace it or take it out") from None


def column(plan: Plan, card: float) -> tuple[dict[str, str], str]:
    """The figures of one number of processes, and the sentence about it if nothing fits a card of so many GB."""
    s, state = plan.s, plan.state()
    room = card * GB - RESERVE - sum(state.values())
    passing = plan.passing()
    gb = lambda x: f"{x / GB:.1f}" if x >= 0.05 * GB else f"{x / GB:.2g}"
    rows = {name: gb(x) for name, x in state.items()}
    rows |= {
        f"rollout, --rollout-batch {s.rollout_batch}": gb(passing["rollout"]),
        "  of that, its cache": gb(plan.cache(min(s.rollout_batch, plan.prompts), s.group_size)),
        f"evaluation, --rollout-batch {s.rollout_batch}": gb(passing["evaluation"]),
    }
    fit = {"largest --rollout-batch": plan.most_prompts(room)}
    for how, checkpointing in (("with", True), ("without", False)):
        row = f"update, --max-tokens-per-forward {s.max_tokens_per_forward}, {how} *"
        rows[row] = gb(plan.update(plan.groups(), checkpointing))
        fit[f"largest --max-tokens-per-forward, {how} *"] = plan.most_tokens(room, checkpointing)
    rows |= {"all at once, at most": gb(plan.peak())}
    rows |= {name: str(x) if x else "-" for name, x in fit.items()}
    rows |= {"host memory of all processes": gb(plan.host()), "a checkpoint": gb(plan.checkpoint())}
    least = max(plan.rollout(1, s.group_size), plan.update(1, True))
    what = f"{plan.W} process{'es' * (plan.W > 1)}"
    return rows, f"{what}: {(least - room) / GB:.1f} GB too much for a {card:g} GB card" if least > room else ""


def plan_text(s: Settings, path: str | Path, card: float) -> str:
    """The table that is printed, for cards of so many GB. Raises ModelError or DataError."""
    model = read_model(path)
    longest = longest_prompt(s, model)
    plans = [Plan(model, s, longest, W) for W in (PROCESSES[:1] if s.offload else PROCESSES)]
    columns = [column(plan, card) for plan in plans]
    table = [["GB per GPU, computed, not measured", *(f"W = {plan.W}" for plan in plans)]]
    table += [[name, *(rows[name] for rows, _ in columns)] for name in columns[0][0]]
    head = (
        f"{s.model}: {plans[0].weights / 1e9:.2f} B parameters, {plans[0].trained / 1e9:.3g} B of them trained; "
        f"the longest prompt has {longest.P} tokens ({longest.S} patches), the longest answer {longest.T}"
    )
    notes = [f'* --activation-checkpointing; "-": not even one prompt fits a card of {card:g} GB']
    return "\n".join([head, "", format_table(table), *notes, *(said for _, said in columns if said)])


def parse(argv: list[str] | None = None) -> tuple[Settings, float]:
    """The settings of the run, and GB of a card. Raises SettingError."""
    parser = argparse.ArgumentParser(
        prog="python -m support.learner.plan", allow_abbrev=False, epilog="All other arguments are those of train.py.",
        description="Compute what a run needs in memory, on 1 to 8 processes.",
    )  # fmt: skip
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of a card (default: 80)")
    own, others = parser.parse_known_args(argv)
    if not 0 < own.gpu_memory < math.inf:
        raise SettingError(f"--gpu-memory {own.gpu_memory} must be positive and finite")
    s = parse_settings(others, needed=("model",))
    return with_usual_batches(s), own.gpu_memory  # of what is 0 the table names the largest


def main(argv: list[str] | None = None) -> None:
    try:
        s, card = parse(argv)
        print(plan_text(s, TINY if s.model == "tiny" else s.model, card))
    except (SettingError, data.DataError, rarl.ModelError, OSError) as error:
        leave("plan", error)


if __name__ == "__main__":
    main()
