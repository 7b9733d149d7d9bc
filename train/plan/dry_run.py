"""The dry run: one process's part of a job of any size, built without numbers on a machine without a GPU.

The modules, process groups and buffer layouts are the real ones, with parameters on the meta device and a process
group whose other members are not there; activations and traffic come from formulas.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from model.backend import on_torch
from parallel import groups as process_groups
from parallel.engine import require_planned
from parallel.topology import Topology, microbatches
from train.job.build import allocated_bytes, build_chunks
from train.job.footprint import footprint, planned_vocab
from train.plan.estimate import GIB, number_lines, traffic_lines
from train.settings.run import Config, describe


def dry_run(config: Config, topology: Topology, rank: int = 0) -> str:
    """What process ``rank`` of the job would hold, send and compute, as text."""
    require_planned(config.engine)
    config = replace(config, model=on_torch(config.model))  # which holds and sends as much
    vocab_size = planned_vocab(config, topology)
    process_groups.start_fake(rank, topology.world)
    try:
        groups = process_groups.lay_out(topology)
        with torch.device("meta"):
            chunks = build_chunks(config, topology, groups, vocab_size)
        place = footprint(config, topology, vocab_size, groups.pp.rank())
        held = sum_parts(allocated_bytes(chunk, groups, config) for chunk in chunks)
        coordinates = (
            f"process {rank} of {topology.world}: tensor {groups.tp.rank()}, pipeline {groups.pp.rank()}, context "
            f"{groups.cp.rank()}, data {groups.dp.rank()}; experts part {groups.tp_ep.rank()} of {groups.tp_ep.size()}"
        )
        layers = [chunk.decoder.layer_type_list for chunk in chunks]
    finally:
        process_groups.stop()
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    held |= {name: count for name, count in place.memory.items() if name not in held}
    steps = microbatches(topology, config.batch.global_, config.batch.micro)
    lines = [
        *describe(config, topology),
        "",
        coordinates,
        f"layers: {' | '.join(''.join(stage) for stage in layers)}; {parameters:,} parameters",
        f"schedule: {steps} micro-batches of {config.batch.micro} x {config.data.seq_length} tokens a step",
        "memory (weights, gradients and optimizer as laid out, the rest by formula)",
        *number_lines(held.items(), "GiB", GIB),
        *number_lines([("total", sum(held.values()))], "GiB", GIB),
        *traffic_lines([place]),
    ]
    return "\n".join(lines)


def sum_parts(parts: Iterable[dict[str, int]]) -> dict[str, float]:
    """Sums by name."""
    total: dict[str, float] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total
