"""Shared by the tests: one small random policy, one short run, and what belongs to pytest and is given back to it. The leaves'
own tests (test_reward, test_grpo, test_rmo) need nothing of it."""

import contextlib
import io
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # in all processes: other numbers of threads round differently
os.environ["OMP_WAIT_POLICY"] = (
    "passive"  # where a test takes two: beside other work they would wait for each other at full speed
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    with contextlib.suppress(ImportError):  # the leaves' tests without torch
        import torch

        torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def signals():
    """train.py listens to signals; here they belong to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def policy():
    """The embedded policy's architecture with random weights, large enough that tokens, positions and images matter."""
    import torch

    from experiments import make_tiny

    torch.manual_seed(0)
    policy = make_tiny.build_policy()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return policy


@pytest.fixture(scope="session")
def policy_folder(policy, tmp_path_factory):
    """That policy, saved. Not to be written to."""
    import rarl

    folder = tmp_path_factory.mktemp("policy") / "model"
    rarl.save_policy(policy, folder)
    return folder


@pytest.fixture(scope="session")
def run_both_stages(tmp_path_factory):
    """A short run of both stages on the embedded policy, never interrupted. -> where it ran, what it printed"""
    from runs import copies_when_logged, train_here

    folder, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), copies_when_logged((1, 1), (2, 1)):
        patch.chdir(folder)
        patch.setattr("support.show.monitor.watch_curves", lambda folder: None)  # slow; see test_curves.py
        train_here("--watch-every", "24")
    return folder, printed.getvalue()


@pytest.fixture(scope="session")
def finished(run_both_stages):
    """-> the folder of that run (not to be written to), what it printed"""
    folder, printed = run_both_stages
    return folder / "runs" / "rarl", printed


@pytest.fixture
def killed(run_both_stages, here):
    """-> function: stage -> the folder, here, of that run as if it was killed in the stage's second step, after a checkpoint"""

    def copy(stage):
        shutil.copytree(run_both_stages[0] / f"killed-{stage}-1", "runs")
        return here / "runs" / "rarl"

    return copy
