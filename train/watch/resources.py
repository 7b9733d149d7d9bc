"""What a run takes of its machines: memory of the fullest GPU, load of the fullest holder of experts, the network."""

import shutil

import torch

from parallel.collectives import max_over_all
from train.job.build import Job
from train.watch import metrics

GB = 1e9


def resource_metrics(job: Job, own: dict[str, float]) -> dict[str, float]:
    """Numbers since the last call, the largest of any process (one reduction); memory only on GPUs.

    Args:
        own: what else of this process is looked at in the same way.
    """
    layers = [moe for chunk in job.chunks for moe in chunk.moe_layers()]
    fullest = max((moe.fullest for moe in layers), default=0.0)
    crossed = sum(moe.network_rows for moe in layers) / max(1, sum(moe.sent_tokens for moe in layers))
    for moe in layers:
        moe.fullest, moe.network_rows, moe.sent_tokens = 0.0, 0, 0
    disk = shutil.disk_usage(job.config.run.path)
    values = {metrics.EXPERT_ROWS_MAX: fullest, metrics.EXPERT_NETWORK_ROWS: crossed}
    values |= {metrics.DISK_FREE: -disk.free / GB, metrics.DISK_SIZE: disk.total / GB}
    values |= own
    if job.device.type == "cuda":
        found = torch.cuda.memory_stats(job.device)
        values[metrics.MEMORY_PEAK] = found["allocated_bytes.all.peak"] / GB
        values[metrics.MEMORY_RESERVED] = found["reserved_bytes.all.current"] / GB
        values[metrics.MEMORY_RETRIES] = float(found["num_alloc_retries"])
        torch.cuda.reset_peak_memory_stats(job.device)
    whole = max_over_all(torch.tensor(list(values.values()), dtype=torch.float64, device=job.device)).tolist()
    found = dict(zip(values, whole, strict=True))
    found[metrics.DISK_FREE] *= -1  # the least
    where_they_travel = (metrics.EXPERT_ROWS_MAX, metrics.EXPERT_NETWORK_ROWS)
    return {name: value for name, value in found.items() if value or name not in where_they_travel}
