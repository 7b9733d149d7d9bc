"""The mathematics of Gated DeltaNet: its convolution, and the gated delta rule in chunks and over processes.

Per value head, with state S [dk, dv], decay alpha_t = exp(g_t) and write strength beta_t (Yang, Kautz, Hatamizadeh,
"Gated Delta Networks", 2024, eq. 10):

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(dk)

Shape suffixes: R rows, L length, C chunk length (channels in the convolution), K key heads, V value heads,
D dimension of a head, W taps of the convolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import DELTA_CHUNK
from model.documents import Documents
from model.kernels.backends import accelerated
from model.layers.norm import at_least_float32
from parallel.collectives import earlier_parts


def causal_conv(x_RLC: Tensor, weight_CW: Tensor, documents: Documents, before_RWC: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution over time that starts anew at each document: out_t = sum_j w[W-1-j] x_{t-j}.

    Args:
        before_RWC: the W - 1 inputs before the first, where the rows begin within a sequence.
    """
    taps, length = weight_CW.shape[1], x_RLC.shape[1]
    padded = F.pad(x_RLC, (0, 0, taps - 1, 0)) if before_RWC is None else torch.cat([before_RWC, x_RLC], dim=1)
    out = x_RLC * weight_CW[:, taps - 1]
    for distance in range(1, taps):
        shifted = padded[:, taps - 1 - distance :][:, :length]
        inside = documents.same_document(distance)[..., None]
        out = out + torch.where(inside, shifted, 0) * weight_CW[:, taps - 1 - distance]
    return out


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


@dataclass
class DeltaChunks:
    """All of a row's chunks that does not depend on the state; shapes [R, V, chunks, ...].

    With S the state before a chunk: update = value - reader S; out = q_state S + within update;
    next S = keep S + writer update.
    """

    value: Tensor
    reader: Tensor
    within: Tensor
    writer: Tensor
    q_state: Tensor
    keep: Tensor


