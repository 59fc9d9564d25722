"""The batches of a stage, read ahead: threads open, resize and tokenize the next steps' prompts.

Threads suffice because Pillow decodes and resizes without the interpreter's lock. Unlike processes they need no shared memory and
no start method, and get no signals: those reach the main thread, which ends the readers.
"""

import queue
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future

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
    todo: queue.SimpleQueue = queue.SimpleQueue()
    # Daemons: an image on a file server that is gone blocks its reader for ever, and must not keep the program from ending.
    readers = [threading.Thread(target=read, args=(todo, policy), name="reader", daemon=True) for _ in range(workers)]
    ahead: deque[tuple[list[data.Sample], list[Future]]] = deque()
    try:
        for reader in readers:
            reader.start()
        for step in range(first, last):
            while len(ahead) <= AHEAD and step + len(ahead) < last:
                samples = samples_of(step + len(ahead))
                ahead.append((samples, [Future() for _ in samples]))
                for job in zip(*ahead[-1], strict=True):
                    todo.put(job)
            samples, prompts = ahead.popleft()
            yield step, samples, [prompt.result() for prompt in prompts]
            del prompts  # else they would stay while the next step is waited for
    finally:
        for _, prompts in ahead:
            for prompt in prompts:
                prompt.cancel()
        for _ in readers:
            todo.put(None)
        for reader in readers:
            if reader.ident:  # it was started
                reader.join(timeout=5)  # it ends with the prompt that it reads


def read(todo: queue.SimpleQueue, policy: rarl.Policy) -> None:
    """Make the prompts that are asked for, one by one, until None is."""
    while job := todo.get():
        sample, prompt = job
        if prompt.set_running_or_notify_cancel():
            try:
                prompt.set_result(data.make_prompts(policy, [sample])[0])
            except BaseException as error:  # is raised where the result is asked for
                prompt.set_exception(error)
        del job, sample, prompt  # a reader that waits keeps no pixels
