"""Ends without a traceback. Import this before anything slow: from then on Ctrl-C prints one line and ends with 130.

Whatever standard output is, a program runs to its end and its files are written: where it is closed (`>&-`, a service
without a terminal) nothing is printed, where it is ASCII alone the rest is escaped.
"""

import contextlib
import io
import os
import signal
import sys
from types import FrameType, TracebackType


def _interrupted() -> None:
    print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)


def _on_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not inside an import: the C++ of torch aborts on it, or takes numpy for missing."""
    within = frame
    while within is not None:
        if within.f_code.co_filename.startswith("<frozen importlib"):
            _interrupted()
            os._exit(130)
        within = within.f_back
    signal.default_int_handler(number, frame)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, or heard by somebody else
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _on_ctrl_c)


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    _interrupted()
    sys.exit(130)  # 128 + SIGINT, as a shell reports it


sys.excepthook = _report


def _usable_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It is closed: else the next file that is opened would get its number, and prints of libraries with it.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold letters that ASCII lacks, or bytes that are no text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_usable_streams()


def abandon_broken_stdout() -> None:
    """If nothing can be printed any more (a closed pipe, a full disk), do not let the interpreter try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
