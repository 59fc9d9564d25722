"""The batches of a stage, read ahead: worker processes open, resize and tokenize the next steps' prompts."""

import signal
import types
from collections.abc import Iterator

import torch

import data
import rarl
from support.learner.world import World


class Steps(torch.utils.data.Dataset):
    """Step number -> this rank's samples and prompts."""

    def __init__(self, sampler: data.Sampler, policy: rarl.Policy, world: World):
        self.sampler, self.world = sampler, world
        # Not the policy itself: a worker needs no weights.
        self.front = types.SimpleNamespace(tokenizer=policy.tokenizer, image_processor=policy.image_processor)

    def __getitem__(self, step: int):
        try:
            samples = self.sampler.batch(step)[self.world.rank :: self.world.size]
            return samples, data.make_prompts(self.front, samples)
        except data.DataError as error:  # raised by a worker, it would arrive wrapped in the worker's traceback
            return error, None


def quiet_worker(number: int) -> None:
    """Ctrl-C reaches every process of a terminal: the main one decides, the workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load_steps(
    sampler: data.Sampler, policy: rarl.Policy, world: World, first: int, last: int, workers: int
) -> Iterator[tuple[int, list[data.Sample], list[data.Prompt]]]:
    """(step, samples, prompts) of steps first .. last - 1. Raises DataError if an image cannot be read."""
    loader = torch.utils.data.DataLoader(
        Steps(sampler, policy, world),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        worker_init_fn=quiet_worker,
    )
    for step, (samples, prompts) in zip(range(first, last), loader, strict=True):
        if isinstance(samples, data.DataError):
            raise samples
        yield step, samples, prompts
