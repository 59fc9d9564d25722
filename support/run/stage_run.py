"""What surrounds the steps of a stage: prompts on their way, RMO's history, log, validation, checkpoints, and the end on a signal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

import data
import rmo
from support.datasets.loader import load_steps
from support.learner.learner import Learner
from support.learner.plan import beside_the_plan
from support.learner.stage import Batch, Stage
from support.run.checkpoints import Checkpoints
from support.run.interrupts import Interrupted, Stop
from support.run.run_folder import RunFolder
from support.show.monitor import Monitor
from support.show.results import mean


class StageRun:
    """One stage, from its first step or from a checkpoint. The loop asks it for `steps`, and tells it what came of each.

    history   RMO's: the best earlier value for each image; empty unless --rmo-source history
    validate  -> the share of the best possible reward at each validation prompt, and a row for each number of images
    """

    def __init__(
        self, folder: RunFolder, checkpoints: Checkpoints, checkpoint: str | None, stop: Stop,
        validate: Callable[[], tuple[list[float], dict[int, dict]]],
    ) -> None:  # fmt: skip
        self.folder, self.checkpoints, self.checkpoint = folder, checkpoints, checkpoint
        self.stop, self.validate = stop, validate
        self.history: rmo.History = {}

    @contextlib.contextmanager
    def started(self, stage: Stage, learner: Learner, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within it the stage runs, a signal waits for the end of a step, and the files are open.

        The learner's reference is set before the checkpoint is loaded: it is the policy that the stage began with.
        """
        self.stage, self.learner, self.optimizer = stage, learner, optimizer
        s, world = learner.settings, learner.world
        self.first, self.history, self.best = self.checkpoints.restore(self.checkpoint, learner, optimizer)
        self.monitor = Monitor(self.folder.path, stage.number, self.first, stage.steps, world, s)
        self.batches = load_steps(stage.sampler, learner.policy, world, self.first, stage.steps, s.workers)
        with self.monitor, self.stop.deferred(), contextlib.closing(self.batches):
            yield
        self.best.give_back(learner)

    def steps(self) -> Iterator[tuple[int, list[data.Sample], list[data.Prompt]]]:
        """(step, this process's samples, their prompts) of what is left of the stage."""
        for step, samples, prompts in self.batches:
            self.learner.prepare(prompts)
            self.learner.clock.lap("data")
            yield step, samples, prompts
            self.learner.clock.lap("other")  # what is between two steps

    def after_step(self, step: int, batch: Batch, metrics: dict) -> None:
        """Sync the policy that samples, remember, log, validate and save. Raises Interrupted where a signal has come."""
        learner, stage, world, s = self.learner, self.stage, self.learner.world, self.learner.settings
        learner.clock.lap("update")
        learner.sync_rollout_policy()
        learner.clock.lap("sync")
        if s.rmo_source == "history":
            news = rmo.merge(*world.gather(remembered(batch)))
            known = {name: self.history[name] for name in news.keys() & self.history.keys()}
            self.history |= rmo.merge(known, news)  # in place: it may know as many images as the data set has
        self.monitor.log(step, batch, metrics, learner.clock.take())
        if step == self.first and world.main and world.device.type == "cuda":
            print(beside_the_plan(s, learner.policy.model, batch.prompts, batch.ids.shape[1], world), file=sys.stderr)
        done = step + 1
        if stage.validation and (done == stage.steps or done % s.validate_every == 0):
            shares, rows = self.validate()
            self.best.offer(shares, done, learner.policy)
            self.monitor.log_validation(step, mean(shares), rows)
        stopped = max(world.gather(self.stop.signal))
        last = done == stage.steps
        if stopped or last or done % s.checkpoint_every == 0:
            # Judged after the step: one that ruins the weights had a finite loss itself. The checkpoint before it stays.
            sound = learner.is_sound(batch)
            if saved := sound and self.monitor.bad == 0:
                self.checkpoints.save(stage.number, done, learner, self.optimizer, self.history, self.best)
            elif last and not sound:
                self.monitor.keep_evidence(step, batch, metrics)
                self.monitor.give_up(
                    f"the weights after the last step of stage {stage.number} give no finite log-probs"
                )
            if stopped:
                how = "saved" if saved else "not saved, as its numbers are not finite"
                raise Interrupted(stopped, f" after step {done} of stage {stage.number}; {how}, go on with --resume")


def remembered(batch: Batch) -> rmo.History:
    """The best value that the policy's own answers of this step gave for each image."""
    return rmo.merge(
        *(
            rmo.remember([item.name for item in sample.items], sample.labels, [r.answer for r in group])
            for sample, group in zip(batch.samples, batch.groups(batch.sampled_rewards), strict=True)
        )
    )
