"""Speed and memory of the shared prompt against the usual way, in one run on the same weights.

    python -m experiments.bench                                    # tiny/, this machine: the table of experiments/README.md
    python -m experiments.bench --sweep group                      # how cost grows with G, a table for each
    python -m experiments.bench --device cuda                      # Qwen2.5-VL-3B's size, the presets' images; no download

What is measured, ours and the usual way in turn, so that whatever else the machine does meets both; times as the median of
`--repeats` runs after a warm-up, memory once:

  rollout    sample G answers of T tokens to each of B prompts                 rarl.generate   against  model.generate
  reference  log-probs without gradient, from the weights that sample          rarl.logprobs   against  [prompt | answer] x N
  update     log-probs with gradient, GRPO loss, backward                      the same
  step       rollout, reference, update, gradient norm, AdamW
  memory     the most that an update allocates above weights and gradients; on a GPU also of rollout and reference

A second table has what the times mean: answer tokens a second, and the share "of peak": FLOPs that must be done, over time, over those of
a large matmul, measured here. Rollout and reference are a forward pass, an update is 3 of them. A linear layer costs 2 x weights x
tokens (prompt tokens once per group, answer tokens, patches), attention 4 x width x the pairs (query, key) that may see each
other. The usual way is charged with the same useful work.

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
  4. Unequal results. Log-probs (of the sampled answers too) and gradients are compared with those of the usual way in float32.
     Where ours is further from them than the usual way in `--dtype` allows (`MAY_BE` in job.py), the exit status is 1.
  5. Memory that depends on the allocator. On CUDA it is max_memory_allocated. On CPU resident memory keeps what was freed,
     so the profiler's log of every allocation and release is added up. That is the same quantity.
  6. A machine that others use. The spread is printed, and the ratio of the best runs beside that of the medians.
  7. A shape that suits us. Long prompts and short answers are RARL's shape; with short prompts there is little to share.
  8. Gains that have nothing to do with sharing. Ours also embeds patches by a matrix product, and calls attention once for
     all equal windows of the vision tower. --group 1, where nothing can be shared, shows what these alone give.

Legend of shapes: rarl.py.
"""

import support.run.quiet_end  # isort: skip  # noqa: F401

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

import rarl
from experiments.commands import CommandError, at_least, run_command
from experiments.costs import forward_flops, matmul_peak, peak_bytes, seconds
from experiments.full_size import SHAPES, random_policy
from experiments.job import WAYS, Job, compare_ways, noise_prompts
from support.show.results import format_table

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("rollout", "reference", "update", "step", "memory")
FORWARDS = {"rollout": 1, "reference": 1, "update": 3}  # how many forward passes a part costs
ON_A_GPU = dict(
    shape="3b", parts=["rollout", "reference", "update", "memory"], images=8, pixels=448, tokens=128, micro=1,
    checkpoint=True, repeats=3,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Set-up


def load(args: argparse.Namespace, device: torch.device) -> tuple[rarl.Policy, str]:
    """-> the policy, and what it is, in words."""
    if args.shape:
        policy, what = random_policy(args.shape, device), f"Qwen2.5-VL-{args.shape.upper()}'s shape, random weights"
    else:
        folder = ROOT / "tiny" if args.model == "tiny" else args.model
        policy, what = rarl.load_policy(folder, device), str(args.model)
    policy.banned[policy.eos_id] = True  # every answer takes its full length
    if args.checkpoint:
        policy.model.activation_checkpointing_enable()
    return policy, f"{what}, {sum(p.numel() for p in policy.parameters()) / 1e6:,.1f} M parameters"


def make_job(policy: rarl.Policy, args: argparse.Namespace, dtype: torch.dtype) -> Job:
    rng = torch.Generator().manual_seed(0)
    prompts = noise_prompts(policy, args.prompts, args.images, args.pixels)
    for prompt in prompts:
        prompt.pixels = prompt.pixels.to(policy.device)
    valid = (~policy.banned.cpu()).nonzero().flatten()
    ids = valid[torch.randint(len(valid), (args.prompts * args.group, args.tokens), generator=rng)].to(policy.device)
    advantages = torch.randn(len(ids), generator=rng).to(policy.device)
    sampler = policy if dtype == torch.float32 else rarl.cast_copy(policy, dtype)
    return Job(policy, sampler, prompts, ids, advantages, args.micro or args.prompts, dtype)


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def take_turns(job: Job, part: str, repeats: int) -> dict[str, list[float]]:
    """Way -> seconds of each run, without the warm-up."""
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + repeats):
        for way in WAYS:
            job.use(way)
            took[way].append(seconds(partial(getattr(job, part), way), job.policy.device))
    return {way: x[1:] for way, x in took.items()}


def memory_of(job: Job, part: str) -> dict[str, float]:
    """Way -> bytes at the peak."""
    peaks: dict[str, float] = {}
    for way in WAYS:
        job.use(way)
        peaks[way] = peak_bytes(partial(getattr(job, part), way), job.policy.device)
    return peaks


def bench_table(took: dict[str, dict[str, list[float]]], memory: dict[str, dict[str, float]]) -> str:
    """part -> way -> seconds, part -> way -> bytes. A row for each; times with their range."""
    rows = [["", "ours", "usual", "ratio", "of best"]]
    for part, times in took.items():
        cells = [f"{statistics.median(x):.3f} s ({min(x):.3f} to {max(x):.3f})" for x in (times[w] for w in WAYS)]
        ratio = statistics.median(times["usual"]) / statistics.median(times["ours"])
        of_best = min(times["usual"]) / min(times["ours"])
        rows.append([part, *cells, f"{ratio:.2f} x", f"{of_best:.2f} x"])
    for part, peaks in memory.items():
        cells = [f"{peaks[way] / 1e6:,.1f} MB" for way in WAYS]
        rows.append([f"memory, {part}", *cells, f"{peaks['usual'] / peaks['ours']:.2f} x", ""])
    return format_table(rows)


