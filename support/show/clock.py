"""Where the time of a step goes."""

import time


class Clock:
    """Seconds of each phase of a step, on this process. A phase ends in numbers on the CPU, so no GPU is waited for here."""

    def __init__(self) -> None:
        self.last, self.phases = time.perf_counter(), dict[str, float]()

    def lap(self, phase: str) -> None:
        """`phase` is what was done since the lap before."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        """The phases since `take` was called before."""
        phases, self.phases = self.phases, {}
        return phases
