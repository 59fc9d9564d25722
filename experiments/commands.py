"""How the commands of this folder end: with a status, or with one line that says what was wrong and what to do."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import data
import rarl
from support.run.interrupts import leave
from support.run.settings import SettingError, number

at_least = partial(number, int)  # at_least(1) is a `type` for argparse


class CommandError(ValueError):
    """A setting or a file that cannot work; the message says what to do."""


def check_writable(path: Path, flag: str) -> None:
    """Raise CommandError if the file `path` cannot be written: now, and not after an hour of measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_fifo():
            raise OSError("it is a named pipe")
        existed = path.exists()
        open(path, "ab").close()
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:
        raise CommandError(f"{flag}: {path} cannot be written ({error}): name another place") from None


def run_command(program: str, command: Callable[[], int | None], out_of_memory: str = "use less of everything") -> None:
    """Run `command` and exit with its status. A user's mistake becomes one line on stderr and status 1.

    Ctrl-C is not handled here but by support/run/quiet_end.py, which also covers the imports.
    """
    try:
        raise SystemExit(command())
    except (CommandError, SettingError, data.DataError, rarl.ModelError, OSError) as error:
        leave(program, CommandError(" ".join(str(error).split())))
    except (RuntimeError, MemoryError) as error:  # a bug keeps its traceback
        signs = ("can't allocate memory", "Storage size calculation overflowed", "overflow when unpacking long")
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(x in str(error) for x in signs):
            raise
        leave(program, CommandError(f"out of memory: {out_of_memory}"))
