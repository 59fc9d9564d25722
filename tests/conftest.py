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
