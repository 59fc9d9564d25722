"""Speed and memory of the shared prompt against the usual way, in one run on the same weights.

    python -m experiments.bench                                         # tiny/, this machine: the table of the README
    python -m experiments.bench --sweep group --out runs                # how cost grows with G: table and runs/bench_group.png
    python -m experiments.bench --shape 3b --micro 1 --checkpoint       # Qwen2.5-VL-3B's size, random weights, nothing to download

What is measured, ours and the usual way in turn, so that whatever else the machine does meets both; times as the median of
`--repeats` runs after a warm-up, memory once:

  rollout  sample G answers of T tokens to each of B prompts                   rarl.generate   against  model.generate
  update   log-probs with gradient, GRPO loss, backward                        rarl.logprobs   against  [prompt | answer] x N
  step     rollout, reference log-probs (beta > 0), update, gradient norm, AdamW
  memory   the most that one update allocates above weights and gradients

**The usual way** is what TRL 1.16 and its like do with transformers: the prompt and its pixels are repeated G times, padded
on the left; `model.generate` with sdpa attention and a cache of every copy; one forward over [prompt | answer] x N, the
head on answer positions only (logits_to_keep), log-softmax row by row, entropy without gradient.

What would be unfair, and what is done about it:
  1. Unequal answers. All have exactly T tokens: EOS is banned on our side, and unknown to the other (no eos_token_id). No
     top-k or top-p filter, no logits processor slows the usual way; ours does mask its banned tokens.
  2. Unequal batches. `--micro` prompts with all their answers go through one forward, in both. On a CPU the usual way likes
     small ones better than ours does: compare at several.
  3. Unequal precision. As train.py does, both sample from a copy of the weights in `--dtype`, and both update float32
     weights under autocast to it.
  4. Unequal results. Log-probs (of the sampled answers too) and gradients are compared; beyond tolerance the exit
     status is 1. The tolerance is that of the format: 5e-5 in float32, where each of the two ways is about 1e-5 away from
     float64 on tiny's random answers with G = 16.
  5. A memory that depends on the allocator. On CUDA it is max_memory_allocated. On CPU, where resident memory keeps what
     was freed, the profiler's log of every allocation and release is added up: the same quantity.
  6. A machine that others use: the spread is printed, and the ratio of the best runs beside that of the medians.
  7. A shape that suits us: long prompts and short answers are RARL's shape; with short prompts there is little to share.
  8. Gains that have nothing to do with sharing: ours also embeds patches by a matrix product and calls attention once for
     all equal windows of the vision tower. --group 1, where nothing can be shared, shows what these alone give.

"of peak": FLOPs that the update must do over time over those of a large matmul, measured here. Forward and backward are 3
times the forward; a linear layer costs 2 x weights x tokens (prompt tokens once per group, answer tokens, patches), attention
4 x width x the pairs (query, key) that may see each other. The usual way is charged with the same useful work.
"of bandwidth" (GPU): bytes that decoding must read, the language model's weights once per token step, the keys and values of
each prompt once and of the answers so far, over time over the rate of a large copy.

Legend of shapes: rarl.py.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

import grpo
import rarl

HERE = Path(__file__).resolve().parent.parent
PARTS = ("rollout", "update", "step", "memory")
WAYS = ("ours", "usual")
SHARES = ("of_peak", "of_bandwidth")
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 0.1}  # log-probs (relative beyond 1), gradients relative (norms)
SHAPES = {  # config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064),
}  # fmt: skip


class BenchError(ValueError):
    """A setting that cannot work; the message says what to do."""


# --------------------------------------------------------------------------------------------------------------------
# The usual way


def repeated(policy, prompts, G: int, answers: tuple[Tensor, Tensor] | None = None) -> dict:
    """Inputs of transformers' own forward: N = B*G rows [prompt, padded on the left | answer], pixels G times.

    answers  their ids and mask, both (N, T); None: prompts alone
    """
    P = max(len(p.ids) for p in prompts)
    left = lambda x: nn.functional.pad(x, (P - len(x), 0))
    rows = torch.stack([left(p.ids) for p in prompts]).repeat_interleave(G, 0).to(policy.device)  # (N, P)
    real = torch.stack([left(torch.ones_like(p.ids)) for p in prompts]).repeat_interleave(G, 0).to(policy.device)
    if answers is not None:
        ids, mask = answers
        rows, real = torch.cat([rows, ids], 1), torch.cat([real, mask.long()], 1)  # (N, P + T)
    return dict(
        input_ids=rows,
        attention_mask=real,
        pixel_values=torch.cat([p.pixels for p in prompts for _ in range(G)]).to(policy.device),
        image_grid_thw=torch.cat([p.grid for p in prompts for _ in range(G)]).to(policy.device),
        mm_token_type_ids=(rows == policy.model.config.image_token_id).int(),
    )


@torch.no_grad()
def usual_generate(policy, prompts, G: int, T: int) -> Tensor:
    """-> (N, T) sampled tokens."""
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=T, pad_token_id=policy.eos_id)
    policy.model.generation_config = config  # the model's own would fill in its EOS
    return policy.model.generate(**repeated(policy, prompts, G), generation_config=config)[:, -T:]


def usual_logprobs(policy, prompts, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """-> (N, T) log-probs and entropies."""
    N, T = ids.shape
    inputs = repeated(policy, prompts, N // len(prompts), (ids, mask))
    logits = policy.model(**inputs, logits_to_keep=T + 1, use_cache=False).logits  # (N, T+1, V)
    logits = logits.masked_fill_(policy.banned, -torch.inf)[:, :-1]  # in place: no second copy of the largest tensor
    logz = torch.stack([row.float().logsumexp(-1) for row in logits])  # (N, T)
    with torch.no_grad():
        p = [(row.float() - z[:, None]).exp() for row, z in zip(logits, logz, strict=True)]
        entropy = torch.stack([torch.special.entr(row).sum(-1) for row in p])
    return logits.gather(-1, ids[..., None]).squeeze(-1).float() - logz, entropy


# --------------------------------------------------------------------------------------------------------------------
# What is run, both ways


@dataclass
class Job:
    """One shape of work. `ids` (N, T) are random answers, `advantages` (N,) random too: only the work is measured."""

    policy: rarl.Policy
    actor: rarl.Policy  # what samples: the policy itself, or its copy in bfloat16
    reference: rarl.Policy | None
    optimizer: torch.optim.Optimizer
    prompts: list
    ids: Tensor
    advantages: Tensor
    micro: int
    dtype: torch.dtype

    @property
    def G(self) -> int:
        return len(self.ids) // len(self.prompts)

    def use(self, way: str) -> None:
        """Our attention and patch embedding or transformers' own, on the same weights."""
        for policy in filter(None, (self.policy, self.actor, self.reference)):
            policy.model.set_attn_implementation(rarl.ATTENTION if way == "ours" else "sdpa")
            embed = rarl.PatchEmbed if way == "ours" else Qwen2_5_VisionPatchEmbed
            policy.model.model.visual.patch_embed.__class__ = embed

    def rollout(self, way: str) -> Tensor:
        if way == "ours":
            return rarl.generate(self.actor, self.prompts, self.G, self.ids.shape[1]).ids
        return usual_generate(self.actor, self.prompts, self.G, self.ids.shape[1])

    def update(self, way: str, reference: rarl.Policy | None = None) -> list[Tensor]:
        """Gradients of the GRPO loss, added to .grad. -> log-probs, micro-batch by micro-batch"""
        logprobs = rarl.logprobs if way == "ours" else usual_logprobs
        self.policy.train(self.policy.model.is_activation_checkpointing)  # it needs training mode; Qwen has no dropout
        half = self.dtype == torch.bfloat16  # no cache, as in train.py: it would hold a bf16 copy of all weights
        amp = torch.autocast(self.policy.device.type, torch.bfloat16, enabled=half, cache_enabled=False)
        logps = []
        for b in range(0, len(self.prompts), self.micro):
            prompts, rows = self.prompts[b : b + self.micro], slice(b * self.G, (b + self.micro) * self.G)
            ids, mask, ref_logp = self.ids[rows], torch.ones_like(self.ids[rows], dtype=torch.bool), None
            with amp:
                logp, _ = logprobs(self.policy, prompts, ids, mask)
                if reference is not None:
                    with torch.no_grad():
                        ref_logp, _ = logprobs(reference, prompts, ids, mask)
            loss, _ = grpo.grpo_loss(logp, None, ref_logp, self.advantages[rows], mask, denominator=len(self.ids))
            loss.backward()
            logps.append(logp.detach())
        self.policy.eval()
        return logps

    def step(self, way: str) -> None:
        if self.actor is not self.policy:
            with torch.no_grad():
                torch._foreach_copy_(list(self.actor.parameters()), list(self.policy.parameters()))
        self.rollout(way)  # the update then scores `ids`, not what was sampled: the same answers in both ways
        self.update(way, self.reference)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def make_prompts(policy, B: int, images: int, pixels: int, seed: int) -> list:
    """Prompts of slightly different lengths: text, noise images with their marks, text. Duck-typed data.Prompt."""
    config, rng = policy.model.config, torch.Generator().manual_seed(seed)
    side = pixels // config.vision_config.patch_size
    width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    text = (~policy.banned.cpu()).nonzero().flatten()
    image = [config.vision_start_token_id, *[config.image_token_id] * (side // 2) ** 2, config.vision_end_token_id]
    prompts = []
    for b in range(B):
        words = text[torch.randint(len(text), (64 + b % 16,), generator=rng)]
        ids = torch.cat([words[:32], torch.tensor(image * images), words[32:]])
        patches = torch.randn(images * side * side, width, generator=rng)
        prompts.append(argparse.Namespace(ids=ids, pixels=patches, grid=torch.tensor([[1, side, side]] * images)))
    return prompts


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run, device: torch.device) -> int:
    """The most that was allocated at once while `run` ran, above what was allocated before."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):  # releases are negative
        now += size
        peak = max(peak, now)
    return peak


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matmul, the best of twenty."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(20))


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a 1 GB copy, read and written, the best of five."""
    a = torch.empty(2**30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * len(a) / min(seconds(lambda: b.copy_(a), device) for _ in range(5))


def weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv3d))


