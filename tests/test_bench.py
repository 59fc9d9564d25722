"""bench.py end to end on the smallest shape: it finishes, its table is whole, and both ways agree. No timing is judged."""

import json

import pytest

import rarl
from experiments import bench


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    rarl.save_policy(policy, folder)
    return folder


def run(folder, out, *more):
    shape = ["--prompts", "1", "--images", "1", "--pixels", "56", "--group", "2", "--tokens", "4", "--repeats", "1"]
    status = bench.main(["--model", str(folder), "--device", "cpu", *shape, "--json", str(out / "b.json"), *more])
    return status, json.loads((out / "b.json").read_text())


def test_all_parts(folder, tmp_path):
    status, result = run(folder, tmp_path)
    assert status == 0  # not 0 if log-probs or gradients differ
    (only,) = result["runs"]
    assert set(only["equality"]) == {"logp", "rollout_logp", "gradient"}
    assert max(only["equality"].values()) <= result["tolerance"] == 5e-5
    assert set(only["results"]) == set(bench.PARTS)
    for part, r in only["results"].items():
        assert r["ratio"] == r["usual"]["median"] / r["ours"]["median"]
        for way in bench.WAYS:
            assert 0 < r[way]["min"] <= r[way]["median"] <= r[way]["max"]
            assert ("tokens_per_second" in r[way]) == (part != "memory") and ("of_peak" in r[way]) == (part == "update")
    memory = only["results"]["memory"]  # a count, not a timing: two copies of the prompt take more than one
    assert memory["ours"]["median"] < memory["usual"]["median"]


def test_sweep_and_precision(folder, tmp_path):
    pytest.importorskip("matplotlib")
    more = ["--sweep", "group", "--values", "2", "3", "--parts", "memory", "--dtype", "bfloat16", "--checkpoint"]
    status, result = run(folder, tmp_path, "--out", str(tmp_path), *more)
    assert status == 0 and [r["group"] for r in result["runs"]] == [2, 3]
    assert (tmp_path / "bench_group.png").stat().st_size > 1000


def test_a_difference_is_an_error(folder, tmp_path, monkeypatch):
    honest = bench.usual_logprobs
    monkeypatch.setattr(bench, "usual_logprobs", lambda *args: [1.001 * x for x in honest(*args)])
    status, _ = run(folder, tmp_path, "--parts", "rollout")
    assert status == 1


def test_flops_by_hand(policy):
    # Two prompts of P = 64 + 4 + 2 and 65 + 4 + 2 tokens (text, 16 patches = 4 tokens, two marks), G = 2, T = 3: a
    # linear layer sees P + G (T-1) tokens of each, and a query of answer token t sees P + t keys.
    args = bench.parse(["--prompts", "2", "--images", "1", "--pixels", "56", "--group", "2", "--tokens", "3"])
    job = bench.make_job(policy, policy, None, None, args, bench.torch.float32)
    c, i = 128, 320  # hidden and intermediate size of the language model; 4 layers, key and value half as wide
    layer = c * c + 2 * c * c // 2 + c * c + 3 * c * i
    text = 2 * 4 * layer * (70 + 71 + 2 * 2 * 2) + 2 * c * len(policy.banned) * 2 * 2 * 3
    pairs = sum(P * (P + 1) // 2 + 2 * ((P + 1) + (P + 2)) for P in (70, 71))
    patch = 3 * 2 * 14 * 14 * c + 4 * (3 * c * c + c * c + 3 * c * 256)  # embedding and 4 blocks, for each patch
    merger = (4 * c) ** 2 + 4 * c * c  # for each 2 x 2 patches
    vision = 2 * 2 * (16 * patch + 4 * merger) + 2 * 4 * 4 * c * 16**2  # one window: full and local are the same
    assert bench.update_flops(job) == 3 * (text + 4 * 4 * c * pairs + vision)


def test_bad_settings():
    for argv, message in ((["--pixels", "100"], "multiple of 28"), (["--group", "0"], "--group must be"),
                          (["--micro", "-1"], "--micro")):  # fmt: skip
        with pytest.raises(bench.BenchError, match=message):
            bench.parse(argv)
    with pytest.raises(rarl.ModelError, match="does not exist"):
        bench.main(["--model", "./nowhere"])
