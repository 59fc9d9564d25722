"""Shared by the tests: one small random policy. The leaves' own tests (test_reward, test_grpo, test_rmo) need nothing of it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


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
def finished(tmp_path_factory):
    """A short run of both stages on the embedded policy, never interrupted. -> its folder, what it printed"""
    import contextlib
    import io
    import os

    from runs import train_here

    folder, here, printed = tmp_path_factory.mktemp("finished"), os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            train_here("--watch-every", "24")
    finally:
        os.chdir(here)
    return folder / "runs" / "rarl", printed.getvalue()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As in the tests' other processes (OMP_NUM_THREADS=1): other numbers of threads round differently."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
