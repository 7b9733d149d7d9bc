"""Packed documents: which positions of a micro-batch belong together.

A micro-batch is ``rows`` sequences of ``length`` tokens. The network sees them flattened to one row of T = rows x
length tokens (``hidden`` is [T, 1, H] in megatron-core's sequence-first layout), and a `Documents` says where each
document starts and ends. Nothing - attention, state, convolution, prediction target - may cross a document.

Shape suffixes in this package: R rows, L length, T = R*L tokens, H hidden, N heads, D head dimension.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; the host does not wait until a GPU has come so far (for which its memory must be pinned)."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


@dataclass(kw_only=True)
class Documents(PackedSeqParams):
    """megatron-core's packing record (thd layout), with what a pure-torch module needs beside it.

    Attributes:
        ids_RL: int64, the document of each token, non-decreasing along a row; -1 marks padding.
        position_RL: int64, the token's position inside its document.
        single: every row is one document, so that a plain causal mask is enough.
        before_R: the document of the token before each row's first; the first's own where a sequence begins.
        whole: the record of the whole sequences; None where the rows are whole.
    """

    ids_RL: Tensor
    position_RL: Tensor
    single: bool = False
    before_R: Tensor
    whole: "Documents | None" = None

    @classmethod
    def from_ids(cls, ids_RL: Tensor) -> "Documents":
        """Builds the record from document ids on the host: [rows, length] integers, non-decreasing along a row."""
        rows, length = ids_RL.shape
        ids_RL = ids_RL.long()
        start_RL = torch.ones_like(ids_RL, dtype=torch.bool)
        start_RL[:, 1:] = ids_RL[:, 1:] != ids_RL[:, :-1]
        index_RL = torch.arange(length, device=ids_RL.device).expand(rows, length)
        position_RL = index_RL - (index_RL * start_RL).cummax(dim=1).values
        starts = start_RL.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([starts, starts.new_tensor([rows * length])]).int()
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            ids_RL=ids_RL,
            position_RL=position_RL,
            single=bool((ids_RL == ids_RL[:, :1]).all()),
            before_R=ids_RL[:, 0],
        )

    def part(self, rank: int, parts: int) -> "Documents":
        """The record of the ``rank``-th of equal parts of each row, for context parallelism."""
        if parts == 1:
            return self
        length = self.ids_RL.shape[1] // parts
        here = slice(rank * length, (rank + 1) * length)
        local = Documents.from_ids(self.ids_RL[:, here])
        local.position_RL, local.whole = self.position_RL[:, here], self
        local.before_R = self.ids_RL[:, max(here.start - 1, 0)]
        return local

    def to(self, device: torch.device) -> "Documents":
        """The same record with its tensors on ``device``."""
        cu_seqlens = send(self.cu_seqlens_q, device)
        return Documents(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_kv=self.max_seqlen_kv,
            ids_RL=send(self.ids_RL, device),
            position_RL=send(self.position_RL, device),
            single=self.single,
            before_R=send(self.before_R, device),
            whole=None if self.whole is None else self.whole.to(device),
        )

    def same_document(self, distance: int) -> Tensor:
        """bool [R, L]: the token ``distance`` places to the left is of the same document."""
        return self.position_RL >= distance


def attention_mask(documents: Documents) -> Tensor | None:
    """bool [R, 1, L, L]: which keys each query may see; None where a plain causal mask is enough."""
    if documents.single:
        return None
    same = documents.ids_RL[:, None, :, None] == documents.ids_RL[:, None, None, :]
    return same.tril()