def update_flops(job: Job) -> float:
    """FLOPs of forward and backward that no implementation can avoid; see the docstring for the formula."""
    model, config = job.policy.model, job.policy.model.config
    text, vision = config.text_config, config.vision_config
    N, T = job.ids.shape
    lengths = [len(p.ids) for p in job.prompts]
    layers = weights(model.model.language_model)
    forward = 2 * layers * (sum(lengths) + N * (T - 1)) + 2 * model.lm_head.weight.numel() * N * T
    pairs = sum(P * (P + 1) // 2 + job.G * ((T - 1) * P + T * (T - 1) // 2) for P in lengths)
    forward += 4 * text.hidden_size * text.num_hidden_layers * pairs
    images, patches = sum(len(p.grid) for p in job.prompts), job.prompts[0].grid[0].prod().item()
    merger = weights(model.model.visual.merger)  # runs once per 2 x 2 patches
    forward += 2 * images * patches * (weights(model.model.visual) - merger + merger / vision.spatial_merge_size**2)
    window, side = vision.window_size // vision.patch_size, job.prompts[0].grid[0, 1].item()
    cuts = [min(window, side - i) for i in range(0, side, window)]
    local = sum((a * b) ** 2 for a in cuts for b in cuts)  # pairs of one image within its windows
    full = len(vision.fullatt_block_indexes)
    forward += 4 * vision.hidden_size * images * (full * patches**2 + (vision.depth - full) * local)
    return 3 * forward


def decode_bytes(job: Job) -> float:
    """Bytes that T - 1 decoding steps must read: weights, the prompts' keys and values once, the answers' own."""
    text, size = job.policy.model.config.text_config, job.dtype.itemsize
    N, T = job.ids.shape
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    tokens = sum(len(p.ids) for p in job.prompts) + N * T / 2
    model = job.policy.model
    return size * (T - 1) * (weights(model.model.language_model) + model.lm_head.weight.numel() + per_token * tokens)


def check_equality(job: Job) -> dict:
    """Log-probs of sampled answers, log-probs and gradients of the update: ours against the usual way."""
    gradients = lambda: [p.grad for p in job.policy.parameters() if p.grad is not None]
    logps: dict[str, Tensor] = {}
    ours: list[Tensor] = []  # gradients
    for way in WAYS:
        job.use(way)
        job.optimizer.zero_grad(set_to_none=False)
        logps[way] = torch.cat(job.update(way))
        ours = ours or [g.clone() for g in gradients()]
    norm = lambda tensors: (
        torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]).norm().item()
    )
    usual = norm(gradients())
    # In place: 3 B gradients are large.
    difference = norm(a.sub_(b) for a, b in zip(ours, gradients(), strict=True))
    # Relative where a log-prob is beyond -1: a trained policy finds random answers absurd (-30), and float32 has 7 digits.
    gap = lambda a, b: ((a - b).abs() / b.abs().clamp(min=1)).max().item()
    equality = {"logp": gap(logps["ours"], logps["usual"]), "gradient": difference / usual}
    with torch.no_grad():
        few = job.prompts[: job.micro]
        job.use("ours")
        rollout = rarl.generate(job.actor, few, job.G, job.ids.shape[1])
        job.use("usual")
        expected, _ = usual_logprobs(job.actor, few, rollout.ids, rollout.mask)
    equality["rollout_logp"] = gap(rollout.logp, expected)
    job.optimizer.zero_grad(set_to_none=False)
    return equality


