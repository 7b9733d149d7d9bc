"""What the layers of a forward pass read beside the hidden states: the one typed way through megatron-core's arguments.

megatron-core hands the same keywords to every layer of a stack: ``packed_seq_params`` to token mixers, ``padding_mask``
to feed-forward parts, ``rotary_pos_emb`` and ``inference_context`` to attention. `LayerContext` says what stands in
each of them here; `run_stack` is the only place that writes it there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model.documents import Documents
from model.layers.balance import RoutedTokens


class LayerCache(Protocol):
    """What attention remembers between calls: `model.layers.chain.ChainCache` of the steps of multi-token prediction,
    `model.decode.decode.DecodeCache` of the tokens read before (which also has what Gated DeltaNet remembers)."""

    def is_static_batching(self) -> bool:
        """megatron-core asks this of its own contexts."""
        ...

    def attend(self, attention, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """What an attention layer gives for these queries; keys and values are remembered."""
        ...


@dataclass(frozen=True)
class LayerContext:
    """Of one forward pass through a stack of layers.

    Attributes:
        documents: boundaries of the packed documents; reaches token mixers as ``packed_seq_params``.
        rotary: that of `model.layers.rope.rotary_table`; reaches attention as ``rotary_pos_emb``.
        routed: what routers count, see `model.layers.router.Router`; reaches feed-forward parts as ``padding_mask``.
        cache: what earlier calls left; reaches token mixers as ``inference_context``.
    """

    documents: Documents
    rotary: Tensor
    routed: RoutedTokens | None = None
    cache: LayerCache | None = None


def run_stack(stack: Callable[..., Tensor], hidden_T1H: Tensor | None, context: LayerContext) -> Tensor:
    """megatron-core's stack of layers over hidden states (None: those that pipeline parallelism has brought)."""
    return stack(
        hidden_states=hidden_T1H,
        attention_mask=None,
        packed_seq_params=context.documents,
        rotary_pos_emb=context.rotary,
        padding_mask=context.routed,
        inference_context=context.cache,
    )
