"""What our model, in bfloat16 as vLLM computes it, says of the texts that vLLM is asked about."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import MicroBatch, count_targets
from model.network import LanguageModel
from parallel import groups as process_groups
from parallel.topology import ParallelConfig, resolve
from train.job.build import Job, build_chunks
from train.job.checkpoint import load_model
from train.job.directory import require_checkpoint
from train.settings.run import RunReference, load_config


@torch.no_grad()
def logprobs(network: LanguageModel, tokens_RL: Tensor) -> Tensor:
    """Log-probabilities [R, L, V] of every next token, float32; each row is a document."""
    padded = torch.cat([tokens_RL, tokens_RL[:, -1:]], dim=1)
    ids = torch.zeros_like(padded)
    batch = MicroBatch.build(padded, ids, count_targets(ids, 0))
    logits = network.logits(network.trunk_of(batch)).float()
    return logits.log_softmax(dim=-1).view(*tokens_RL.shape, -1)


def answer(run: RunReference, texts_RL: list[list[int]], prompts_RL: list[list[int]], count: int) -> tuple:
    """For a process of its own: log-probabilities of the texts' tokens, and the prompts' likeliest continuations.

    Returns:
        [R, L - 1] log-probabilities; [R, count] tokens; the log-probabilities [R][count][V] that they were chosen by.
    """
    process_groups.start(torch.device("cpu"))
    config = replace(load_config(run), parallel=ParallelConfig())
    topology = resolve(config.parallel, config.model, dist.get_world_size())
    groups = process_groups.lay_out(topology)
    chunks = build_chunks(config, topology, groups, config.model.vocab_size)
    load_model(Job(config, topology, groups, torch.device("cpu"), None, chunks), require_checkpoint(config.run))
    (network,) = chunks
    texts = torch.tensor(texts_RL)
    of_texts = logprobs(network, texts)[:, :-1].gather(-1, texts[:, 1:, None])[..., 0]
    tokens, chosen = torch.tensor(prompts_RL), []
    for _ in range(count):
        chosen.append(logprobs(network, tokens)[:, -1])
        tokens = torch.cat([tokens, chosen[-1].argmax(dim=-1, keepdim=True)], dim=1)
    return of_texts.tolist(), tokens[:, -count:].tolist(), torch.stack(chosen, dim=1).numpy()


def checkpoint_of(run: Path) -> RunReference:
    """A run by its directory."""
    return RunReference(run.name, str(run.parent))