def measure(job: Job, parts, repeats: int) -> dict:
    """{part: {way: {median, min, max}, ratio}}; seconds, for memory bytes."""
    device = job.policy.device
    results: dict[str, dict] = {}
    for part in parts:
        run, repeat = (job.update, 1) if part == "memory" else (getattr(job, part), 1 + repeats)  # 1 is the warm-up
        samples: dict[str, list[float]] = {way: [] for way in WAYS}
        take = peak_bytes if part == "memory" else seconds
        for _ in range(repeat):
            for way in WAYS:
                job.use(way)
                samples[way].append(take(partial(run, way), device))
        samples = {way: x[-repeats:] for way, x in samples.items()}
        results[part] = {
            way: {"median": statistics.median(x), "min": min(x), "max": max(x)} for way, x in samples.items()
        }
        ratio = lambda of, part=part: results[part]["usual"][of] / results[part]["ours"][of]
        results[part] |= {"ratio": ratio("median"), "ratio_of_best": ratio("min")}
    return results


# --------------------------------------------------------------------------------------------------------------------
# Set-up, tables, pictures


def shaped_policy(shape: str, device: torch.device):
    """The published architecture with random weights; tokenizer and image processor are tiny's."""
    from experiments import make_tiny

    small, sizes = make_tiny.build_policy(), SHAPES[shape]
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **sizes, max_position_embeddings=128000, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        ),
        vision_config=dict(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=sizes["hidden_size"],
            window_size=112, fullatt_block_indexes=[7, 15, 23, 31], patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        tie_word_embeddings=shape == "3b",
        **{name: getattr(small.model.config, name) for name in names},
    )  # fmt: skip
    with device:
        model = Qwen2_5_VLForConditionalGeneration(config)
    return rarl.Policy(model.eval(), small.tokenizer, small.image_processor)


