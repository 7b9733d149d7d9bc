"""Multi-token prediction: one layer, applied once for each further token, as inference engines apply it.

At step k the layer reads the state of position t from step k-1 (step 0: the trunk's state after its final norm) and
the embedding of token t+k, and its state after the last norm predicts token t+k+1 through the shared head
(DeepSeek-V3 report, 2024, section 2.2, with the shared layer and the order [embedding; hidden] of Qwen3-Next).
"""

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import validate_segment_layers
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from model.balance import RoutedTokens
from model.documents import Documents


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
        self.enorm, self.hnorm, self.final_layernorm = (submodules.norm(*norm) for _ in range(3))
        self.eh_proj = submodules.eh_proj(2 * config.hidden_size, config.hidden_size, config)
        self.mtp_model_layer = submodules.stack(
            config=config,
            submodules=hybrid_submodules,
            layer_type_list=validate_segment_layers(mtp_layer_pattern),
            post_process=False,
            pg_collection=pg_collection,
            is_mtp_layer=True,
        )

    def forward(
        self, hidden_T1H: Tensor, embedding_T1H: Tensor, rotary: Tensor, documents: Documents, routed: RoutedTokens
    ) -> Tensor:
        """The state after one more prediction step, [T, 1, H] -> [T, 1, H]."""
        mixed = self.eh_proj(torch.cat([self.enorm(embedding_T1H), self.hnorm(hidden_T1H)], dim=-1))
        mixed = self.mtp_model_layer(
            mixed, None, rotary_pos_emb=rotary, packed_seq_params=documents, padding_mask=routed
        )
        return self.final_layernorm(mixed)
