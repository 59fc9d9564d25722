"""Every command of the READMEs that needs no download and no GPU runs as written, on a small budget.

One command of each kind runs in a process of its own, as a reader would start it. The others call the same main(), because
torch takes seconds to import.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
TRAIN = "--steps1 1 --steps2 1 --batch-size 2 --group-size 2 --images 2 --eval-samples 2 --val-samples 2 --workers 0 --watch-every 0"
SMALL = {  # what makes a command short, added at its end
    "train": TRAIN,
    "eval": "--samples 2",
    "experiments.bench": "--prompts 1 --images 1 --pixels 56 --group 2 --tokens 4 --repeats 1 --values 1 2",
    "experiments.ablate": f"--seeds 0 -- {TRAIN}",
    "experiments.rescue": "--seeds 0 --steps 2",
    "experiments.make_tiny": "--eyes-steps 1 --rotated-steps 1 --sorted-steps 1 --habits-steps 1 --drawings 64",
}
ELSEWHERE = ("/data/", "Qwen/", "HOST", "ROOT", "PATH", "...", "photos")  # needs data, a hub or other machines
TOOLS = ("-m pytest", "-m mypy", "pip ", "ruff ")
MAIN_OF = {"data": "support.datasets.report"}  # as data.py finds it


class Command:
    """A line of a README such as "torchrun --nproc_per_node 2 train.py --stage 1"."""

    def __init__(self, line):
        self.line = re.sub(r"\s*#.*", "", line.replace("\\\n", " ")).split("&& ")[-1].strip()
        program, *words = shlex.split(self.line)
        place = next(i for i, word in enumerate(words) if word.endswith(".py") or (i and words[i - 1] == "-m"))
        self.launcher = [*words[:place], words[place]]
        self.torchrun, self.arguments = program == "torchrun", words[place + 1 :]
        self.module = words[place].removesuffix(".py")

    @property
    def here(self):
        return not any(word in self.line for word in ELSEWHERE)

    def small(self):
        """The arguments, and behind them those that make it short."""
        arguments, small = self.arguments, shlex.split(SMALL.get(self.module, ""))
        if "--rank" in arguments:
            small = []
        if "--" in small:  # ablate's own settings stand before --, those of train.py after it
            cut = arguments.index("--") if "--" in arguments else len(arguments)
            own = small.index("--")
            return [*arguments[:cut], *small[:own], "--", *arguments[cut + 1 :], *small[own + 1 :]]
        return [*arguments, *small]

    def run_apart(self, folder):
        """As a reader would, in a process of its own."""
        start = [sys.executable, *(["-m", "torch.distributed.run"] if self.torchrun else []), *self.launcher]
        start = [str(ROOT / word) if word.endswith(".py") else word for word in start]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*start, *self.small()], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{self.line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"

    def run_inside(self):
        try:
            importlib.import_module(MAIN_OF.get(self.module, self.module)).main(self.small())
        except SystemExit as end:
            assert end.code in (None, 0), self.line


def commands():
    lines = re.findall(r"^    ((?:.*&& )?(?:python|torchrun) .*(?:\\\n.*)*)$", README + EXPERIMENTS, re.M)
    lines = list(dict.fromkeys(lines))  # each once
    return [Command(line) for line in lines if not any(tool in line.split("&& ")[-1] for tool in TOOLS)]


@pytest.fixture
def signals():
    """train.py listens to signals; here they belong to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_two_commands_come_first():
    first = re.findall(r"^    (.*)$", README, re.M)[:2]
    assert first == [
        "pip install -r requirements.txt && python train.py",
        "pip install -r requirements.txt && python -m pytest",
    ]


def test_every_readme_command_runs(tmp_path, monkeypatch, signals):
    import train
    from experiments import ablate, make_tiny, rescue

    monkeypatch.chdir(tmp_path)
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
    monkeypatch.setattr(rescue, "make_base", lambda tiny: tiny)  # tested in test_rescue.py
    monkeypatch.setattr(make_tiny, "examine", lambda *policy: ("", []))  # tested in test_lessons.py
    runnable = [command for command in commands() if command.here]
    assert {"train", "eval", "experiments.bench", "experiments.ablate"} <= {command.module for command in runnable}
    apart = set()
    for command in runnable:
        kind = (command.module, command.torchrun)
        if kind in {("train", False), ("train", True), ("experiments.bench", False)} - apart:
            apart.add(kind)
            command.run_apart(tmp_path)
        else:
            command.run_inside()


@pytest.mark.parametrize("command", [c for c in commands() if not c.here], ids=lambda command: command.line[:60])
def test_commands_for_elsewhere_are_understood(command, capsys):
    """They cannot run here, but their settings must exist: only the missing data or model may stop them."""
    from support.learner import plan
    from support.run.eval_settings import parse_arguments
    from support.run.settings import parse_settings

    if command.module == "train":
        parse_settings(command.arguments)
    elif command.module == "support.learner.plan":
        plan.parse(command.arguments)
    elif command.module == "eval":
        parse_arguments(command.arguments)
    else:
        with pytest.raises(SystemExit) as error:
            importlib.import_module(MAIN_OF.get(command.module, command.module)).main(command.arguments)
        assert error.value.code != 2  # 2 is argparse's: an unknown setting


def test_every_file_is_in_a_readme():
    for file in ROOT.glob("*.py"):
        assert f"`{file.name}`" in README
    for file in (ROOT / "experiments").glob("[!_]*.py"):
        assert f"`{file.name}`" in EXPERIMENTS


def test_table_of_metrics_names_what_a_run_writes(tmp_path, monkeypatch, signals):
    import train

    monkeypatch.chdir(tmp_path)
    train.main([*shlex.split(TRAIN), "--updates", "2"])
    written = set(json.loads((tmp_path / "runs/rarl/metrics.jsonl").read_text().splitlines()[0]))
    section = README.split("## The numbers in `metrics.jsonl`")[1].split("\n## ")[0]
    explained = set(re.findall(r"`([a-z_]+)`", section.split("|---|---|")[1]))
    assert explained - {"valid"} <= written | {"updates"}
    assert written - explained == {"stage", "step", "images", "tokens", "bad", "loss", "policy_loss"}
