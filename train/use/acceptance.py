"""What drafts are worth: greedy speculative decoding of held-out text, and how much of each draft was accepted.

Counted as inference engines count: of all drafts, the share that was right up to and with its k-th token
(cumulative); of those that were right before it, the share whose k-th token was right too (conditional); and the
tokens that a pass of the trunk yields in the mean, 1 + the sum of the cumulative shares.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from data.progress import count_bar
from model.decode.speculate import Speculator
from model.network import LanguageModel
from parallel.collectives import gather_counts, max_over_all, sum_over
from train.job.build import Job
from train.settings.tree import ConfigError
from train.watch import metrics

TEXTS_AT_ONCE = 256  # texts that are decoded at once


class Tally:
    """Rounds by how many tokens of their draft were accepted."""

    def __init__(self, draft: int, device: torch.device):
        self.rounds = torch.zeros(1 + draft, dtype=torch.int64, device=device)

    def add(self, accepted: torch.Tensor) -> None:
        """Notes rounds by the tokens accepted in each."""
        self.rounds += torch.bincount(accepted, minlength=len(self.rounds))

    @property
    def cumulative(self) -> list[float]:
        """Share of the drafts that were right up to each of their tokens."""
        reached = self.rounds.flip(0).cumsum(0).flip(0)
        return (reached[1:] / reached[0].clamp(min=1)).tolist()

    @property
    def conditional(self) -> list[float]:
        """The same, of the drafts that were right before it; 0 where there is none."""
        before = [1.0, *self.cumulative]
        return [now / then if then else 0.0 for then, now in zip(before, self.cumulative, strict=False)]

    @property
    def accepted_length(self) -> float:
        """Tokens of a pass of the trunk."""
        return 1 + sum(self.cumulative)

    def describe(self) -> str:
        """In a line for a person."""
        shares = ", ".join(f"{100 * share:.1f} %" for share in self.conditional)
        return f"drafts of {len(self.rounds) - 1}: {shares} accepted token by token; {self.accepted_length:.3f} a pass"


@dataclass(frozen=True)
class Acceptance:
    """What speculative decoding of some prompts gave: of all processes, on each."""

    prompts: list[list[int]]
    texts: list[list[int]]
    tally: Tally

    def values(self) -> dict[str, float]:
        """The metrics, by name."""
        conditional = enumerate(self.tally.conditional, start=1)
        values = {metrics.heldout_acceptance(step): share for step, share in conditional}
        return values | {metrics.HELDOUT_ACCEPTED_LENGTH: self.tally.accepted_length}

    def content(self) -> dict[str, Any]:
        """For a file: token ids of prompts and texts, rounds by accepted tokens, and what follows from them."""
        return {
            "prompts": self.prompts,
            "texts": self.texts,
            "rounds": self.tally.rounds.tolist(),
            "conditional": self.tally.conditional,
            "cumulative": self.tally.cumulative,
            "accepted_length": self.tally.accepted_length,
        }


def heldout_prompts(job: Job, number: int, tokens: int) -> list[list[int]]:
    """The first ``tokens`` tokens of held-out sequences spread evenly, each from its last document's start on.

    Those whose document ends there, or that are only filled up, are left out: nothing is left to say.
    """
    seq_length = job.config.data.seq_length
    if tokens > seq_length:
        raise ConfigError(f"prompt_tokens={tokens} is more than the run's data.seq_length={seq_length}: choose fewer")
    with closing(job.dataset.heldout_stream()) as stream:
        count = min(number, stream.samples_per_epoch)
        samples = [stream.sample(index * stream.samples_per_epoch // count) for index in range(count)]
    prompts = []
    for sample in samples:
        own = sample.documents[:tokens] == sample.documents[tokens - 1]
        prompt = sample.tokens[:tokens][own].tolist()
        if prompt[-1] != job.dataset.eod_id and sample.documents[tokens - 1] >= 0:
            prompts.append(prompt)
    return prompts


def rounds(
    speculator: Speculator, first: torch.Tensor, tokens: int, eod_id: int, tally: Tally
) -> Iterator[list[list[int]]]:
    """Decodes until every text has ``tokens`` tokens or its end, and yields what each round adds to each text.

    All processes decode together (experts need the tokens of each), so all go on until all are done.

    Args:
        first: bool [R], the texts that this process decodes; the others only fill up.
    """
    device = first.device
    added = [[token] if real else [] for token, real in zip(speculator.next_R.tolist(), first.tolist(), strict=True)]
    left, active = torch.full_like(speculator.next_R, tokens), first
    while True:
        for row in active.nonzero().flatten().tolist():
            if eod_id in added[row]:
                added[row] = added[row][: added[row].index(eod_id) + 1]
            added[row] = added[row][: left[row]]
            left[row] = 0 if eod_id in added[row] else left[row] - len(added[row])
        yield added
        active = first & (left > 0)
        if not max_over_all(active.any().long().to(device)):
            return
        chosen, accepted = speculator.advance(active)
        tally.add(accepted[active])
        added = [
            row[: 1 + right] if on else []
            for row, right, on in zip(chosen.tolist(), accepted.tolist(), active.tolist(), strict=True)
        ]


def measure_acceptance(
    job: Job, network: LanguageModel, prompts: list[list[int]], draft: int, tokens: int, show: bool = False
) -> Acceptance:
    """Greedy speculative decoding of all prompts, shared out over the data-parallel processes."""
    data, tally = job.groups.dp, Tally(draft, job.device)
    each = -(-len(prompts) // data.size())
    own = [index * data.size() + data.rank() for index in range(each)]
    found = torch.full((each, tokens), -1, dtype=torch.int64, device=job.device)
    with count_bar("checking drafts on held-out text", each * tokens, show=show and job.is_first) as bar:
        for begin in range(0, each, TEXTS_AT_ONCE):
            part = own[begin : begin + TEXTS_AT_ONCE]
            real = torch.tensor([index < len(prompts) for index in part], device=job.device)
            texts: list[list[int]] = [[] for _ in part]
            chosen = [prompts[index % len(prompts)] for index in part]
            speculator = Speculator(network, chosen, tokens, draft, job.dataset.vocab_size)
            for added in rounds(speculator, real, tokens, job.dataset.eod_id, tally):
                for text, new in zip(texts, added, strict=True):
                    text += new
                bar.update(sum(map(len, added)))
            for row, text in enumerate(texts, start=begin):
                found[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
    tally.rounds = sum_over(tally.rounds, data)
    # [processes, each, tokens] -> in the order of the prompts.
    together = gather_counts(found, data).transpose(0, 1).flatten(0, 1)[: len(prompts)].tolist()
    return Acceptance(prompts, [[token for token in text if token >= 0] for text in together], tally)