def load(args: argparse.Namespace, device: torch.device) -> tuple[rarl.Policy, str]:
    """-> the policy, and what it is, in words."""
    if args.shape:
        policy, what = shaped_policy(args.shape, device), f"Qwen2.5-VL-{args.shape.upper()}'s shape, random weights"
    elif args.model == "tiny" and not (HERE / "tiny").is_dir():
        from experiments import make_tiny

        policy, what = make_tiny.build_policy(), "tiny's architecture, random weights"
        policy.to(device)
    else:
        folder = HERE / "tiny" if args.model == "tiny" else args.model
        policy, what = rarl.load_policy(folder, device), str(args.model)
    policy.banned[policy.eos_id] = True  # every answer takes its full length
    if args.checkpoint:
        policy.model.activation_checkpointing_enable()
    return policy, f"{what}, {sum(p.numel() for p in policy.parameters()) / 1e6:,.1f} M parameters"


def make_job(policy, actor, reference, optimizer, args: argparse.Namespace, dtype: torch.dtype) -> Job:
    rng = torch.Generator().manual_seed(args.seed)
    prompts = make_prompts(policy, args.prompts, args.images, args.pixels, args.seed)
    valid = (~policy.banned.cpu()).nonzero().flatten()
    ids = valid[torch.randint(len(valid), (args.prompts * args.group, args.tokens), generator=rng)]
    advantages = torch.randn(len(ids), generator=rng)
    micro = args.micro or args.prompts
    ids, advantages = ids.to(policy.device), advantages.to(policy.device)
    return Job(policy, actor, reference, optimizer, prompts, ids, advantages, micro, dtype)


