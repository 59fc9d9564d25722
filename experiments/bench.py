"""Speed and memory of the shared prompt against the usual way, in one run on the same weights.

    python -m experiments.bench                                    # tiny/, this machine: the table of experiments/README.md
    python -m experiments.bench --sweep group --out runs           # how cost grows with G: table and runs/bench_group.png
    python -m experiments.bench --device cuda                      # Qwen2.5-VL-3B's size, the presets' images; no download

What is measured, ours and the usual way in turn, so that whatever else the machine does meets both; times as the median of
`--repeats` runs after a warm-up, memory once:

  rollout    sample G answers of T tokens to each of B prompts                 rarl.generate   against  model.generate
  reference  log-probs without gradient, from the weights that sample          rarl.logprobs   against  [prompt | answer] x N
  update     log-probs with gradient, GRPO loss, backward                      the same
  step       rollout, reference (beta > 0), update, gradient norm, AdamW
  memory     the most that one update allocates above weights and gradients; on a GPU beside each of the others too

On a GPU the defaults are `ON_A_GPU`: a step of the presets, as far as it needs no optimizer, whose state would not fit beside both ways.

**The usual way** is what TRL 1.16 and its like do with transformers; usual_way.py has it. job.py runs both ways, costs.py
measures them.

What would be unfair, and what is done about it:
  1. Unequal answers. All have exactly T tokens: EOS is banned on our side, and unknown to the other (no eos_token_id). The
     usual way has no top-k or top-p filter and no logits processor to slow it. Ours masks its banned tokens.
  2. Unequal batches. In both ways `--micro` prompts with all their answers go through one forward. On a CPU small ones suit
     the usual way better than ours, so compare at several.
  3. Unequal precision. As train.py does, both sample from a copy of the weights in `--dtype`, and both update float32
     weights under autocast to it.
  4. Unequal results. Log-probs (of the sampled answers too) and gradients are compared. Beyond the tolerance the exit
     status is 1. The tolerance is that of the format: 5e-5 in float32, where each of the two ways is about 1e-5 away from
     float64 on tiny's random answers with G = 16; 0.3 in bfloat16, where gradients of either are 0.1 away from float32.
  5. Memory that depends on the allocator. On CUDA it is max_memory_allocated. On CPU resident memory keeps what was freed,
     so the profiler's log of every allocation and release is added up. That is the same quantity.
  6. A machine that others use. The spread is printed, and the ratio of the best runs beside that of the medians.
  7. A shape that suits us. Long prompts and short answers are RARL's shape; with short prompts there is little to share.
  8. Gains that have nothing to do with sharing. Ours also embeds patches by a matrix product, and calls attention once for
     all equal windows of the vision tower. --group 1, where nothing can be shared, shows what these alone give.

"of peak": FLOPs that must be done over time over those of a large matmul, measured here. Rollout and reference are a forward pass,
an update is 3 of them; a linear layer costs 2 x weights x tokens (prompt tokens once per group, answer tokens, patches), attention
4 x width x the pairs (query, key) that may see each other. The usual way is charged with the same useful work.
"of bandwidth" (GPU): bytes that decoding must read, the language model's weights once per token step, the keys and values of
each prompt once and of the answers so far, over time over the rate of a large copy.

Legend of shapes: rarl.py.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import rarl
from experiments import make_tiny
from experiments.commands import CommandError, check_writable, run_command
from experiments.costs import bandwidth, decode_bytes, forward_flops, matmul_peak, peak_bytes, seconds
from experiments.job import WAYS, Job, compare_ways, noise_prompts
from support.show.results import format_table

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("rollout", "reference", "update", "step", "memory")
METHODS = {"reference": "score", "memory": "update"}  # of a Job, where they are not named like the part
FORWARDS = {"rollout": 1, "reference": 1, "update": 3}  # how many forward passes a part costs
ON_A_GPU = dict(
    shape="3b", parts=list(PARTS[:3]), images=8, pixels=448, tokens=128, micro=1, checkpoint=True, repeats=3
)
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 0.3}  # log-probs (relative beyond 1), gradients relative (norms)
SHAPES = {  # config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Set-up


def shaped_policy(shape: str, device: torch.device) -> rarl.Policy:
    """The published architecture with random weights; tokenizer and image processor are tiny's."""
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
    elif args.model == "tiny" and not (ROOT / "tiny").is_dir():
        policy, what = make_tiny.build_policy().to(device), "tiny's architecture, random weights"
    else:
        folder = ROOT / "tiny" if args.model == "tiny" else args.model
        policy, what = rarl.load_policy(folder, device), str(args.model)
    policy.banned[policy.eos_id] = True  # every answer takes its full length
    if args.checkpoint:
        policy.model.activation_checkpointing_enable()
    return policy, f"{what}, {sum(p.numel() for p in policy.parameters()) / 1e6:,.1f} M parameters"


