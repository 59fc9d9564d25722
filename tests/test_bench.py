"""experiments/bench.py end to end on the smallest shape: its table is whole, and both ways agree. No timing is judged."""

import json

import pytest
import torch

import rarl
from experiments import bench, costs, job
from experiments.commands import CommandError

SHAPE = ["--prompts", "1", "--images", "1", "--pixels", "56", "--group", "2", "--tokens", "4", "--repeats", "1"]


def run(folder, out, *more):
    status = bench.bench(["--model", str(folder), "--device", "cpu", *SHAPE, "--json", str(out / "b.json"), *more])
    return status, json.loads((out / "b.json").read_text())


@pytest.fixture
def known_peak(monkeypatch):
    """The machine's matmul peak takes a second to measure; one test does."""
    monkeypatch.setattr(bench, "matmul_peak", lambda *args: 1e10)


def test_all_parts(policy_folder, tmp_path, capsys):
    status, result = run(policy_folder, tmp_path)
    assert status == 0  # not 0 if log-probs or gradients differ
    (only,) = result["runs"]
    assert set(only["equality"]) == {"logp", "rollout_logp", "gradient"}
    assert max(only["equality"].values()) <= result["tolerance"] == 5e-5
    assert set(only["results"]) == set(bench.PARTS)
    for part, r in only["results"].items():
        assert r["ratio"] == r["usual"]["median"] / r["ours"]["median"]
        for way in job.WAYS:
            assert 0 < r[way]["min"] <= r[way]["median"] <= r[way]["max"]
            assert ("tokens_per_second" in r[way]) == (part != "memory") and ("of_peak" in r[way]) == (
                part in bench.FORWARDS
            )
    memory = only["results"]["memory"]  # a count, not a timing: two copies of the prompt take more than one
    assert memory["ours"]["median"] < memory["usual"]["median"]
    printed = capsys.readouterr().out
    assert all(f"\n{part} " in printed for part in bench.PARTS)


def test_sweep_and_precision(policy_folder, tmp_path, known_peak):
    pytest.importorskip("matplotlib")
    more = ["--sweep", "group", "--values", "2", "3", "--parts", "memory", "--dtype", "bfloat16", "--checkpoint"]
    status, result = run(policy_folder, tmp_path, "--out", str(tmp_path), *more)
    assert status == 0 and [r["group"] for r in result["runs"]] == [2, 3]
    assert (tmp_path / "bench_group.png").stat().st_size > 1000


def test_a_difference_is_an_error(policy_folder, tmp_path, monkeypatch, known_peak):
    honest = job.usual_logprobs
    monkeypatch.setattr(job, "usual_logprobs", lambda *args: [1.001 * x for x in honest(*args)])
    status, _ = run(policy_folder, tmp_path, "--parts", "rollout")
    assert status == 1


def test_flops_by_hand(policy):
    # Two prompts of P = 64 + 4 + 2 and 65 + 4 + 2 tokens (text, 16 patches = 4 tokens, two marks), G = 2, T = 3: a
    # linear layer sees P + G (T-1) tokens of each, and a query of answer token t sees P + t keys.
    args = bench.parse(["--prompts", "2", "--images", "1", "--pixels", "56", "--group", "2", "--tokens", "3"])
    work = bench.make_job((policy, policy, None), None, args, torch.float32)
    c, i = 128, 320  # hidden and intermediate size of the language model; 4 layers, key and value half as wide
    layer = c * c + 2 * c * c // 2 + c * c + 3 * c * i
    text = 2 * 4 * layer * (70 + 71 + 2 * 2 * 2) + 2 * c * len(policy.banned) * 2 * 2 * 3
    pairs = sum(P * (P + 1) // 2 + 2 * ((P + 1) + (P + 2)) for P in (70, 71))
    patch = 3 * 2 * 14 * 14 * c + 4 * (3 * c * c + c * c + 3 * c * 256)  # embedding and 4 blocks, for each patch
    merger = (4 * c) ** 2 + 4 * c * c  # for each 2 x 2 patches
    vision = 2 * 2 * (16 * patch + 4 * merger) + 2 * 4 * 4 * c * 16**2  # one window: full and local are the same
    assert costs.forward_flops(work) == text + 4 * 4 * c * pairs + vision


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pixels", "100"], "multiple of 28"),
        (["--group", "0"], "--group must be"),
        (["--micro", "-1"], "--micro"),
        (["--beta", "nan"], "--beta"),
        (["--values", "0"], "--values"),
        (["--seed", "-1"], "--seed"),
        (["--sweep", "group", "--out", "FILE"], "--out"),
        (["--json", "FILE/b.json"], "--json"),
        (["--json", "FOLDER"], "--json"),
    ],
)
def test_bad_settings(argv, message, tmp_path):
    (tmp_path / "file").write_text("x")
    argv = [x.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path)) for x in argv]
    with pytest.raises(CommandError, match=message):
        bench.parse(argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]  # the check leaves nothing behind


def test_a_model_that_does_not_exist():
    with pytest.raises(rarl.ModelError, match="does not exist"):
        bench.bench(["--model", "./nowhere"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CommandError("--group must be at least 1"), "--group must be at least 1"),
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
