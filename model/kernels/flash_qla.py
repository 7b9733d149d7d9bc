"""FlashQLA's kernels one by one, so that several processes can compile them at the same time.

TileLang compiles a kernel when it is first called, up to 40 s each (the backward pass), one after the other in a step
of training. Here each is called by itself, on zeros where it reads what another one makes. Of flash-qla 0.1.3, with its
chunk of 64 tokens; dimensions as in `model.layers.delta_rule`.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from model.documents import Documents

HEAD_DIM, CHUNK = 128, 64
# The slowest to compile first. The forward kernel is another one where there are few sequences for the multiprocessors.
PARTS = ("backward", "forward", "forward, few", "forward, fewest", "states", "scores", "sums")
FILLED = 0.7  # of the multiprocessors: what FlashQLA wants sequences times heads to be, or half of it


def applies(key_dim: int, value_dim: int) -> bool:
    """Whether fla hands the delta rule of these head sizes over to FlashQLA."""
    return find_spec("flash_qla") is not None and key_dim == value_dim == HEAD_DIM


def kernels(
    q_RLKD: Tensor, k_RLKD: Tensor, v_RLVD: Tensor, g_RLV: Tensor, beta_RLV: Tensor, documents: Documents
) -> dict[str, Callable[[], object]]:
    """Calls of what `model.kernels.deltanet.gated_delta_rule` runs on these arguments, by the names of `PARTS`."""
    from flash_qla.ops.gated_delta_rule.chunk import fused_gdr_bwd, fused_gdr_fwd, fused_gdr_h, kkt_solve
    from flash_qla.ops.utils import chunk_local_cumsum, group_reduce_vector

    q, k, v, g, b = (x.detach() for x in (q_RLKD, k_RLKD, v_RLVD, g_RLV, beta_RLV))
    starts = None if documents.single else documents.cu_seqlens_q
    if starts is not None:
        q, k, v, g, b = (x.flatten(0, 1)[None] for x in (q, k, v, g, b))
    pieces = -(-q.shape[1] // CHUNK) + (0 if starts is None else starts.numel() - 1)
    a = v.new_zeros(*v.shape[:3], CHUNK)
    h = v.new_zeros(v.shape[0], pieces, v.shape[2], HEAD_DIM, HEAD_DIM)
    tensors = {"k": k, "v": v, "a": a, "g": g, "b": b}
    rows = {**tensors, "cu_seqlens": starts}

    def sums() -> None:
        chunk_local_cumsum(g, CHUNK, starts)
        chunk_local_cumsum(torch.zeros_like(g), CHUNK, starts, reverse=True, zero_last_chunk=True)
        if k.shape[2] < v.shape[2]:
            group_reduce_vector(torch.zeros_like(v), k.shape[2])

    def forward(sequences: int) -> None:
        where = (sequences, CHUNK) if starts is None else (1, sequences * CHUNK)
        own = {name: x.new_zeros(*where, *x.shape[2:]) for name, x in {"q": q, **tensors}.items()}
        borders = None if starts is None else CHUNK * torch.arange(sequences + 1, dtype=starts.dtype, device=q.device)
        fused_gdr_fwd(**own, output_final_state=False, cu_seqlens=borders, raw_cu_seqlens=borders)

    filled = int(FILLED * torch.cuda.get_device_properties(q.device).multi_processor_count)
    many, few = -(-filled // v.shape[2]), -(-filled // (2 * v.shape[2]))
    backward = partial(fused_gdr_bwd, q=q, do=torch.zeros_like(v), dht=None, h=h, **rows)
    states = partial(fused_gdr_h, output_final_state=False, output_h=True, **rows)
    scores = partial(kkt_solve, k=k, b=b, cu_seqlens=starts)
    forwards = [partial(forward, sequences) for sequences in (many, few, 1)]
    return dict(zip(PARTS, (backward, *forwards, states, scores, sums), strict=True))