def make_job(policies: tuple, optimizer: torch.optim.Optimizer, args: argparse.Namespace, dtype: torch.dtype) -> Job:
    """policies  the policy, the one that samples, the reference or None"""
    policy, rollout_policy, reference = policies
    rng = torch.Generator().manual_seed(args.seed)
    prompts = noise_prompts(policy, args.prompts, args.images, args.pixels, args.seed)
    valid = (~policy.banned.cpu()).nonzero().flatten()
    ids = valid[torch.randint(len(valid), (args.prompts * args.group, args.tokens), generator=rng)].to(policy.device)
    advantages = torch.randn(len(ids), generator=rng).to(policy.device)
    for prompt in prompts:
        prompt.pixels = prompt.pixels.to(policy.device)
    micro = args.micro or args.prompts
    return Job(policy, rollout_policy, reference, optimizer, prompts, ids, advantages, micro, dtype)


# --------------------------------------------------------------------------------------------------------------------
# Measuring, tables, pictures


def take_turns(job: Job, parts: Sequence[str], repeats: int) -> dict[str, Any]:
    """{part: {way: {median, min, max}, ratio, ratio_of_best}}; seconds, for memory bytes. On a GPU with each part's "peak"."""
    device = job.policy.device
    results: dict[str, dict] = {}
    for part in parts:
        run = getattr(job, METHODS.get(part, part))
        repeat = 1 if part == "memory" else 1 + repeats  # 1 is the warm-up
        take: Callable[..., float] = peak_bytes if part == "memory" else seconds
        samples: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(repeat):
            for way in WAYS:
                job.use(way)
                samples[way].append(take(partial(run, way), device))
        of = {way: x[-repeats:] for way, x in samples.items()}
        results[part] = {way: {"median": statistics.median(x), "min": min(x), "max": max(x)} for way, x in of.items()}
        usual, ours = results[part]["usual"], results[part]["ours"]
        results[part] |= {"ratio": usual["median"] / ours["median"], "ratio_of_best": usual["min"] / ours["min"]}
        if device.type == "cuda" and part != "memory":
            for way in WAYS:
                job.use(way)
                results[part][way]["peak"] = peak_bytes(partial(run, way), device) / 1e9
    return results


def add_shares(job: Job, results: dict[str, Any], machine: dict[str, Any]) -> None:
    """Add tokens per second, share of the matmul peak, share of the bandwidth, memory with weights and gradients."""
    for part, result in results.items():
        for way in WAYS:
            r = result[way]
            if part == "memory":
                r["total"] = r["median"] + 8 * sum(p.numel() for p in job.policy.parameters())
            else:
                r["tokens_per_second"] = job.ids.numel() / r["median"]
            if part in FORWARDS:
                r["of_peak"] = FORWARDS[part] * forward_flops(job) / r["median"] / machine["flops"]
            if part == "rollout" and "bandwidth" in machine:
                r["of_bandwidth"] = decode_bytes(job) / r["median"] / machine["bandwidth"]


def bench_table(results: dict[str, Any]) -> str:
    """A row for each part. Times with their range; what follows the ratios is ours | usual."""
    notes = {
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "of_peak": ("of peak", "{:.1%}"),
        "of_bandwidth": ("of bandwidth", "{:.1%}"),
        "peak": ("peak GB", "{:.2f}"),
    }
    shown = {k: v for k, v in notes.items() if any(k in r["ours"] for r in results.values())}
    rows = [["", "ours", "usual", "ratio", "of best", *(title for title, _ in shown.values())]]
    for part, r in results.items():
        form = "{:,.1f} MB" if part == "memory" else "{:.3f} s ({:.3f} to {:.3f})"
        scale = 1e6 if part == "memory" else 1
        cells = [form.format(*(r[way][k] / scale for k in ("median", "min", "max"))) for way in WAYS]
        cells += [f"{r[k]:.2f} x" for k in ("ratio", "ratio_of_best")]
        for key, (_, form) in shown.items():
            cells.append(" | ".join(form.format(r[way][key]) for way in WAYS) if key in r["ours"] else "")
        rows.append([part, *cells])
    if "memory" in results:
        totals = " | ".join(f"{results['memory'][way]['total'] / 1e6:,.1f}" for way in WAYS)
        return f"{format_table(rows)}\nmemory with weights and gradients: {totals} MB"
    return format_table(rows)


def draw_growth(what: str, sweep: list[tuple[int, dict[str, Any]]], path: Path) -> None:
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


