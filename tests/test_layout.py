"""The rooms of the project: what the root holds, who may import whom, and that a leaf can be copied alone."""

import ast
import graphlib
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"reward": set(), "grpo": {"torch"}, "rmo": {"torch"}, "rarl": {"torch", "transformers"},
          "data": {"torch", "numpy", "PIL"}}  # fmt: skip
METHOD = {"reward.py", "grpo.py", "rmo.py", "rarl.py", "data.py", "train.py", "eval.py"}
FOLDERS = {"tests", "tiny", "docs", "support", "experiments"}
UPWARDS = {"support": {"train", "eval", "experiments"}, ".": {"experiments"}}  # room -> what it may not import
ROOMS = [path.parent for path in sorted((ROOT / "support").glob("**/__init__.py"))]


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
    """Of what belongs to the project: whoever works here may have runs, pictures and programs of his own beside it."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    paths = subprocess.run(git, capture_output=True, text=True).stdout.split("\0") if shutil.which("git") else []
    if "train.py" not in paths:
        pytest.skip("no git checkout")
    assert {path for path in paths if "/" not in path and path.endswith(".py")} == METHOD
    assert {path.split("/")[0] for path in paths if "/" in path and path[0] != "."} == FOLDERS


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_imports_only_what_the_design_allows(leaf):
    """Anywhere in it: no leaf ever imports a sibling, not even inside a function."""
    assert first_names(ROOT / f"{leaf}.py") - set(sys.stdlib_module_names) <= LEAVES[leaf]


def test_leaves_say_their_version_and_what_they_need():
    """In one line near the top, for whoever finds a copy. All five bear one version: it is that of the whole."""
    pins = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M))
    line = re.compile(r'Version (\d{4}\.\d\d) of "RARL, by hand"; runs with Python 3.11(?: alone|, (.+))\.')
    versions = set()
    for leaf, packages in LEAVES.items():
        said = line.fullmatch((ROOT / f"{leaf}.py").read_text(encoding="utf-8").splitlines()[2])
        assert said, leaf
        versions.add(said[1])
        named = dict(part.split() for part in said[2].split(", ")) if said[2] else {}
        assert named == {(name := package.replace("PIL", "pillow")): pins[name] for package in packages}, leaf
    assert len(versions) == 1


@pytest.mark.parametrize("room", UPWARDS)
def test_nobody_imports_upwards(room):
    files = sorted((ROOT / room).glob("*.py" if room == "." else "**/*.py"))
    assert len(files) >= 5
    for file in files:
        assert not first_names(file) & UPWARDS[room], file


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_rooms_index_names_each_of_its_files_and_no_other(room):
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = re.findall(r"^(\w+)  +\S", text, re.MULTILINE)
    files = {path.stem for path in room.glob("*.py")} | {path.parent.name for path in room.glob("*/__init__.py")}
    assert sorted(listed) == sorted(name for name in files if not name.startswith("__"))


def test_no_modules_of_support_import_each_other_in_a_circle():
    paths = (ROOT / "support").glob("**/*.py")
    files, graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}, {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = [f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
        graph[name] = {module for module in (*imports(path), *named) if module in files}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_ctrl_c_is_quiet_from_the_first_import_on():
    """torch takes seconds to import, and Ctrl-C must not print a traceback then either."""
    commands = ("ablate", "bench", "full_size", "make_tiny", "rescue", "rivals")
    for name in commands:
        assert next(imports(ROOT / "experiments" / f"{name}.py", module_level=True)) == "support.run.quiet_end"


@pytest.mark.parametrize("leaf", ["reward", "grpo", "rmo", "data"])
def test_a_copied_leaf_imports_alone_and_so_do_its_tests(leaf, here, monkeypatch):
    """With nothing of the project on the path. rarl.py tells transformers of its attention, so a second copy would be in the way."""
    shutil.copy(ROOT / f"{leaf}.py", here)
    for sibling in METHOD:
        monkeypatch.delitem(sys.modules, sibling.removesuffix(".py"), raising=False)
    monkeypatch.setattr(sys, "path", [str(here), *(p for p in sys.path if p and not p.startswith(str(ROOT)))])
    try:
        assert importlib.import_module(leaf).__file__ == str(here / f"{leaf}.py")
    finally:
        sys.modules.pop(leaf, None)
    if leaf != "data":  # whose tests build the small policy with experiments/
        allowed = {leaf, "pytest", "torch", "numpy", "scipy"} | set(sys.stdlib_module_names)
        assert first_names(ROOT / "tests" / f"test_{leaf}.py") <= allowed
