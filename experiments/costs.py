"""What a piece of work takes (seconds, peak memory), and the FLOPs that it cannot avoid."""

import os
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself otherwise

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from experiments.job import Job


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
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


def linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv3d))


def forward_flops(job: Job) -> float:
    """FLOPs of a forward pass that no implementation can avoid. bench.py's docstring has the formula."""
    model, config = job.policy.model, job.policy.model.config
    text, vision = config.text_config, config.vision_config
    N, T = job.ids.shape
    lengths = [len(p.ids) for p in job.prompts]
    layers = linear_weights(model.model.language_model)
    forward = 2 * layers * (sum(lengths) + N * (T - 1)) + 2 * model.lm_head.weight.numel() * N * T
    pairs = sum(P * (P + 1) // 2 + job.G * ((T - 1) * P + T * (T - 1) // 2) for P in lengths)
    forward += 4 * text.hidden_size * text.num_hidden_layers * pairs
    images, patches = sum(len(p.grid) for p in job.prompts), int(job.prompts[0].grid[0].prod())
    merger = linear_weights(model.model.visual.merger)  # runs once per 2 x 2 patches
    tower = linear_weights(model.model.visual) - merger
    forward += 2 * images * patches * (tower + merger / vision.spatial_merge_size**2)
    window, side = vision.window_size // vision.patch_size, int(job.prompts[0].grid[0, 1])
    cuts = [min(window, side - i) for i in range(0, side, window)]
    local = sum((a * b) ** 2 for a in cuts for b in cuts)  # pairs of one image within its windows
    full = len(vision.fullatt_block_indexes)
    forward += 4 * vision.hidden_size * images * (full * patches**2 + (vision.depth - full) * local)
    return forward
