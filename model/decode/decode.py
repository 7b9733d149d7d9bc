"""Reading token by token: what the layers remember, and the model over it, with drafts from multi-token prediction.

Attention remembers keys and values, Gated DeltaNet its state and the last inputs of its convolution. Tokens come in
blocks. A block may turn out to be partly wrong (a rejected draft): `DecodeCache.keep` then takes the layers back to the
last token that counts. Keys need no taking back: those of wrong tokens lie behind the last position that counts, and
are overwritten before anything looks there.

Decoding needs all layers in one process; tensor and expert parallelism take part, context parallelism looks on (each
of its processes reads everything).

Shape suffixes: R rows, L tokens of a block, T = R*L, S room for tokens, N query heads, M key heads, V value heads, D
dimension of a head, C channels, H hidden.
"""

from dataclasses import replace

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor
from torch.nn import functional as F

from model.config import DELTA_CHUNK
from model.documents import Documents
from model.layers.context import LayerContext
from model.layers.delta_rule import prepare_chunks, scan_chunks
from model.layers.rope import rotary_table
from model.network import LanguageModel
from parallel.collectives import gather_parts


class DecodeCache:
    """What the layers of a stack remember of each row; megatron-core hands it to them as ``inference_context``.

    Args:
        rows: texts that are read at once. room: tokens that a row may come to have.
    """

    def __init__(self, rows: int, room: int, device: torch.device):
        self.length_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.room = room
        self.length = 0  # of the block
        self.count_R: Tensor | None = None
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._inputs: dict[int, Tensor] = {}  # of the convolution, those before the block and the block's: [R, W, C]
        self._states: dict[int, list[Tensor]] = {}  # before the block, then those that `keep` may choose: [R, V, D, D]

    def is_static_batching(self) -> bool:
        """megatron-core asks this of its own contexts."""
        return False

    def block(self, length: int, count_R: Tensor | None = None) -> Documents:
        """Begins a block of so many tokens behind what is remembered.

        Args:
            count_R: how many of them count, where that is known: the states of the others are then never computed.
        """
        self.length, self.count_R = length, count_R
        rows = self.length_R.shape[0]
        documents = Documents.from_ids(torch.zeros(rows, length, dtype=torch.int64, device=self.length_R.device))
        positions = self.length_R[:, None] + torch.arange(length, device=self.length_R.device)
        return replace(documents, position_RL=positions)

    def keep(self, count_R: Tensor) -> None:
        """Ends a block: so many of its tokens are remembered, the others never happened."""
        rows = torch.arange(count_R.shape[0], device=count_R.device)
        for layer, inputs in self._inputs.items():
            before = torch.arange(inputs.shape[1] - self.length, device=count_R.device)
            self._inputs[layer] = inputs[rows[:, None], count_R[:, None] + before]
        for layer, states in self._states.items():
            # Where the count was known there is one state after the block, else one after each of its tokens.
            chosen = states[-1] if self.count_R is not None else torch.stack(states)[count_R, rows]
            self._states[layer] = [chosen]
        self.length_R = self.length_R + count_R

    def attend(self, attention, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """Softmax attention of the block's tokens to all up to them: [T, N, D]."""
        position_RL = documents.position_RL
        rows, length = position_RL.shape
        shape = (rows, self.room, *key.shape[1:])
        if attention.layer_number not in self._keys:
            self._keys[attention.layer_number] = key.new_zeros(shape), value.new_zeros(shape)
        cache = self._keys[attention.layer_number]
        index = torch.arange(rows, device=key.device)[:, None]
        for kept, new in zip(cache, (key, value), strict=True):
            kept[index, position_RL] = new.view(rows, length, *new.shape[1:])
        seen = int(position_RL.max()) + 1
        mask = torch.arange(seen, device=key.device) <= position_RL[:, None, :, None]
        k, v = (x[:, :seen].transpose(1, 2) for x in cache)
        q = query.view(rows, length, *query.shape[1:]).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(query.shape)

    def inputs_before(self, layer: int, inputs_RLC: Tensor, taps: int) -> Tensor:
        """The inputs of a convolution just before the block, [R, taps - 1, C]; the block's own are noted."""
        rows, _, channels = inputs_RLC.shape
        before = self._inputs.get(layer)
        if before is None:
            before = inputs_RLC.new_zeros(rows, taps - 1, channels)
        self._inputs[layer] = torch.cat([before, inputs_RLC], dim=1)
        return before

    def delta_rule(
        self, layer: int, q_RLVD: Tensor, k_RLVD: Tensor, v_RLVD: Tensor, g_RLV: Tensor, beta_RLV: Tensor, documents
    ) -> Tensor:
        """The gated delta rule on from the remembered state, arguments as of `chunk_gated_delta_rule`: [R, L, V, D]."""
        length, chunk = q_RLVD.shape[1], 1
        if self.count_R is not None:
            # A token that decays nothing and writes nothing leaves the state as it is.
            counts = (torch.arange(length, device=g_RLV.device) < self.count_R[:, None])[..., None]
            g_RLV, beta_RLV = g_RLV * counts, beta_RLV * counts
            chunk = DELTA_CHUNK
        chunks = prepare_chunks(q_RLVD, k_RLVD, v_RLVD, g_RLV, beta_RLV, documents, chunk)
        if layer in self._states:
            (state,) = self._states[layer]
        else:
            state = chunks.value.new_zeros(*chunks.value.shape[:2], k_RLVD.shape[-1], v_RLVD.shape[-1])
        out, states = scan_chunks(chunks, state)
        self._states[layer] = [state, *states]
        return out[:, :, :length].transpose(1, 2).to(v_RLVD.dtype)


class Decoder:
    """A model that reads several texts at once, block by block.

    Args:
        network: the whole model, without pipeline stages. rows, room: see `DecodeCache`.
    """

    def __init__(self, network: LanguageModel, rows: int, room: int):
        self.network, self.rows = network, rows
        self.parallel = network.config.sequence_parallel
        # Sequence parallelism cuts the tokens of all rows evenly, so blocks are filled up behind their ends.
        self.multiple = network.tp_group.size() if self.parallel else 1
        device = network.head_weight.device
        self.trunk, self.mtp = (DecodeCache(rows, room + self.multiple, device) for _ in range(2))

    def _filled(self, x_RL: Tensor) -> Tensor:
        """Columns added until processes can share the tokens."""
        fill = -x_RL.shape[1] % self.multiple
        return torch.cat([x_RL, x_RL[:, :1].expand(-1, fill, *x_RL.shape[2:])], dim=1) if fill else x_RL

    def _by_rows(self, states_T1H: Tensor, length: int) -> Tensor:
        if self.parallel:
            states_T1H = gather_from_sequence_parallel_region(states_T1H, group=self.network.tp_group)
        return states_T1H.view(self.rows, -1, states_T1H.shape[-1])[:, :length]

    @torch.no_grad()
    def read(self, tokens_RL: Tensor, count_R: Tensor | None = None) -> Tensor:
        """The trunk's states of a block of tokens, after its final norm: [R, L, H].

        Args:
            count_R: how many tokens of each row count, if known; the rest fills rows up. Say so to `keep` in any case.
        """
        filled = self._filled(tokens_RL)
        states = self.network.trunk(filled, self.trunk.block(filled.shape[1], count_R), cache=self.trunk)
        return self._by_rows(states, tokens_RL.shape[1])

    def keep(self, count_R: Tensor) -> None:
        """Ends the block that was read: so many tokens of each row are remembered."""
        self.trunk.keep(count_R)

    @torch.no_grad()
    def predict(self, states_RLH: Tensor, tokens_RL: Tensor, begin_R: Tensor) -> Tensor:
        """The states of the MTP layer after one step, [R, L, H], which its attention remembers.

        Args:
            states_RLH: of the trunk or of the step before. tokens_RL: what follows each; begin_R: where a row begins.
        """
        states, tokens = self._filled(states_RLH), self._filled(tokens_RL)
        self.mtp.length_R = begin_R
        documents = self.mtp.block(tokens.shape[1])
        states = states.flatten(0, 1)[:, None]
        if self.parallel:
            states = scatter_to_sequence_parallel_region(states, group=self.network.tp_group)
        rotary = rotary_table(documents.position_RL, self.network.config.shape)
        layer, context = self.network.mtp.layers[0], LayerContext(documents, rotary, cache=self.mtp)
        states = layer(states, self.network.embed(tokens), context)
        return self._by_rows(states, tokens_RL.shape[1])

    @torch.no_grad()
    def logits(self, states_RH: Tensor) -> Tensor:
        """Of the token after each state, over the whole vocabulary: [..., H] -> [..., V]."""
        own = F.linear(states_RH, self.network.head_weight)
        return gather_parts(own, self.network.tp_group).movedim(0, -2).flatten(-2)
