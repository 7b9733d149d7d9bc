"""What a run carries from step to step beside its weights, as its checkpoints keep it."""

from typing import Any

import torch

from data.loader import Loader, Stream
from data.order.batches import Batch
from data.order.skips import Skips, Window
from data.secrets import hide
from parallel.collectives import sum_over
from train.job.agree import require_alike
from train.job.bad_steps import Judge
from train.job.build import Job
from train.settings.run import batch_schedule
from train.settings.tree import to_dict


class Progress:
    """How far a run has read, what it leaves out, and what it takes for a usual step.

    Args:
        step: steps that are done.
        state: what the checkpoint after them says of itself; empty for a new run.
        left_out: windows of samples that the run has left out after bad steps.
    Attributes:
        unlogged: numbers of each step since the last logged one, by metric.
    """

    def __init__(self, job: Job, step: int, state: dict[str, Any], left_out: list[Window]) -> None:
        self._job, self._schedule = job, batch_schedule(job.config)
        number, data = self._schedule.samples(step).start, state.get("data", {})
        windows = [*job.config.data.skip, *left_out]
        self.skips = Skips(windows, number, data.get("place", number))
        self.judge = Judge(job, data.get("judge"))
        self.unlogged: dict[str, list[float]] = data.get("unlogged", {})
        self.identity = job.dataset.identity(job.config.seed)
        self.stream: Stream = job.dataset.train_stream(job.config.seed)
        self.start = step
        # Older checkpoints do not say how much was padding.
        self._tokens: int = data.get("tokens", number * job.config.data.seq_length)
        self._unsummed = torch.zeros((), dtype=torch.int64)

    def read(self, batches: list[Batch]) -> None:
        """Counts what this process has read for a step."""
        self._unsummed += sum(int((batch.documents[:, :-1] >= 0).sum()) for batch in batches)

    def tokens(self) -> int:
        """Tokens, without padding, that the run has read (one reduction)."""
        self._tokens += int(sum_over(self._unsummed.to(self._job.device), self._job.groups.dp))
        self._unsummed.zero_()
        return self._tokens

    def loader(self) -> Loader:
        """This process's batches from here on."""
        data, config = self._job.groups.dp, self._job.config
        return Loader(
            self.stream, self._schedule, config.batch.micro, data.rank(), data.size(), self.start, skips=self.skips
        )

    def places(self, first: int, last: int) -> range:
        """Where in the order of training the samples of some steps, counted from 1, lie."""
        numbers = range(self._schedule.samples(first - 1).start, self._schedule.samples(last - 1).stop)
        return range(self.skips.place(numbers[0]), self.skips.place(numbers[-1]) + 1)

    def place_after(self, step: int) -> int:
        """How far into the order of training ``step`` steps have read."""
        return self.skips.place(self._schedule.samples(step).start)

    def source_metrics(self, step: int) -> dict[str, float]:
        """How far each source has been read after a step; names without what must not be shown."""
        of_sources = self._job.dataset.progress(self.place_after(step))
        return {hide(name): value for name, value in of_sources.items()}

    def require_alike(self) -> None:
        """Proves that all processes train the same.

        Raises:
            RuntimeError: they do not.
        """
        for what, value in (("settings", to_dict(self._job.config)), ("data", self.identity)):
            require_alike(what, value, self._job.device)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` steps says of what was read and how far (one reduction)."""
        samples, place = self._schedule.samples(step).start, self.place_after(step)
        return {
            "identity": self.identity,
            "samples": samples,
            "place": place,
            "tokens": self.tokens(),
            "sources": self._job.dataset.cursors(place),
            "judge": self.judge.state,
            "unlogged": {name: list(values) for name, values in self.unlogged.items()},
        }
