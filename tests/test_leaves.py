"""A leaf can be copied alone: it imports no sibling, and passes its own tests in an empty folder."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "reward": set(),
    "grpo": {"torch"},
    "rmo": {"torch"},
    "rarl": {"torch", "transformers"},
    "data": {"torch", "numpy", "PIL"},
}


@pytest.mark.parametrize("leaf", ALLOWED)
def test_leaf_imports_only_what_the_design_allows(leaf):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{leaf}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= ALLOWED[leaf]


def run_alone(folder, *command):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("leaf", ["rarl", "data"])
def test_leaf_imports_alone(leaf, tmp_path):
    # The tests of these two build the small policy with tiny.py, so alone they can only be imported.
    shutil.copy(ROOT / f"{leaf}.py", tmp_path)
    run_alone(tmp_path, "-c", f"import {leaf}")


@pytest.mark.parametrize("leaf", ["reward", "grpo", "rmo"])
def test_leaf_passes_its_tests_alone(leaf, tmp_path):
    shutil.copy(ROOT / f"{leaf}.py", tmp_path)
    shutil.copy(ROOT / "tests" / f"test_{leaf}.py", tmp_path)
    # The fuzz test runs in the suite itself; once is enough.
    run_alone(tmp_path, "-m", "pytest", "-q", "-k", "not fuzz", "-p", "no:cacheprovider", f"test_{leaf}.py")
