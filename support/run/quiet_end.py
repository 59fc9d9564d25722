"""Ends without a traceback. Import this before anything slow: from then on Ctrl-C prints one line and ends with 130."""

import os
import sys
from types import TracebackType


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
    sys.exit(130)  # 128 + SIGINT, as a shell reports it


sys.excepthook = _report

# Before torch, whose C++ part would import it, and takes a Ctrl-C meanwhile for a numpy that is not installed.
import numpy  # noqa: E402, F401


def abandon_broken_stdout() -> None:
    """If nothing can be printed any more (a closed pipe, a full disk), do not let the interpreter try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
