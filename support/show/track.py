"""--track: the lines of metrics.jsonl and validation.jsonl sent to TensorBoard or Weights & Biases, under the same names."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

from support.run.settings import SettingError, Settings

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # --track: the package


def check_tracker(track: str | None) -> None:
    """Raise SettingError if the package that --track needs is not installed."""
    if track and not importlib.util.find_spec(NEEDS[track]):
        raise SettingError(f"--track {track}: the package {NEEDS[track]} is not installed: pip install {NEEDS[track]}")


def start_tracker(s: Settings, folder: Path, first: int, main: bool) -> Callable[[int, dict], None]:
    """-> a function (step of the run, numbers) that sends them.  first: step of the run that comes next, after a resume too"""
    if not main or not s.track:
        return lambda step, numbers: None
    if s.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

        def send(step: int, numbers: dict) -> None:
            for name, value in numbers.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
            writer.flush()

        return send
    import wandb

    if wandb.run is None:  # one for both stages
        wandb.init(project="rarl", name=s.name, dir=str(folder), config=dataclasses.asdict(s))
    return lambda step, numbers: wandb.log(numbers, step=step)
