"""experiments/bench.py end to end on the smallest shape: its table is whole, and both ways agree. No timing is judged."""

from functools import partial

import pytest
import torch

import rarl
from experiments import bench, costs, job
from experiments.commands import CommandError

SHAPE = ["--prompts", "1", "--images", "1", "--pixels", "56", "--group", "2", "--tokens", "4", "--repeats", "1"]


def run(folder, *more):
    return bench.bench(["--model", str(folder), "--device", "cpu", *SHAPE, *more])


def test_all_parts(policy_folder, capsys):
    assert run(policy_folder) == 0  # not 0 if log-probs or gradients differ
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0].strip(","): words[1:] for words in lines if words and words[0].strip(",") in bench.PARTS}
    assert set(rows) == set(bench.PARTS)
    # a count, not a timing: two copies of the prompt take more than one
    part, ours, _, usual, _, ratio, _ = rows["memory"]
    assert part == "update"
    assert 0 < float(ours) < float(usual)
    assert float(ratio) == pytest.approx(float(usual) / float(ours), rel=0.03)  # of rounded numbers


def test_flops_by_hand(policy):
    # Two prompts of P = 64 + 4 + 2 and 65 + 4 + 2 tokens (text, 16 patches = 4 tokens, two marks), G = 2, T = 3: a
    # linear layer sees P + G (T-1) tokens of each, and a query of answer token t sees P + t keys.
    shape = ["--prompts", "2", "--images", "1", "--pixels", "56", "--group", "2", "--tokens", "3", "--device", "cpu"]
    work = bench.make_job(policy, bench.parse(shape), torch.float32)
    c, i = 128, 320  # hidden and intermediate size of the language model; 4 layers, key and value half as wide
    layer = c * c + 2 * c * c // 2 + c * c + 3 * c * i
    text = 2 * 4 * layer * (70 + 71 + 2 * 2 * 2) + 2 * c * len(policy.banned) * 2 * 2 * 3
    pairs = sum(P * (P + 1) // 2 + 2 * ((P + 1) + (P + 2)) for P in (70, 71))
    patch = 3 * 2 * 14 * 14 * c + 4 * (3 * c * c + c * c + 3 * c * 256)  # embedding and 4 blocks, for each patch
    merger = (4 * c) ** 2 + 4 * c * c  # for each 2 x 2 patches
    vision = 2 * 2 * (16 * patch + 4 * merger) + 2 * 4 * 4 * c * 16**2  # one window: full and local are the same
    assert costs.forward_flops(work) == text + 4 * 4 * c * pairs + vision


def test_speed_as_a_share_of_the_peak():
    took = {"update": {"ours": [1.0], "usual": [2.0]}, "step": {"ours": [1.0], "usual": [1.0]}}
    table = bench.shares_table(took, 8, 1e8, 1e9)
    assert table.splitlines()[1].split() == ["update", "8", "|", "4", "30.0%", "|", "15.0%"] and "step" not in table


def test_medians_and_ratios_by_hand():
    took, memory = {"ours": [1.0, 2.0, 6.0], "usual": [4.0, 5.0, 9.0]}, {"ours": 2e6, "usual": 5e6}
    rows = [" ".join(row.split()) for row in bench.bench_table({"step": took}, {"update": memory}).splitlines()]
    assert rows[1] == "step 2.000 s (1.000 to 6.000) 5.000 s (4.000 to 9.000) 2.50 x 4.00 x"
    assert rows[2] == "memory, update 2.0 MB 5.0 MB 2.50 x"


def test_sweep_and_precision(policy_folder, capsys):
    more = ["--sweep", "group", "--values", "2", "3", "--parts", "memory", "--dtype", "bfloat16", "--checkpoint"]
    assert run(policy_folder, *more) == 0
    printed = capsys.readouterr().out
    assert printed.count("\nmemory, update ") == 2 and "G = 2," in printed and "G = 3," in printed


@pytest.mark.parametrize("gap", [6e-5, float("nan")])
def test_a_difference_is_an_error(policy_folder, monkeypatch, gap):
    monkeypatch.setattr(bench, "compare_ways", lambda work: {"log-probs": (0.0, 5e-5), "gradients": (gap, 5e-5)})
    assert run(policy_folder, "--parts", "memory") == 1


@pytest.mark.parametrize("dtype, wrong", [(torch.float32, 1.001), (torch.bfloat16, 1.05)])
def test_a_difference_is_seen(policy, monkeypatch, dtype, wrong):
    """bfloat16 hides what is smaller than its own error."""
    work = bench.make_job(policy, bench.parse(["--device", "cpu", *SHAPE]), dtype)
    assert all(gap <= most for gap, most in job.compare_ways(work).values())
    for module, name in ((job.rarl, "logprobs"), (job.rarl, "generate")):
        honest = getattr(module, name)
        monkeypatch.setattr(module, name, partial(scaled, honest, wrong))
    gaps = job.compare_ways(work)
    work.use("ours")
    assert all(gap > most for gap, most in gaps.values())
    assert dtype == torch.bfloat16 or min(gap for gap, _ in gaps.values()) > 5e-4


def test_one_wrong_log_prob_of_many_is_seen(policy, monkeypatch):
    work = bench.make_job(policy, bench.parse(["--device", "cpu", *SHAPE, "--group", "32"]), torch.float32)
    honest = rarl.generate

    def one_off(*args):
        rollout = honest(*args)
        rollout.logp[5, 2] *= 1 + 2e-4
        return rollout

    monkeypatch.setattr(rarl, "generate", one_off)
    seen = {name for name, (gap, most) in job.compare_ways(work).items() if gap > most}
    work.use("ours")
    assert seen == {"the furthest of them"}


def scaled(function, by, *args):
    """Its log-probs, times `by`."""
    out = function(*args)
    return rarl.Rollout(out.ids, out.mask, by * out.logp) if isinstance(out, rarl.Rollout) else (by * out[0], out[1])


@pytest.mark.parametrize("argv", [["--group", "0"], ["--micro", "-1"], ["--values", "0"], ["--sweep", "nonsense"]])
def test_bad_settings_are_refused(argv):
    with pytest.raises(SystemExit) as end:
        bench.parse(argv)
    assert end.value.code == 2


def test_what_cannot_work_is_one_sentence():
    with pytest.raises(CommandError, match="--pixels 100 must be a multiple of 28"):
        bench.parse(["--pixels", "100"])
    with pytest.raises(rarl.ModelError, match="does not exist"):
        bench.bench(["--model", "./nowhere"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CommandError("--pixels 100 must be"), "--pixels 100 must be"),
        (rarl.ModelError("two\nlines"), "two lines"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower --micro"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "out of memory: lower"),
    ],
)
def test_mistakes_end_in_one_line(error, message, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr(bench, "bench", fail)
    with pytest.raises(SystemExit) as end:
        bench.main([])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("experiments.bench: ") and message in line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(bench, "bench", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        bench.main([])
