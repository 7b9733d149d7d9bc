"""A micro-batch as the network wants it: tokens, documents, and for each prediction step its targets and weights.

Step 0 predicts the next token; step k >= 1 is the k-th multi-token-prediction step, which reads token t+k and
predicts token t+k+1. A target counts only inside the document of its position t.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.documents import Documents, send


def prediction_valid(documents_RS: Tensor, steps: int, learned_RS: Tensor | None = None) -> Tensor:
    """bool [1 + steps, R, L] for samples of L + 1 tokens: has position t a target at each prediction step?

    Args:
        learned_RS: bool, which tokens count as targets; None: all.
    """
    length = documents_RS.shape[1] - 1
    here = documents_RS[:, :length]
    valid = torch.zeros(1 + steps, *here.shape, dtype=torch.bool)
    for step in range(1 + steps):
        target = documents_RS[:, step + 1 :]
        valid[step, :, : target.shape[1]] = (target == here[:, : target.shape[1]]) & (target >= 0)
        if learned_RS is not None:
            valid[step, :, : target.shape[1]] &= learned_RS[:, step + 1 :]
    return valid


def count_targets(documents_RS: Tensor, steps: int, learned_RS: Tensor | None = None) -> Tensor:
    """int64 [2 + steps]: tokens that are not padding, then valid targets of each prediction step."""
    tokens = (documents_RS[:, :-1] >= 0).sum()[None]
    return torch.cat([tokens, prediction_valid(documents_RS, steps, learned_RS).sum(dim=(1, 2))])


def count_pairs(documents_RS: Tensor) -> Tensor:
    """int64 [2]: tokens that are not padding, then the sum of the squares of their documents' lengths.

    Attention takes half as many pairs of tokens as the second says.
    """
    ids_RL = documents_RS[:, :-1].long()
    rows_R1 = torch.arange(len(ids_RL), device=ids_RL.device)[:, None]
    apart_RL = ids_RL + rows_R1 * (ids_RL.max() + 1)  # a document ends with its row
    _, lengths = torch.unique_consecutive(apart_RL[ids_RL >= 0], return_counts=True)
    return torch.stack([lengths.sum(), (lengths * lengths).sum()])


@dataclass
class MicroBatch:
    """Tensors of one micro-batch; T = rows x length, K = prediction steps beyond the next token.

    Attributes:
        tokens_KRL: int64 [1 + K, R, L], the token each step reads: t at step 0, t+k at step k.
        targets_KT: int64 [1 + K, T], the token each step predicts; 0 where there is none.
        weights_KT: float32 [1 + K, T], weight of each target in its step's mean over the whole global batch.
        token_weights_KT: float32 [1 + K, T], each position's weight in the router's mean over the global batch.
        documents: boundaries of the packed documents.
        token_counts: [1 + K], tokens of the global batch that each step's router counts.
        predict: whether losses are wanted; else a forward pass only routes.
        tokens_before: tokens trained on before this step, which the weights of losses may go by.
    """

    tokens_KRL: Tensor
    targets_KT: Tensor
    weights_KT: Tensor
    token_weights_KT: Tensor
    documents: Documents
    token_counts: tuple[int, ...]
    predict: bool = True
    tokens_before: int = 0

    @classmethod
    def build(
        cls,
        tokens_RS: Tensor,
        documents_RS: Tensor,
        counts: Tensor,
        cut: tuple[int, int] = (0, 1),
        tokens_before: int = 0,
        learned_RS: Tensor | None = None,
    ) -> "MicroBatch":
        """From samples of L + 1 tokens and the counts of `count_targets` summed over the whole global batch.

        Args:
            cut: (part, parts), which of equal parts of each sequence to keep (context parallelism). Targets are found
                before the cut, so none is lost at its edge.
            learned_RS: bool, which tokens count as targets; None: all. The others are read, and pass through the
                experts, but the routers of prediction steps count the positions that have a target.
        """
        steps = counts.numel() - 2
        part, parts = cut
        rows, length = tokens_RS.shape[0], tokens_RS.shape[1] - 1
        valid = prediction_valid(documents_RS, steps, learned_RS)
        shifted = torch.zeros(2 + steps, rows, length, dtype=torch.int64)
        for step in range(2 + steps):
            read = tokens_RS[:, step : step + length]
            shifted[step, :, : read.shape[1]] = read
        per_target = 1.0 / counts[1:].clamp(min=1).float()
        routed = torch.cat([counts[:1], counts[2:]])
        per_token = routed.clamp(min=1).float().reciprocal()
        reads = torch.cat([(documents_RS[None, :, :-1] >= 0), valid[1:]])
        here = slice(part * length // parts, (part + 1) * length // parts)
        return cls(
            tokens_KRL=shifted[:-1, :, here],
            targets_KT=torch.where(valid, shifted[1:], 0)[..., here].flatten(1),
            weights_KT=(valid * per_target[:, None, None])[..., here].flatten(1),
            token_weights_KT=(reads * per_token[:, None, None])[..., here].flatten(1),
            documents=Documents.from_ids(documents_RS[:, :-1]).part(part, parts),
            token_counts=tuple(routed.tolist()),
            tokens_before=tokens_before,
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on ``device``."""
        return replace(
            self,
            tokens_KRL=send(self.tokens_KRL, device),
            targets_KT=send(self.targets_KT, device),
            weights_KT=send(self.weights_KT, device),
            token_weights_KT=send(self.token_weights_KT, device),
            documents=self.documents.to(device),
        )
