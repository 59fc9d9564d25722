"""SIGTERM and Ctrl-C: a training step is finished and saved, anything else stops at once, and nothing prints a traceback."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from support.run.quiet_end import abandon_broken_stdout


class Interrupted(BaseException):
    """SIGTERM or SIGINT asked for an end. No Exception, so that nothing catches it by the way."""

    def __init__(self, number: int, what: str = ""):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}{what}")


class Stop:
    """Listens to SIGTERM and SIGINT from its creation on.

    Inside `with stop.deferred():` the first signal is only noted in `stop.signal`, and the loop there saves and stops.
    Elsewhere, and when the same signal comes twice, Interrupted is raised at once: reading, preflight and evaluation
    have nothing to save, and what is finished lies in the run folder already.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.waiting = False
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: somebody imports this file and knows better
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        again, self.signal = number == self.signal, number
        if again or not self.waiting:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
        if self.signal:  # it came after the loop had looked for the last time
            raise Interrupted(self.signal)


def lost_process(error: RuntimeError) -> str | None:
    """What to say of an error that means: a process or the memory is gone. None: the error means something else."""
    text, reason = str(error).lower(), str(error).split("\n")[0]
    if "out of memory" in text or "can't allocate memory" in text:
        return (
            f"out of memory ({reason}): --resume with a smaller --max-tokens-per-forward or --rollout-batch, or with "
            "--activation-checkpointing"
        )
    if any(word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer")):
        return f"another process of this run was lost ({reason}): --resume goes on from the newest checkpoint"
    return None


def leave(program: str, error: BaseException, rank: int = 0, size: int = 1) -> None:
    """End the program with one line on stderr and without a traceback. Does not return.

    Of several processes the main one speaks. The others wait until torchrun ends them, which it does as soon as one
    process is gone; if it does not, the main process was not the one with the trouble, and they speak too.
    """
    if rank > 0:
        try:
            time.sleep(0.2 if isinstance(error, Interrupted) else 10)
        except (Interrupted, KeyboardInterrupt):  # torchrun ends this process: the main one has spoken
            error = Interrupted(signal.SIGTERM)
    code = 128 + error.number if isinstance(error, Interrupted) else 1
    if rank == 0 or not isinstance(error, Interrupted):
        print(f"{program}: {error}", file=sys.stderr, flush=True)
    abandon_broken_stdout()
    if size > 1:  # the others may wait in a collective: leave without the clean-up that would wait for them
        os._exit(code)
    sys.exit(code)