def shares(job: Job, results: dict, machine: dict) -> None:
    """Add tokens per second, share of the matmul peak, share of the bandwidth, memory with weights and gradients."""
    for part, result in results.items():
        for way in WAYS:
            r = result[way]
            if part == "memory":
                r["total"] = r["median"] + 8 * sum(p.numel() for p in job.policy.parameters())
            else:
                r["tokens_per_second"] = job.ids.numel() / r["median"]
            if part == "update":
                r["of_peak"] = update_flops(job) / r["median"] / machine["flops"]
            if part == "rollout" and "bandwidth" in machine:
                r["of_bandwidth"] = decode_bytes(job) / r["median"] / machine["bandwidth"]


def table(results: dict) -> str:
    lines = [f"{'':9}{'ours':>27} {'usual':>27} {'ratio':>7} {'of best':>8}   answer tokens/s and shares: ours | usual"]
    for part, r in results.items():
        both = lambda form, key, scale=1.0, r=r: " | ".join(form.format(r[way][key] / scale) for way in WAYS)
        if part == "memory":
            unit, cells = "MB", [f"{r[way]['median'] / 1e6:,.1f}" for way in WAYS]
            notes = [both("{:,.1f}", "total", 1e6) + " MB with weights and gradients"]
        else:
            unit, cells = "s", ["{median:.3f} ({min:.3f}..{max:.3f})".format(**r[way]) for way in WAYS]
            notes = [both("{:,.0f}", "tokens_per_second") + " tok/s"]
        notes += [both("{:.1%}", key) + f" {key.replace('_', ' ')}" for key in SHARES if key in r["ours"]]
        lines.append(
            f"{part:7}{unit:>2}{cells[0]:>27} {cells[1]:>27} {r['ratio']:6.2f}x {r['ratio_of_best']:7.2f}x   {', '.join(notes)}"
        )
    return "\n".join(lines)