def prepare_chunks(
    q_RLKD: Tensor,
    k_RLKD: Tensor,
    v_RLVD: Tensor,
    g_RLV: Tensor,
    beta_RLV: Tensor,
    documents: Documents,
    chunk: int,
) -> DeltaChunks:
    """Solves the inside of every chunk; arguments as of `chunk_gated_delta_rule`."""
    ids_RL = documents.ids_RL
    pad = -q_RLKD.shape[1] % chunk
    # Each key head serves as many consecutive value heads.
    ratio = v_RLVD.shape[2] // k_RLKD.shape[2]
    q_RLVD, k_RLVD = (x.repeat_interleave(ratio, dim=2) for x in (q_RLKD, k_RLKD))
    # [R, L, V, D] -> [R, V, n, C, D] with zero keys and strengths in the padding, which therefore writes nothing.
    q, k, v = (
        F.pad(at_least_float32(x), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for x in (q_RLVD, k_RLVD, v_RLVD)
    )
    g, beta = (
        F.pad(at_least_float32(x), (0, 0, 0, pad)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)
        for x in (g_RLV, beta_RLV)
    )
    ids = torch.cat([ids_RL, ids_RL[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (-1, chunk))[:, None]
    q = q * q.shape[-1] ** -0.5

    total = g.cumsum(-1)
    same = (ids[..., :, None] == ids[..., None, :]).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~same, -torch.inf).exp()
    # The incoming state belongs to the document of the token just before the chunk.
    before = torch.cat([documents.before_R[:, None, None], ids[:, :, :-1, -1]], dim=2)
    from_state = torch.where(ids == before[..., None], total.exp(), 0)[..., None]

    strict = (k @ k.transpose(-1, -2) * decay * beta[..., None]).tril(-1)
    system = strict + torch.eye(chunk, dtype=strict.dtype, device=strict.device)
    right = torch.cat([v, k * from_state], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    value, reader = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    within = q @ k.transpose(-1, -2) * decay
    writer = (k * decay[..., -1, :, None]).transpose(-1, -2)
    return DeltaChunks(value, reader, within, writer, q * from_state, from_state[..., -1:, :])


def scan_chunks(chunks: DeltaChunks, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The outputs [R, V, L, Dv] of all chunks in turn, from the state [R, V, Dk, Dv] before the first, and the state
    after each."""
    out, states = [], []
    for n in range(chunks.value.shape[2]):
        update = chunks.value[:, :, n] - chunks.reader[:, :, n] @ state
        out.append(chunks.q_state[:, :, n] @ state + chunks.within[:, :, n] @ update)
        state = chunks.keep[:, :, n] * state + chunks.writer[:, :, n] @ update
        states.append(state)
    return torch.stack(out, dim=2).flatten(2, 3), states


def transition(chunks: DeltaChunks) -> Tensor:
    """[A | B] with: state after all chunks = A (state before) + B. Shape [R, V, Dk, Dk + Dv], whatever the length."""
    dk = chunks.reader.shape[-1]
    both = F.pad(torch.eye(dk, dtype=chunks.value.dtype, device=chunks.value.device), (0, chunks.value.shape[-1]))
    both = both.expand(*chunks.value.shape[:2], *both.shape)
    for n in range(chunks.value.shape[2]):
        update = F.pad(chunks.value[:, :, n], (dk, 0)) - chunks.reader[:, :, n] @ both
        both = chunks.keep[:, :, n] * both + chunks.writer[:, :, n] @ update
    return both


def incoming_state(chunks: DeltaChunks, group) -> Tensor:
    """The state before this process's part of the sequence, from the transitions of the parts before it."""
    parts = earlier_parts(transition(chunks), group)
    dk = chunks.reader.shape[-1]
    state = torch.zeros_like(parts[0, ..., dk:])
    for part in parts:
        state = part[..., :dk] @ state + part[..., dk:]
    return state


def chunk_gated_delta_rule(
    q_RLKD: Tensor,
    k_RLKD: Tensor,
    v_RLVD: Tensor,
    g_RLV: Tensor,
    beta_RLV: Tensor,
    documents: Documents,
    group=None,
    chunk: int = DELTA_CHUNK,
) -> Tensor:
    """The gated delta rule in its chunked (WY) form, with a fresh state for each document.

    Inside a chunk the recurrence is a unit lower-triangular system; only the state crosses chunks. Document borders
    enter as masks on three things: the pairs inside a chunk, the tokens that still see the incoming state, and what
    of a chunk reaches the outgoing state.

    Args:
        q_RLKD, k_RLKD: queries and keys, L2-normalised; v_RLVD: values, as many consecutive heads for each key head.
        g_RLV: log of the decay, <= 0; beta_RLV: write strength in (0, 1).
        documents: boundaries of the rows.
        group: the processes that hold the parts of each row, in order; None: the rows are whole.
        chunk: tokens solved together.
    Returns:
        [R, L, V, Dv], of v's type; computed in float32 (float64 for float64 inputs).
    """
    chunks = prepare_chunks(q_RLKD, k_RLKD, v_RLVD, g_RLV, beta_RLV, documents, chunk)
    if group is None:
        state = chunks.value.new_zeros(*chunks.value.shape[:2], k_RLKD.shape[-1], v_RLVD.shape[-1])
    else:
        state = incoming_state(chunks, group)
    out, _ = scan_chunks(chunks, state)
    return out[:, :, : v_RLVD.shape[1]].transpose(1, 2).to(v_RLVD.dtype)


@accelerated("model.kernels.deltanet")
def gated_delta_rule(
    q_RLKD: Tensor, k_RLKD: Tensor, v_RLVD: Tensor, g_RLV: Tensor, beta_RLV: Tensor, documents: Documents
) -> Tensor:
    """The gated delta rule over whole rows: `chunk_gated_delta_rule`, or the kernels of a library."""
    return chunk_gated_delta_rule(q_RLKD, k_RLKD, v_RLVD, g_RLV, beta_RLV, documents)