def shares_table(took: dict[str, dict[str, list[float]]], tokens: int, flops: float, peak: float) -> str:
    """The same times as speed: a row for each part that has a cost in FLOPs, ours | usual in each cell.

    tokens  of all answers    flops  of a forward pass    peak  FLOP/s of the device
    """
    rows = [["", "tokens/s", f"of peak ({peak / 1e9:,.0f} GFLOP/s)"]]
    for part in [part for part in took if part in FORWARDS]:
        seconds = [statistics.median(took[part][way]) for way in WAYS]
        speed = " | ".join(f"{tokens / x:,.0f}" for x in seconds)
        rows.append([part, speed, " | ".join(f"{FORWARDS[part] * flops / x / peak:.1%}" for x in seconds)])
    return format_table(rows)


def measure(job: Job, args: argparse.Namespace) -> bool:
    """Print one line and one table: whether both ways agree, and what each takes. -> whether they agree"""
    tokens = [len(prompt.ids) for prompt in job.prompts]
    print(
        f"\n{args.prompts} prompts of {min(tokens)} to {max(tokens)} tokens ({args.images} images of {args.pixels}^2), "
        f"G = {args.group}, T = {args.tokens}, {job.micro} prompts in a forward"
    )
    gaps = compare_ways(job)
    apart = ", ".join(f"{name} {gap:.1e} (may be {most:.1e})" for name, (gap, most) in gaps.items())
    print(f"ours from the usual way in float32, relative: {apart}")
    took = {part: take_turns(job, part, args.repeats) for part in args.parts if part != "memory"}
    # A CPU counts by a log of every allocation, which takes long: of the update alone, the part that needs most.
    where = FORWARDS if job.policy.device.type == "cuda" else ["update"]
    memory = {part: memory_of(job, part) for part in where if "memory" in args.parts}
    print(bench_table(took, memory), flush=True)
    if not FORWARDS.keys().isdisjoint(took):
        peak = matmul_peak(job.policy.device, job.dtype)
        print(f"\n{shares_table(took, job.ids.numel(), forward_flops(job), peak)}", flush=True)
    return all(gap <= most for gap, most in gaps.values())  # nan is not


# --------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises CommandError."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench", description="Speed and memory of the shared prompt against the usual way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add, positive = parser.add_argument, at_least(1)
    add("--model", default="tiny", help="policy: a Hugging Face folder or hub id; tiny is the embedded one")
    add("--shape", choices=SHAPES, help="instead of --model: this size of Qwen2.5-VL with random weights")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    add("--prompts", type=positive, default=8, help="B, prompts")
    add("--images", type=positive, default=4, help="images in each prompt")
    add("--pixels", type=positive, default=224, help="side of an image, a multiple of 28")
    add("--group", type=positive, default=8, help="G, answers to each prompt")
    add("--tokens", type=positive, default=64, help="T, tokens of each answer")
    micro = "prompts (with all their answers) in one forward of the update; 0: all"
    add("--micro", type=at_least(0), default=0, help=micro)
    add("--checkpoint", action="store_true", help="activation checkpointing (transformers' own), in both ways")
    add("--repeats", type=positive, default=5, help="timed runs of each, after one warm-up")
    add("--sweep", choices=("group", "images", "tokens"), help="measure once for each of --values of this setting")
    add("--values", type=positive, nargs="+", default=[2, 4, 8, 16, 32], help="of the swept setting")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU")
    args, a_gpu = parser.parse_args(argv), torch.cuda.is_available()
    if args.device == "cuda" and not a_gpu:
        raise CommandError("--device cuda, but there is no GPU that torch can use: try --device cpu")
    if args.device != "cpu" and a_gpu:
        parser.set_defaults(**ON_A_GPU)
        if args.model != "tiny":
            parser.set_defaults(shape=None)
        args = parser.parse_args(argv)
        args.device = "cuda"
    else:
        args.device = "cpu"
    if args.pixels % 28:
        raise CommandError(f"--pixels {args.pixels} must be a multiple of 28 (2 x 2 patches of 14 pixels)")
    return args


def bench(argv: list[str] | None = None) -> int:
    """-> exit status: 1 if the two ways differ by more than the tolerance. Raises CommandError, rarl.ModelError, OSError."""
    args = parse(argv)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype if args.dtype != "auto" else "bfloat16" if args.device == "cuda" else "float32")
    torch.manual_seed(0)
    policy, what = load(args, device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{what}; {where}, torch {torch.__version__}, {str(dtype)[6:]}")
    agree = True
    for value in args.values if args.sweep else [None]:
        if args.sweep:
            setattr(args, args.sweep, value)
        agree &= measure(make_job(policy, args, dtype), args)
    if not agree:
        print("ours is too far from the usual way", file=sys.stderr)
    return int(not agree)


def main(argv: list[str] | None = None) -> None:
    hint = "lower --micro, --prompts or --group, or add --checkpoint"
    run_command("experiments.bench", lambda: bench(argv), out_of_memory=hint)


if __name__ == "__main__":
    main()