def draw(what: str, sweep: list[tuple[int, dict]], path: Path) -> None:
    """Cost against the swept setting, one panel for each part, both ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(sweep[0][1])
    figure, axes = plt.subplots(1, len(parts), figsize=(3.6 * len(parts), 3.2), squeeze=False, layout="constrained")
    values = [value for value, _ in sweep]
    for ax, part in zip(axes[0], parts, strict=True):
        scale, unit = (1e6, "MB") if part == "memory" else (1, "s")
        for way, color in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
            low, mid, high = ([r[part][way][k] / scale for _, r in sweep] for k in ("min", "median", "max"))
            ax.plot(values, mid, "o-", color=color, label=way)
            ax.fill_between(values, low, high, color=color, alpha=0.25)
        ax.set(xscale="log", yscale="log", title=part, xlabel=what, ylabel=unit, xticks=values)
        ax.set_xticks(values, [str(v) for v in values])
        ax.minorticks_off()
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Speed and memory of the shared prompt against the usual way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="tiny", help="policy: a Hugging Face folder or hub id; tiny is the embedded one")
    add("--shape", choices=SHAPES, help="instead of --model: this size of Qwen2.5-VL with random weights")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    add("--prompts", type=int, default=8, help="B, prompts")
    add("--images", type=int, default=4, help="images in each prompt")
    add("--pixels", type=int, default=224, help="side of an image, a multiple of 28")
    add("--group", type=int, default=8, help="G, answers to each prompt")
    add("--tokens", type=int, default=64, help="T, tokens of each answer")
    add("--micro", type=int, default=0, help="prompts (with all their answers) in one forward of the update; 0: all")
    add("--checkpoint", action="store_true", help="activation checkpointing (transformers' own), in both ways")
    add("--beta", type=float, default=0.04, help="weight of the KL; 0: the step has no reference policy")
    add("--repeats", type=int, default=5, help="timed runs of each, after one warm-up")
    add("--sweep", choices=("group", "images", "tokens"), help="repeat for each of --values and draw the growth")
    add("--values", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="of the swept setting")
    add("--out", type=Path, default=Path("runs"), help="folder of the sweep's picture, bench_<setting>.png")
    add("--json", type=Path, help="also write the results to this file")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU")
    add("--seed", type=int, default=0, help="of images, texts, answers")
    args = parser.parse_args(argv)
    for name in ("prompts", "images", "pixels", "group", "tokens", "repeats"):
        if getattr(args, name) < 1:
            raise BenchError(f"--{name} must be at least 1")
    if args.pixels % 28:
        raise BenchError(f"--pixels {args.pixels} must be a multiple of 28 (2 x 2 patches of 14 pixels)")
    if args.micro < 0 or args.beta < 0 or min(args.values) < 1:
        raise BenchError("--micro and --beta must not be negative, and --values must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda, but there is no GPU that torch can use: try --device cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    dtype = getattr(torch, args.dtype if args.dtype != "auto" else "bfloat16" if cuda else "float32")
    torch.manual_seed(args.seed)
    policy, what = load(args, device)
    actor = policy if dtype == torch.float32 else rarl.cast_copy(policy, dtype)
    reference = rarl.cast_copy(policy, dtype) if "step" in args.parts and args.beta > 0 else None
    # lr is tiny: a step must cost what it costs, and leave the weights (nearly) what they were.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
    machine: dict = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "flops": matmul_peak(device, dtype),
    }
    if cuda:
        machine["bandwidth"] = bandwidth(device)
    print(f"{what}; {machine['device']}, {str(dtype)[6:]}")

    runs: list[dict] = []
    failed = False
    for value in args.values if args.sweep else [None]:
        if args.sweep:
            setattr(args, args.sweep, value)
        job = make_job(policy, actor, reference, optimizer, args, dtype)
        tokens = [len(p.ids) for p in job.prompts]
        print(
            f"\n{args.prompts} prompts of {min(tokens)}..{max(tokens)} tokens ({args.images} images of {args.pixels}^2), "
            f"G = {args.group}, T = {args.tokens}, {job.micro} prompts in a forward"
        )
        equality, limit = check_equality(job), TOLERANCE[dtype]
        failed |= any(not x <= limit for x in equality.values())  # nan fails too
        print(
            "ours - usual: log-probs {logp:.1e}, of sampled answers {rollout_logp:.1e}, gradients {gradient:.1e} "
            "(relative)".format(**equality)
            + f"; tolerance {limit:.0e}"
        )
        results = measure(job, args.parts, args.repeats)
        # Once more: at the start somebody else may have had the machine.
        machine["flops"] = max(machine["flops"], matmul_peak(device, dtype))
        shares(job, results, machine)
        print(table(results), f"matmul peak {machine['flops'] / 1e9:,.0f} GFLOP/s", sep="\n", flush=True)
        runs.append({args.sweep or "run": value, "prompt_tokens": tokens, "equality": equality, "results": results})
    if args.sweep:
        path = args.out / f"bench_{args.sweep}.png"
        draw(args.sweep, [(run[args.sweep], run["results"]) for run in runs], path)
        print(f"\nwrote {path}")
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        out = {"model": what, "machine": machine, "settings": settings, "tolerance": TOLERANCE[dtype], "runs": runs}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    if failed:
        print("ours and the usual way differ by more than the tolerance", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchError, rarl.ModelError) as error:
        sys.exit(f"bench.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"bench.py: out of memory, lower --micro or --prompts, or add --checkpoint: {error}")
