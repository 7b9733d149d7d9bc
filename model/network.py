"""The language model: megatron-core's HybridModel built from our modules, with our forward pass and losses."""

from dataclasses import dataclass

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from model.batch import MicroBatch
from model.documents import Documents
from model.layers.attention import GatedAttention
from model.layers.balance import Balance, RoutedTokens
from model.layers.context import LayerCache, LayerContext, run_stack
from model.layers.deltanet import GatedDeltaNet
from model.layers.experts import MixtureOfExperts
from model.layers.gauges import Gauge
from model.layers.head import Head
from model.layers.rope import rotary_table
from model.stack import HybridConfig, full_pattern, stack_spec
from parallel.collectives import SumsTogether


@dataclass
class Losses:
    """What a forward pass over a micro-batch leaves behind on the last pipeline stage.

    Attributes:
        total: scalar to differentiate, this micro-batch's addend of the loss of the whole global batch.
            Zero, as all the rest is empty, if the micro-batch asks for no predictions.
        by_step: [1 + K], the addends of the next-token loss and of each MTP step's loss, unweighted.
        tokens_KT: cross-entropy of every position at every step, nats, detached.
    """

    total: Tensor
    by_step: Tensor
    tokens_KT: Tensor


class LanguageModel(HybridModel):
    """One pipeline stage of the model."""

    def __init__(
        self,
        config: HybridConfig,
        vocab_size: int,
        pg_collection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ):
        super().__init__(
            config=config,
            hybrid_stack_spec=stack_spec(config.shape.backend),
            vocab_size=vocab_size,
            max_sequence_length=0,
            hybrid_layer_pattern=full_pattern(config.shape, config.mtp),
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=config.shape.tied_embeddings,
            position_embedding_type="none",
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            # A stage with the embedding (the first, and where the MTP layer is) has no second copy of a tied matrix.
            holds = not config.shape.tied_embeddings or not (pre_process or self.mtp_process)
            self.output_layer = Head(config, vocab_size, pg_collection.tp, holds)
            self.setup_embeddings_and_output_layer()  # once more: it marked the output layer that stood here
        self.count_sums = SumsTogether(pg_collection.tp_dp_cp)
        for place, balance in self.balances().items():
            balance.sums = self.count_sums
            if place == config.shape.layers.count("E"):
                balance.set_uses(config.mtp.steps)

    def moe_layers(self) -> list[MixtureOfExperts]:
        """The mixture-of-experts layers of this stage, the MTP layer's last."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def balances(self) -> dict[int, Balance]:
        """The balance of each router of this stage, by its mixture's place in the whole model, the MTP layer's last."""
        found = {}
        for layer in self.decoder.layers:
            if isinstance(layer.mlp, MixtureOfExperts):
                found[self.config.shape.layers[: layer.layer_number - 1].count("E")] = layer.mlp.router.balance
        extra = [moe.router.balance for moe in self.moe_layers()[len(found) :]]
        return found | dict(enumerate(extra, self.config.shape.layers.count("E")))

    def gauges(self) -> dict[tuple[int, str], Gauge]:
        """The gauges of this stage's layers, by their place in the whole trunk and what they are of."""
        found = {}
        for layer in self.decoder.layers:
            place, mixer = layer.layer_number - 1, layer.self_attention
            found[place, "layer"] = layer.gauge
            if isinstance(mixer, GatedAttention | GatedDeltaNet):
                found[place, "attention" if isinstance(mixer, GatedAttention) else "deltanet"] = mixer.gauge
        return found

    def embed(self, tokens_RL: Tensor) -> Tensor:
        """Embeddings of a micro-batch flattened to one row: [R, L] -> [T, 1, H]."""
        embedded = self.embedding.word_embeddings(tokens_RL.reshape(1, -1))
        # Under sequence parallelism megatron-core has already turned [1, T, H] round to scatter it.
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1)

    def routed_tokens(self, batch: MicroBatch, step: int) -> RoutedTokens:
        """The tokens that this rank routes at a prediction step: its slice of them under sequence parallelism.

        The MTP layer is used once a step, so its balance loss is the mean over the steps.
        """
        weight = batch.token_weights_KT[step] / (self.config.mtp.steps if step else 1)
        rows, length = batch.tokens_KRL.shape[1:]
        rank, first = self.tp_group.rank(), 0
        if self.config.sequence_parallel:
            weight = weight.chunk(self.tp_group.size())[rank]
            first = rank * weight.numel()
        return RoutedTokens(weight, batch.token_counts[step], first, length, rows, use=max(0, step - 1))

    def trunk(
        self,
        tokens_RL: Tensor,
        documents: Documents,
        routed: RoutedTokens | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """This stage's layers: the states [T, 1, H], after the final norm on the last stage.

        Args:
            routed, cache: see `LayerContext`.
        """
        rotary = rotary_table(documents.position_RL, self.config.shape)
        embedded = self.embed(tokens_RL) if self.pre_process else None
        return run_stack(self.decoder, embedded, LayerContext(documents, rotary, routed, cache))

    def trunk_of(self, batch: MicroBatch) -> Tensor:
        """`trunk` of a micro-batch."""
        return self.trunk(batch.tokens_KRL[0], batch.documents, self.routed_tokens(batch, 0))

    def predictions(self, batch: MicroBatch) -> list[Tensor]:
        """The states that the head reads, one [T, 1, H] for the next token and one for each MTP step."""
        mtp, hidden = self.config.mtp, self.trunk_of(batch)
        if not mtp.steps:
            return [hidden]
        steps = range(1, 1 + mtp.steps)
        inputs = [hidden, *(self.embed(batch.tokens_KRL[step]) for step in steps)]
        if mtp.detach:
            # What is computed again gets gradients only if one of its inputs does.
            inputs = [x.detach().requires_grad_(torch.is_grad_enabled()) for x in inputs]
        routed = [self.routed_tokens(batch, step) for step in steps]
        return [hidden, *self.mtp.layers[0].unroll(batch.documents, routed, *inputs)]

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V, H] (this rank's rows): the embedding where they are tied."""
        if self.config.shape.tied_embeddings:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden_T1H: Tensor) -> Tensor:
        """Output head over the whole vocabulary: [T, 1, H] -> [T, V]."""
        return self.output_layer.logits(hidden_T1H, self.head_weight)

    def forward(self, batch: MicroBatch) -> Losses | Tensor:
        """The losses of a micro-batch on the last pipeline stage, the states to send on elsewhere."""
        states = self.predictions(batch) if self.post_process else [self.trunk_of(batch)]
        self.count_sums.start()
        if not self.post_process:
            return states[0]
        if not batch.predict:
            none = torch.zeros(len(states), 0, device=states[0].device)
            return Losses(none.sum(), none.sum(dim=1), none)
        if self.config.sequence_parallel:
            states = [gather_from_sequence_parallel_region(x, group=self.tp_group) for x in states]
        total, tokens_KT = self.output_layer(states, batch, self.head_weight)
        return Losses(total, (tokens_KT * batch.weights_KT).sum(dim=1), tokens_KT)
