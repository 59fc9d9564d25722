"""Every command of the READMEs and of docs/ that needs no download and no GPU runs as written, on a small budget.

Two run in processes of their own, as a reader would start them: the first command, and torchrun. The others call the same
main() here, as torch takes seconds to import, and share one short run.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from runs import ROOT
from test_layout import METHOD

PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README, EXPERIMENTS, METRICS = (TEXTS[name] for name in ("README.md", "experiments/README.md", "docs/metrics.md"))
TRAIN = "--steps1 1 --steps2 1 --batch-size 2 --group-size 2 --images 2 --eval-samples 1 --val-samples 1 --workers 0 --watch-every 0"
SMALL = {  # what makes a command short, added at its end
    "train": TRAIN,
    "eval": "--samples 2",
    "experiments.bench": "--prompts 1 --images 1 --pixels 56 --group 2 --tokens 4 --repeats 1",
    "experiments.ablate": f"--seeds 0 -- {TRAIN}",
    "experiments.rivals": f"{TRAIN} --name rival --steps2 0",
    "experiments.rescue": f"--seeds 0 -- {TRAIN}",
    "experiments.make_tiny": "--eyes-steps 1 --rotated-steps 1 --sorted-steps 1 --habits-steps 1 --pictures 64",
}
ELSEWHERE = ("/data/", "Qwen/", "HOST", "photos")  # needs data, a hub or other machines
TOOLS = ("-m pytest", "-m mypy", "pip ", "ruff ")
APART = ("python train.py", "torchrun train.py --stage 1")
MAIN_OF = {"data": "support.datasets.report"}  # as data.py finds it


class Command:
    """A line of a README such as "torchrun --nproc_per_node 2 train.py --stage 1"."""

    def __init__(self, line):
        self.line = re.sub(r"\s*#.*", "", line).split("&& ")[-1].strip()
        program, *words = shlex.split(self.line)
        place = next(i for i, word in enumerate(words) if word.endswith(".py") or (i and words[i - 1] == "-m"))
        self.launcher = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else [])]
        self.launcher += [*words[:place], str(ROOT / words[place])]
        self.module, self.arguments = words[place].removesuffix(".py"), words[place + 1 :]

    @property
    def here(self):
        return not any(word in self.line for word in ELSEWHERE)

    def small(self):
        """The arguments, and behind them those that make it short."""
        small = shlex.split(SMALL.get(self.module, ""))
        if "--" in self.arguments and "--" in small:  # what stands behind it goes to train.py already
            small = small[small.index("--") + 1 :]
        if self.module == "experiments.bench" and "--values" in self.arguments:
            small += ["--values", "1", "--parts", "memory"]
        return [*self.arguments, *small]

    def start_apart(self, folder):
        """As a reader would, in a process of its own."""
        return subprocess.Popen(
            [*self.launcher, *self.small()], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run_inside(self):
        try:
            importlib.import_module(MAIN_OF.get(self.module, self.module)).main(self.small())
        except SystemExit as end:
            assert end.code in (None, 0), self.line


def commands():
    lines = re.findall(r"^    ((?:.*&& )?(?:python|torchrun) .*)$", "\n".join(TEXTS.values()), re.M)
    lines = [line for line in lines if not any(tool in line.split("&& ")[-1] for tool in TOOLS)]
    return list({command.line: command for command in map(Command, lines)}.values())  # each once


def test_the_first_commands_run_as_typed(tmp_path):
    running = {}
    for command in (command for command in commands() if command.line in APART):
        folder = tmp_path / command.launcher[1].strip("-").replace("/", "_")
        folder.mkdir()
        running[command.line] = command.start_apart(folder)
    assert set(running) == set(APART)
    for line, process in running.items():
        printed = process.communicate()[0]
        assert process.returncode == 0, f"{line}\n{printed[-3000:]}"


def test_every_other_command_runs(finished, here, monkeypatch, signals):
    import train
    from experiments import ablate, make_tiny
    from experiments.rivals import MEASURED, RIVALS

    shutil.copytree(finished[0], here / "runs" / "rarl")  # what `python train.py` leaves
    # An experiment trains its first run here, and the others are copies: that their settings are sound is checked before
    # any of them starts, and that it starts processes and waits for them is tested in test_ablate.py.
    trained = {}

    def train_first(self, run):
        stages = tuple(run.stages)
        if stages not in trained:
            train.main(run.arguments)
            trained[stages] = run.folder
        elif not run.folder.exists():  # two experiments may share it
            shutil.copytree(trained[stages], run.folder)

    monkeypatch.setattr(ablate.Trainer, "train_unless_done", train_first)
    for name in ("runs/in-prose", "runs/smollm2"):  # tested in test_rescue.py
        monkeypatch.setitem(ablate.MADE, name, lambda folder: shutil.copytree(ROOT / "tiny", folder))
    monkeypatch.setattr(make_tiny, "examine", lambda *policy: ("", []))  # tested in test_lessons.py
    for module, name, _ in [MEASURED, *(place for places in RIVALS.values() for place in places)]:
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    runnable = [command for command in commands() if command.here and command.line not in APART]
    assert {"train", "eval", "experiments.bench", "experiments.ablate"} <= {command.module for command in runnable}
    for command in runnable:
        command.run_inside()
        monkeypatch.setattr(train, "collect", train.collect)


@pytest.mark.parametrize("command", [c for c in commands() if not c.here], ids=lambda command: command.line[:60])
def test_commands_for_elsewhere_are_understood(command, capsys):
    """They cannot run here, but their settings must exist: only the missing data or model may stop them."""
    from experiments import full_size
    from support.learner import plan
    from support.run.eval_settings import parse_arguments
    from support.run.settings import parse_settings

    if command.module == "train":
        parse_settings(command.arguments)
    elif command.module == "support.learner.plan":
        plan.parse(command.arguments)
    elif command.module == "experiments.full_size":
        full_size.parse(command.arguments)
    elif command.module == "eval":
        parse_arguments(command.arguments)
    else:
        with pytest.raises(SystemExit) as error:
            importlib.import_module(MAIN_OF.get(command.module, command.module)).main(command.arguments)
        assert error.value.code != 2  # 2 is argparse's: an unknown setting


def test_every_file_is_in_a_readme():
    for name in METHOD:
        assert f"`{name}`" in README
    for file in (ROOT / "experiments").glob("[!_]*.py"):
        assert f"`{file.name}`" in EXPERIMENTS
    for room in ROOT.glob("support/*/"):
        assert room.name == "__pycache__" or f"`support/{room.name}/`" in README


def test_the_reading_order_says_how_long_files_are():
    said = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert set(said) == METHOD
    for name, about in said.items():
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(about)) <= 0.1 * lines + 10, f"{name} has {lines} lines"


def anchors(text):
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", TEXTS[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("file", ["metrics.jsonl", "timing.jsonl"])
def test_the_numbers_of_a_run_are_explained(finished, file):
    written = set(json.loads((finished[0] / file).read_text().splitlines()[-1]))
    section = METRICS.split(f"## `{file}`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == written - {"stage", "step", "images"}
