"""The batches of a stage, read ahead: threads open, resize and tokenize the next steps' prompts.

Threads suffice because Pillow decodes and resizes without the interpreter's lock. Unlike processes they need no shared memory and
no start method, and get no signals: those reach the main thread, which ends the readers.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import data
import rarl
from support.learner.world import World

# Steps that are read or being read beside the one in use. Their numbers of images differ, so a step of 8 may be read while one of 1
# is computed; two of them even that out. All that is kept are AHEAD + 1 steps of uint8 pixels, whatever the number of readers.
AHEAD = 2


def load_steps(
    sampler: data.Sampler, policy: rarl.Policy, world: World, first: int, last: int, workers: int
) -> Generator[tuple[int, list[data.Sample], list[data.Prompt]]]:
    """(step, this rank's samples, their prompts) of steps first .. last - 1, in order. Close it to end its `workers` threads.

    Raises DataError if an image cannot be read, when the step that needs it has come. Without workers, prompts are made then too.
    """
    samples_of = lambda step: sampler.batch(step)[world.rank :: world.size]
    if not workers:
        for step in range(first, last):
            samples = samples_of(step)
            yield step, samples, data.make_prompts(policy, samples)
        return
    readers = ThreadPoolExecutor(workers, "reader")
    ahead: deque[tuple[list[data.Sample], list[Future]]] = deque()
    try:
        for step in range(first, last):
            while len(ahead) <= AHEAD and step + len(ahead) < last:
                samples = samples_of(step + len(ahead))
                ahead.append((samples, [readers.submit(data.make_prompts, policy, [sample]) for sample in samples]))
            samples, reading = ahead.popleft()
            prompts = [prompt for future in reading for prompt in future.result()]
            del reading  # else the pixels would stay while the next step is waited for
            yield step, samples, prompts
            del prompts
    finally:
        readers.shutdown(cancel_futures=True)  # they end with the prompt that they read
