"""Text from a trained run, greedily or by sampling, with or without drafts from its MTP layer."""

import sys
from collections.abc import Iterator
from functools import partial

import torch

from data.text.tokenizer import Tokenizer
from model.decode.speculate import Speculator
from parallel.collectives import from_first
from train.job.build import Job, build_job
from train.job.checkpoint import load_model, require_whole
from train.job.directory import require_checkpoint
from train.job.provenance import kept_tokenizer
from train.settings.commands import GenerateConfig
from train.settings.run import Config
from train.use.acceptance import Tally, rounds


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """The likeliest token at temperature 0, else one drawn from softmax(logits / temperature): [..., V] -> [...]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    share = (logits.float() / temperature).softmax(dim=-1)
    drawn = torch.multinomial(share.view(-1, share.shape[-1]).cpu(), 1, generator=generator)
    return drawn.view(share.shape[:-1]).to(logits.device)


def stream_text(
    job: Job, tokenizer: Tokenizer, ids: list[int], generation: GenerateConfig, tally: Tally
) -> Iterator[str]:
    """Yields the text of the new tokens until the end of the document or of the budget."""
    generator = torch.Generator().manual_seed(generation.seed)
    pick = partial(choose, temperature=generation.temperature, generator=generator)
    (network,) = job.chunks
    speculator = Speculator(network, [ids], generation.tokens, generation.draft, job.dataset.vocab_size, pick)
    written, ids, eod_id = tokenizer.decode(ids), list(ids), job.dataset.eod_id
    text = written
    one = torch.ones(1, dtype=torch.bool, device=job.device)
    for (added,) in rounds(speculator, one, generation.tokens, eod_id, tally):
        ids += [token for token in added if token != eod_id]
        text = tokenizer.decode(ids)
        # A character of several tokens is not whole until its last one; it is shown then.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(written) :]
            written = text
    yield text[len(written) :]


def run_generation(generation: GenerateConfig, config: Config) -> int:
    """The generate command, in each of its processes."""
    path = require_checkpoint(config.run, generation.step)
    job = build_job(config, kept_tokenizer(path))
    path = from_first(lambda: path)  # while it trains, others may see another
    tokenizer = job.dataset.tokenizer
    (ids,) = tokenizer.encode_batch([generation.text])
    require_whole(job, path)
    load_model(job, path)
    if job.is_first:
        sys.stdout.write(generation.text)
    tally = Tally(generation.draft, job.device)
    for text in stream_text(job, tokenizer, ids, generation, tally):
        if job.is_first:
            sys.stdout.write(text)
            sys.stdout.flush()
    if job.is_first:
        sys.stdout.write("\n")
        sys.stdout.flush()
        if generation.draft:
            print(tally.describe(), file=sys.stderr)
    job.close()
    return 0
