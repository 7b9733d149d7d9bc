"""Text from a trained run, greedily or by sampling: the whole prefix is read anew for every token."""

import sys

import torch

from data.tokenizer import Tokenizer
from model.batch import MicroBatch, count_targets
from train.build import Job, build_job
from train.checkpoint import load_model
from train.config import Config, GenerateConfig
from train.runs import require_checkpoint
from train.settings import ConfigError


def choose(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits_V.argmax())
    share = (logits_V.float() / temperature).softmax(dim=-1)
    return int(torch.multinomial(share, 1, generator=generator))


@torch.no_grad()
def next_logits(job: Job, ids: list[int]) -> torch.Tensor:
    """Logits of the token after ``ids``, float32 on the host, padding rows of the vocabulary left out: [V]."""
    # Sequence parallelism cuts the tokens evenly, so the prefix is filled up behind its end, where nothing looks.
    fill = -len(ids) % job.topology.tensor
    tokens = torch.tensor([ids + [0] * (fill + 1)])
    documents = torch.zeros_like(tokens)
    batch = MicroBatch.build(tokens, documents, count_targets(documents, 0)).to(job.device)
    (network,) = job.chunks
    hidden, _ = network.trunk(batch)
    logits = network.logits(hidden)[len(ids) - 1]
    return logits[: job.dataset.vocab_size].float().cpu()


def stream_text(job: Job, tokenizer: Tokenizer, ids: list[int], generation: GenerateConfig):
    """Yields the text of each new token until the end of the document or of the budget."""
    generator = torch.Generator().manual_seed(generation.seed)
    written = tokenizer.decode(ids)
    for _ in range(generation.tokens):
        token = choose(next_logits(job, ids), generation.temperature, generator)
        if token == job.dataset.eod_id:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character of several tokens is not whole until its last one; it is shown then.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(written) :]
            written = text


def run_generation(generation: GenerateConfig, config: Config) -> int:
    """The generate command, in each of its processes.

    Raises:
        ConfigError: a prompt without tokens, or a run over several pipeline stages.
    """
    if config.parallel.pipeline > 1:
        raise ConfigError(f"parallel.pipeline={config.parallel.pipeline}: generate needs all layers in one process")
    path = require_checkpoint(generation.run)
    job = build_job(config)
    tokenizer = job.dataset.tokenizer
    (ids,) = tokenizer.encode_batch([generation.prompt])
    if not ids:
        raise ConfigError("prompt='' has no tokens: give some text to continue")
    load_model(job, path)
    if job.is_first:
        sys.stdout.write(generation.prompt)
    for text in stream_text(job, tokenizer, ids, generation):
        if job.is_first:
            sys.stdout.write(text)
            sys.stdout.flush()
    if job.is_first:
        sys.stdout.write("\n")
    job.close()
    return 0
