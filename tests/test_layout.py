"""The rooms of the project: what the root holds, who may import whom, and that a leaf can be copied alone."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {
    "reward": set(),
    "grpo": {"torch"},
    "rmo": {"torch"},
    "rarl": {"torch", "transformers"},
    "data": {"torch", "numpy", "PIL"},
}
METHOD = {"reward.py", "grpo.py", "rmo.py", "rarl.py", "data.py", "train.py", "eval.py"}
OTHERS = {
    "tests",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "tiny",
    "docs",
    "support",
    "experiments",
}
MADE = {"runs", "__pycache__", "venv", "build"}  # by whoever works here
UPWARDS = {"support": {"train", "eval", "experiments"}, ".": {"experiments"}}  # room -> what it may not import


def imports(file, module_level=False):
    """Names of the modules that a file imports, at its top level or anywhere."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module


def first_names(file, **how):
    return {name.split(".")[0] for name in imports(file, **how)}


def test_the_root_holds_the_method_and_nothing_else():
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - MADE
    assert here == METHOD | OTHERS


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_imports_only_what_the_design_allows(leaf):
    """Anywhere in it: no leaf ever imports a sibling, not even inside a function."""
    assert first_names(ROOT / f"{leaf}.py") - set(sys.stdlib_module_names) <= LEAVES[leaf]


@pytest.mark.parametrize("room", UPWARDS)
def test_nobody_imports_upwards(room):
    files = sorted((ROOT / room).glob("*.py" if room == "." else "**/*.py"))
    assert len(files) >= 5
    for file in files:
        assert not first_names(file) & UPWARDS[room], file


def test_ctrl_c_is_quiet_from_the_first_import_on():
    """torch takes seconds to import, and Ctrl-C must not print a traceback then either."""
    commands = ("ablate", "bench", "drawn_labels", "make_tiny", "rescue")
    for name in commands:
        assert next(imports(ROOT / "experiments" / f"{name}.py", module_level=True)) == "support.run.quiet_end"


def run_alone(folder, *command):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_leaves_import_alone(tmp_path):
    # The tests of these two build the small policy with experiments/, so alone they can only be imported.
    for leaf in ("rarl", "data"):
        (tmp_path / leaf).mkdir()
        shutil.copy(ROOT / f"{leaf}.py", tmp_path / leaf)
    program = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, '{0}'); import {0}; del sys.path[0]"
    )
    run_alone(tmp_path, "-c", "; ".join(program.format(leaf) for leaf in ("data", "rarl")))


def test_leaves_pass_their_tests_alone(tmp_path):
    # Each in a folder of its own, all in one process. The fuzz test and the megabytes run in the suite itself.
    tests = []
    for leaf in ("reward", "grpo", "rmo"):
        (tmp_path / leaf).mkdir()
        shutil.copy(ROOT / f"{leaf}.py", tmp_path / leaf)
        shutil.copy(ROOT / "tests" / f"test_{leaf}.py", tmp_path / leaf)
        tests.append(f"{leaf}/test_{leaf}.py")
    options = ["-q", "-k", "not 100_000 and not megabyte", "-p", "no:cacheprovider"]
    # pytest puts the folder of a test file on the path when it is collected, so a leaf could borrow from one collected
    # earlier. The import test above rules that out.
    assert " passed" in run_alone(tmp_path, "-m", "pytest", *options, *tests)