# --------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="experiments.bench", description="Speed and memory of the shared prompt against the usual way.",
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
    asked = parser.parse_known_args(argv)[0]
    if asked.device != "cpu" and torch.cuda.is_available():
        parser.set_defaults(**ON_A_GPU)
        args = parser.parse_args(argv)
        args.shape = args.shape if asked.model == "tiny" else asked.shape
    else:
        args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise CommandError for what cannot work, before anything is loaded or measured."""
    for name in ("prompts", "images", "pixels", "group", "tokens", "repeats"):
        if getattr(args, name) < 1:
            raise CommandError(f"--{name} must be at least 1")
    if args.pixels % 28:
        raise CommandError(f"--pixels {args.pixels} must be a multiple of 28 (2 x 2 patches of 14 pixels)")
    if args.micro < 0 or not 0 <= args.beta < float("inf") or min(args.values) < 1:
        raise CommandError("--micro and --beta must be finite and not negative, and --values must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise CommandError(f"--seed {args.seed} must be from 0 to 2^63 - 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda, but there is no GPU that torch can use: try --device cpu")
    if args.sweep:
        check_writable(args.out / f"bench_{args.sweep}.png", "--out")
    if args.json:
        check_writable(args.json, "--json")


def describe(job: Job, args: argparse.Namespace) -> list[int]:
    """Print the shape of the work. -> tokens of each prompt"""
    tokens = [len(p.ids) for p in job.prompts]
    print(
        f"\n{args.prompts} prompts of {min(tokens)} to {max(tokens)} tokens ({args.images} images of {args.pixels}^2), "
        f"G = {args.group}, T = {args.tokens}, {job.micro} prompts in a forward"
    )
    return tokens


def measure_shape(job: Job, args: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """One line and one table: whether both ways agree, and what each takes."""
    tokens, equality = describe(job, args), compare_ways(job)
    print(
        "ours - usual: log-probs {logp:.1e}, of sampled answers {rollout_logp:.1e}, gradients {gradient:.1e} "
        "(relative)".format(**equality)
        + f"; tolerance {TOLERANCE[job.dtype]:.0e}"
    )
    results = take_turns(job, args.parts, args.repeats)
    # The peak once more: at the start somebody else may have had the machine.
    machine["flops"] = max(machine["flops"], matmul_peak(job.policy.device, job.dtype))
    add_shares(job, results, machine)
    print(bench_table(results), f"matmul peak {machine['flops'] / 1e9:,.0f} GFLOP/s", sep="\n", flush=True)
    return {args.sweep or "run": getattr(args, args.sweep or "", None), "prompt_tokens": tokens, "equality": equality, "results": results}  # fmt: skip


def bench(argv: list[str] | None = None) -> int:
    """-> exit status: 1 if the two ways differ by more than the tolerance. Raises CommandError, rarl.ModelError, OSError."""
    args = parse(argv)
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    dtype = getattr(torch, args.dtype if args.dtype != "auto" else "bfloat16" if cuda else "float32")
    torch.manual_seed(args.seed)
    policy, what = load(args, device)
    rollout_policy = policy if dtype == torch.float32 else rarl.cast_copy(policy, dtype)
    reference = rarl.cast_copy(policy, dtype) if "step" in args.parts and args.beta > 0 else None
    # lr is tiny: a step must cost what it costs, and leave the weights (nearly) what they were.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "flops": matmul_peak(device, dtype),
    }
    if cuda:
        machine["bandwidth"] = bandwidth(device)
    print(f"{what}; {machine['device']}, {str(dtype)[6:]}")
    runs = []
    for value in args.values if args.sweep else [None]:
        if args.sweep:
            setattr(args, args.sweep, value)
        job = make_job((policy, rollout_policy, reference), optimizer, args, dtype)
        runs.append(measure_shape(job, args, machine))
    write_results(runs, args, {"model": what, "machine": machine, "tolerance": TOLERANCE[dtype]})
    failed = any(not x <= TOLERANCE[dtype] for run in runs for x in run["equality"].values())  # nan fails too
    if failed:
        print("ours and the usual way differ by more than the tolerance", file=sys.stderr)
    return int(failed)


def write_results(runs: list[dict[str, Any]], args: argparse.Namespace, about: dict[str, Any]) -> None:
    if args.sweep:
        path = args.out / f"bench_{args.sweep}.png"
        draw_growth(args.sweep, [(run[args.sweep], run["results"]) for run in runs], path)
        print(f"\nwrote {path}")
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.write_text(json.dumps(about | {"settings": settings, "runs": runs}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    hint = "lower --micro, --prompts or --group, or add --checkpoint"
    run_command("experiments.bench", lambda: bench(argv), out_of_memory=hint)


if __name__ == "__main__":
    main()
