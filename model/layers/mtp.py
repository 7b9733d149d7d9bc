"""Multi-token prediction: one layer, applied once for each further token, exactly as inference engines apply it.

At step k the layer reads the state of position t from step k-1 (step 0: the trunk's state after its final norm) and
the embedding of token t+k, and its state after the last norm predicts token t+k+1 through the shared head
(DeepSeek-V3 report, 2024, section 2.2, with the shared layer and the order [embedding; hidden] of Qwen3-Next).

What a step attends to (``mtp.keys``):

* ``inference``: an engine runs the first step over all positions, and its keys stay. A draft that starts from position
  p then runs the later steps at the positions p+1, p+2, ..., so they see the first step's keys up to p and those of
  the draft itself. Training does the same from every position at once: `model.layers.chain`.
* ``depth``: each step sees its own keys of all positions up to p, which no engine has (megatron-core's way).
"""

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import validate_segment_layers
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from model.config import INFERENCE, LAYER
from model.documents import Documents
from model.layers.balance import RoutedTokens
from model.layers.chain import ChainCache
from model.layers.context import LayerContext, run_stack
from model.layers.recompute import recomputable
from model.layers.rope import rotary_table


class MtpLayer(MegatronModule):
    """Norms, the projection of [embedding; hidden] to the model's width, and a stack of gated attention and experts.

    Built by megatron-core's MultiTokenPredictionBlock, whose names it keeps (enorm, hnorm, eh_proj, final_layernorm).
    """

    def __init__(
        self,
        config,
        submodules,
        layer_number: int,
        pg_collection,
        mtp_layer_pattern: str,
        hybrid_submodules,
        vp_stage: int | None = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        norm = (config, config.hidden_size, config.layernorm_epsilon)
        # In the order of use, in which weights arrive from other ranks.
        self.enorm, self.hnorm = submodules.norm(*norm), submodules.norm(*norm)
        self.eh_proj = submodules.eh_proj(2 * config.hidden_size, config.hidden_size, config)
        self.mtp_model_layer = submodules.stack(
            config=config,
            submodules=hybrid_submodules,
            layer_type_list=validate_segment_layers(mtp_layer_pattern),
            post_process=False,
            pg_collection=pg_collection,
            is_mtp_layer=True,
        )
        self.final_layernorm = submodules.norm(*norm)

    def forward(self, hidden_T1H: Tensor, embedding_T1H: Tensor, context: LayerContext) -> Tensor:
        """The state after one more prediction step, [T, 1, H] -> [T, 1, H].

        Args:
            context: its rotary table is that of the positions of the step's keys; its cache keeps the keys of earlier
                steps or calls.
        """
        mixed = self.eh_proj(torch.cat([self.enorm(embedding_T1H), self.hnorm(hidden_T1H)], dim=-1))
        return self.final_layernorm(run_stack(self.mtp_model_layer, mixed, context))

    def unroll(
        self, documents: Documents, routed: list[RoutedTokens], hidden_T1H: Tensor, *embeddings_T1H: Tensor
    ) -> tuple[Tensor, ...]:
        """The states after each prediction step, [T, 1, H] each, from the trunk's state and each step's embeddings."""
        if self.config.mtp.keys == INFERENCE:
            return self._chained(documents, routed, hidden_T1H, *embeddings_T1H)
        rotary = rotary_table(documents.position_RL, self.config.shape)
        contexts = [LayerContext(documents, rotary, tokens) for tokens in routed]
        return self._steps(contexts, hidden_T1H, *embeddings_T1H)

    # Later steps read the first one's keys, so a layer cannot be computed again by itself: all steps are, together.
    @recomputable(LAYER)
    def _chained(self, documents: Documents, routed: list[RoutedTokens], *states_T1H: Tensor) -> tuple[Tensor, ...]:
        cache, shape = ChainCache(), self.config.shape
        contexts = [
            LayerContext(documents, rotary_table(documents.position_RL + step, shape), tokens, cache)
            for step, tokens in enumerate(routed)
        ]
        return self._steps(contexts, *states_T1H)

    def _steps(self, contexts: list[LayerContext], hidden_T1H: Tensor, *embeddings_T1H: Tensor) -> tuple[Tensor, ...]:
        states = [hidden_T1H]
        for embedding, context in zip(embeddings_T1H, contexts, strict=True):
            states.append(self(states[-1], embedding, context))
        return tuple(states[1:])
