"""What layers of the trunk show of themselves on sampled steps: sinks, gates, decays, massive activations.

A `Gauge` is off on all other steps, and then costs one look at a flag. What it adds up on this process is summed, or
its maxima taken, over all processes by `train.watch.gauges`; tokens that are padding count nowhere.

Attention sink and gates: Qiu et al., "Gated Attention for Large Language Models", 2025, section 4. Massive activations:
Sun et al., "Massive Activations in Large Language Models", 2024, section 2.

Shape suffixes: R rows, L length, T = R*L, S sampled queries of a row, N query heads, M key heads, V value heads, D
dimension of a head, H hidden.
"""

import torch
from torch import Tensor

from model.documents import Documents
from model.layers.norm import at_least_float32
from model.layers.recompute import first_time

QUERIES = 64  # of a row at most, spread evenly, whose attention is computed once more
EARLIEST = 16  # place in its document from which a query counts: an even share on the first token is small by then
LOW_GATE = 0.1
MASSIVE, TIMES_MEDIAN = 100.0, 1000.0  # a massive activation is above both: itself, and times its token's median

SUMS = {
    "layer": ("massive",),
    "attention": ("sink", "queries", "gate", "low_gates", "gates"),
    "deltanet": ("decay", "beta", "writes"),
}
MAXIMA = {
    "layer": ("activation",),
    "attention": (),
    "deltanet": ("decay", "minus_decay", "beta", "minus_beta"),
}


class Gauge:
    """Sums and maxima, by name, of what a module computes in the micro-batches of a sampled step."""

    def __init__(self) -> None:
        self.sampled = False
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}

    def begin(self, sampled: bool) -> None:
        """Forgets the last sampled step; whether the next one is sampled."""
        self.sampled, self.sums, self.maxima = sampled, {}, {}

    @property
    def listens(self) -> bool:
        """Whether what is being computed belongs to a sampled step's first forward pass."""
        return self.sampled and first_time()

    def add(self, **values: Tensor) -> None:
        """Adds to sums, in float64."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def top(self, **values: Tensor) -> None:
        """Raises maxima; of no numbers at all there is none."""
        for name, value in values.items():
            if value.numel():
                largest = value.detach().max().double()
                self.maxima[name] = torch.maximum(self.maxima[name], largest) if name in self.maxima else largest


@torch.no_grad()
def note_activations(gauge: Gauge, hidden_T1H: Tensor, valid_T: Tensor) -> None:
    """Of the residual stream behind a layer: the largest number, and how many are massive beside their token's."""
    size_TH = hidden_T1H.detach().flatten(0, 1)[valid_T].abs()
    gauge.top(activation=size_TH)
    large_TH = size_TH[size_TH.amax(dim=-1) > MASSIVE]  # few, so that few medians are taken
    # As `median`, whose places in the tensor torch cannot tell deterministically on a GPU.
    median_T1 = large_TH.sort(dim=-1).values[:, (large_TH.shape[-1] - 1) // 2, None]
    gauge.add(massive=((large_TH > MASSIVE) & (large_TH >= TIMES_MEDIAN * median_T1)).sum())


@torch.no_grad()
def note_gates(gauge: Gauge, gate_TND: Tensor, documents: Documents) -> None:
    """Of attention's output gates, before the sigmoid: their sum, and how many are below `LOW_GATE`."""
    gate = at_least_float32(gate_TND.detach()[documents.ids_RL.flatten() >= 0]).sigmoid()
    gauge.add(
        gate=gate.sum(dtype=torch.float64), low_gates=(gate < LOW_GATE).sum(), gates=gate.new_tensor(gate.numel())
    )


@torch.no_grad()
def note_sink(gauge: Gauge, q_TND: Tensor, k_TMD: Tensor, documents: Documents) -> None:
    """Attention of later tokens on their document's first: its sum over the sampled queries and heads."""
    rows, length = documents.ids_RL.shape
    place_S = torch.arange(0, length, -(-length // QUERIES), device=q_TND.device)
    position_RS, ids_RS = documents.position_RL[:, place_S], documents.ids_RL[:, place_S]
    q, k = (at_least_float32(x.detach()).view(rows, length, *x.shape[1:]) for x in (q_TND, k_TMD))
    q = q[:, place_S].unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("rsmgd,rlmd->rmgsl", q, k) * q.shape[-1] ** -0.5
    seen = (ids_RS[:, :, None] == documents.ids_RL[:, None]) & (place_S[:, None] >= torch.arange(length).to(place_S))
    share = scores.masked_fill_(~seen[:, None, None], -torch.inf).softmax(dim=-1)
    first_RS = place_S - position_RS
    on_first = share.gather(-1, first_RS[:, None, None, :, None].expand(*share.shape[:-1], 1))[..., 0]
    counted = ((position_RS >= EARLIEST) & (ids_RS >= 0))[:, None, None].expand_as(on_first)
    gauge.add(sink=on_first[counted].sum(dtype=torch.float64), queries=counted.sum())


@torch.no_grad()
def note_delta(gauge: Gauge, g_RLV: Tensor, beta_RLV: Tensor, documents: Documents) -> None:
    """Of Gated DeltaNet: what a token leaves of the state, exp(g), and how strongly it writes."""
    valid_RL = documents.ids_RL >= 0
    decay, beta = g_RLV.detach()[valid_RL].exp(), beta_RLV.detach()[valid_RL]
    gauge.add(
        decay=decay.sum(dtype=torch.float64), beta=beta.sum(dtype=torch.float64), writes=valid_RL.sum() * beta.shape[-1]
    )
    gauge.top(decay=decay, minus_decay=-decay, beta=beta, minus_beta=-beta)
