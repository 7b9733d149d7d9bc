"""The mixture of experts: route, send tokens to their experts, two grouped matrix products, send back, add up.

Rows are moved by gathers only (`model.layers.rows`): sorting T*K assignments by expert is a permutation, and the
inverse of a permutation is a gather. Each row is multiplied by its probability (the router's weight) between the two
products, where it is narrowest.

Shape suffixes: T tokens, K experts per token, N = T*K rows, E local experts, H hidden, F local width of an expert.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.kernels.backends import accelerated
from model.layers.balance import RoutedTokens
from model.layers.dense import SwiGLU, SwiGLUSubmodules
from model.layers.dispatch import DispatchPlan
from model.layers.norm import at_least_float32
from model.layers.recompute import in_training, recomputable
from model.layers.router import Router
from model.layers.rows import count_sorted, invert, permute, reorder, unpermute
from parallel.main_grads import add_weight_gradient, dummy_gradient, with_main_grad

WIDTH_DIM = 2  # of both weights of the experts

type MainGrads = tuple[Tensor | None, Tensor | None]  # of the gradients of the experts' two weights
NO_MAIN_GRADS: MainGrads = (None, None)


class _LoopedLinear(torch.autograd.Function):
    """One matrix product an expert. On a CPU this beats `grouped_mm`, whose cost there grows with idle experts."""

    @staticmethod
    def forward(ctx, x_NI: Tensor, weight: Tensor, counts: list[int], total: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI)
        ctx.weight, ctx.counts, ctx.total = weight, counts, total  # itself, see `dummy_gradient`
        matrices_EOI = weight.view(len(counts), -1, x_NI.shape[1])
        out = x_NI.new_empty(x_NI.shape[0], matrices_EOI.shape[1])
        for rows, matrix, x in zip(out.split(counts), matrices_EOI, x_NI.split(counts), strict=True):
            torch.mm(x, matrix.t(), out=rows)
        return out

    @staticmethod
    def backward(ctx, grad_NO: Tensor):
        (x_NI,), weight = ctx.saved_tensors, ctx.weight
        grad_x, grad_NO = torch.empty_like(x_NI), grad_NO.contiguous()
        sums = torch.zeros_like(weight) if ctx.total is None else ctx.total
        matrices_EOI, sums_EOI = (x.view(len(ctx.counts), -1, x_NI.shape[1]) for x in (weight, sums))
        parts = (grad_NO.split(ctx.counts), x_NI.split(ctx.counts), grad_x.split(ctx.counts))
        for grad, x, out, matrix, total in zip(*parts, matrices_EOI, sums_EOI, strict=True):
            torch.mm(grad, matrix, out=out)
            add_weight_gradient(x, grad, total)
        return grad_x, sums if ctx.total is None else dummy_gradient(weight), None, None


def grouped_linear(x_NI: Tensor, weight: Tensor, counts_E: Tensor, total: Tensor | None = None) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix [O, I]: [N, I] -> [N, O]; counts [E] sum to N.

    Args:
        weight: [E, ..., I] with O columns out in all between. total: of the weight's shape; if given, the weight's
            gradient is added to it (`parallel.main_grads`).
    """
    return _LoopedLinear.apply(x_NI, weight, counts_E.tolist(), total)


def grouped_mlp(
    x_NH: Tensor,
    weight1_E2FH: Tensor,
    weight2_EHF: Tensor,
    probs_N: Tensor,
    counts_E: Tensor,
    main_grads: MainGrads = NO_MAIN_GRADS,
) -> Tensor:
    """SwiGLU of each row by its expert, times the row's probability; ``counts`` rows for each expert, sorted.

    Args:
        main_grads: what the gradients of the two weights are added to, see `grouped_linear`.
    """
    gate, up = grouped_linear(x_NH, weight1_E2FH, counts_E, main_grads[0]).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate) * up * probs_N[:, None].to(x_NH.dtype), weight2_EHF, counts_E, main_grads[1])


@accelerated("model.kernels.experts")
def fused_moe(
    x_TH: Tensor,
    weight1_E2FH: Tensor,
    weight2_EHF: Tensor,
    probs_N: Tensor,
    counts_E: Tensor,
    source_N: Tensor,
    inverse_TK: Tensor,
    main_grads: MainGrads = NO_MAIN_GRADS,
) -> Tensor:
    """`grouped_mlp` of the rows that each token has, added up: [T, H]. Arguments as of `permute` and `grouped_mlp`."""
    rows = permute(x_TH, source_N, inverse_TK)
    return unpermute(grouped_mlp(rows, weight1_E2FH, weight2_EHF, probs_N, counts_E, main_grads), source_N, inverse_TK)


def in_chunks(
    function: Callable,
    x_TH: Tensor,
    probs_N: Tensor,
    counts_E: Tensor,
    source_N: Tensor,
    inverse_TK: Tensor,
    chunk: int | None,
) -> Tensor:
    """``function(x, probs, counts, source, inverse)``; of more than ``chunk`` tokens so many at a time.

    Those are computed again in the backward pass, so that what is kept and worked with does not grow with them.
    """
    if chunk is None or len(x_TH) <= chunk:
        return function(x_TH, probs_N, counts_E, source_N, inverse_TK)
    expert_N = torch.arange(len(counts_E), device=x_TH.device).repeat_interleave(counts_E, output_size=len(source_N))
    first, results = 0, []
    for x, inverse in zip(x_TH.split(chunk), inverse_TK.split(chunk), strict=True):
        inside_N = (source_N >= first) & (source_N < first + len(x))
        own = inside_N.nonzero()[:, 0]
        place = torch.cat([inside_N.cumsum(0) - 1, source_N.new_full((1,), -1)])  # also of -1: the last one
        counts = count_sorted(expert_N[own], len(counts_E))
        again = (function, x, probs_N.index_select(0, own), counts, source_N[own] - first, place[inverse])
        results.append(checkpoint(*again, use_reentrant=False, preserve_rng_state=False))
        first += len(x)
    return torch.cat(results)


class Experts(MegatronModule):
    """This rank's part of the routed experts as two stacked weights: gate and up [E, 2, F, H], down [E, H, F].

    Experts are spread over the expert-parallel group, and the width of each over the expert-tensor-parallel group.
    """

    def __init__(self, config, pg_collection):
        super().__init__(config=config)
        shape = config.shape
        self.ep_group, self.etp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.local = shape.experts // self.ep_group.size()
        width, hidden, dtype = shape.expert_size // self.etp_group.size(), config.hidden_size, config.params_dtype
        self.weight1 = with_main_grad(nn.Parameter(torch.empty(self.local, 2, width, hidden, dtype=dtype)))
        self.weight2 = with_main_grad(nn.Parameter(torch.empty(self.local, hidden, width, dtype=dtype)))
        for weight in (self.weight1, self.weight2):
            # megatron-core's mark of a parameter reduced over its expert-data-parallel group, not over all of
            # data parallel. Tensor ranks count too: each routes its own slice of the sequence.
            weight.allreduce = pg_collection.tp_ep.size() == 1 and pg_collection.tp.size() == 1
            # Its part of the gradient's norm is every process's own.
            weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, WIDTH_DIM, 1

    @property
    def main_grads(self) -> MainGrads:
        """Where the gradients of the weights are added up in training under data parallelism."""
        return self.weight1.main_grad, self.weight2.main_grad

    @recomputable("experts")
    def forward(
        self,
        x_TH: Tensor,
        probs_N: Tensor,
        counts_E: Tensor,
        source_N: Tensor,
        inverse_TK: Tensor,
        chunk: int | None = None,
    ) -> Tensor:
        """What this rank's experts make of tokens, of its own or of others that sent them: see `fused_moe`.

        Of more than ``chunk`` tokens so many at a time, and again in the backward pass. An addend where the width of
        experts is spread.
        """
        return in_chunks(self._mix, x_TH, probs_N, counts_E, source_N, inverse_TK, chunk)

    def _mix(self, x_TH: Tensor, *rest: Tensor) -> Tensor:
        return fused_moe(x_TH, self.weight1, self.weight2, *rest, self.main_grads)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None):
        """One tensor of all experts, cut along the experts and along their width."""
        cuts = [(dim, group.rank(), group.size()) for dim, group in ((0, self.ep_group), (WIDTH_DIM, self.etp_group))]
        replica = (0, 0, self.dp_group.rank())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}", weight, *sharded_offsets, *cuts, replica_id=replica
            )
            for name, weight in self.named_parameters()
        }


@accelerated("model.kernels.experts")
def gate_rows(x: Tensor, score: Tensor) -> Tensor:
    """x [..., H] times the sigmoid of a score [..., 1] for each row, which is taken in at least float32."""
    return x * at_least_float32(score).sigmoid().to(x.dtype)


class SharedExpert(SwiGLU):
    """The expert that every token uses: SwiGLU, times the sigmoid of one learned score a token."""

    def __init__(self, config, submodules, pg_collection):
        super().__init__(config, config.shape.shared_expert_size, submodules, pg_collection)
        self.gate_weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        self.gate_weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_T1H: Tensor, gated: Tensor | None = None) -> Tensor:
        """[T, 1, H] -> [T, 1, H].

        Args:
            gated: what `up_gate` made of hidden, where that was done before.
        """
        gated = self.up_gate(hidden_T1H) if gated is None else gated
        return gate_rows(self.down(gated), F.linear(hidden_T1H, self.gate_weight))


class MixtureOfExperts(MegatronModule):
    """Routed experts spread over the expert-parallel group, plus the shared expert unless its size is 0."""

    def __init__(self, config, submodules, pg_collection, is_mtp_layer: bool = False, name=None):
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        # The holders of all experts between them, those of one expert's parts next to each other.
        self.tp_ep_group, self.domains = pg_collection.tp_ep, pg_collection.expert_domains
        self.router = Router(config, pg_collection)
        self.experts = Experts(config, pg_collection)
        self.fullest = 0.0  # assignments that any rank had in training since this was set, over an even share
        self.network_rows = self.sent_tokens = 0  # in training since these were set
        has_shared = config.shape.shared_expert_size > 0
        self.shared_expert = SharedExpert(config, submodules, pg_collection) if has_shared else None

    @classmethod
    def builder(cls, submodules: SwiGLUSubmodules):
        """What megatron-core's layer calls to build its MLP."""
        return partial(cls, submodules=submodules)

    def forward(self, hidden_states: Tensor, padding_mask: RoutedTokens | None = None) -> tuple[Tensor, None]:
        """hidden [T, 1, H] -> [T, 1, H].

        Args:
            padding_mask: what the router counts, see `model.layers.context.LayerContext`.
        """
        flat = hidden_states.flatten(0, 1)
        weights, chosen = self.router(flat, padding_mask)
        ordered, order = chosen.flatten().int().sort(stable=True)
        counts = count_sorted(ordered, self.router.num_experts)
        if self.tp_ep_group.size() > 1:
            mixed, shared = self.dispatch_and_combine(flat, weights, chosen, counts, order, hidden_states)
        else:
            if self.router.capacity is not None:
                order = order[: int(counts.sum())]  # what was dropped stands behind
            inverse = invert(order, chosen.numel())
            probs = reorder(weights.flatten(), order, inverse)
            mixed = self.experts(flat, probs, counts, order // self.router.k, inverse.view(chosen.shape))
            shared = self.shared_expert(hidden_states) if self.shared_expert else None
        mixed = mixed.view_as(hidden_states)
        return (mixed if shared is None else mixed + shared), None

    def dispatch_and_combine(
        self, flat: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor, order: Tensor, hidden_T1H: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Sends tokens to the ranks that hold their experts (dispatch), and what those make of them back (combine).

        Meanwhile the shared expert is computed: its up and gate projections while rows are under way, its down
        projection while results return, and likewise the other way round in the backward pass.
        Over several NVLink domains rows take two legs, see `model.layers.dispatch`. Where several hold parts of an
        expert, each gets its rows and returns addends: as much traffic as a gather and a reduce-scatter among them, in
        the exchanges that are there anyway.
        Rows that nothing reads any more have no name here, so that their memory is free while experts compute.

        Returns:
            What the routed experts make of the tokens, and what the shared expert does, if there is one.
        """
        plan = DispatchPlan(chosen, counts, self.tp_ep_group, self.experts, self.domains)
        # The GPU does this while the host waits for the counts.
        first = plan.first
        routes = first.routes(reorder(weights.flatten(), order, invert(order)), order)
        plan.wait()
        if in_training():  # drafts of an evaluation are a few tokens, which go to a few ranks
            self.fullest = max(self.fullest, plan.fullest)
            self.network_rows += plan.network_rows
            self.sent_tokens += len(flat)
        # Small and first, so that what is made of them is ready when the rows are.
        pending_routes = first.start_routes(routes)
        pending_rows = first.start_rows(flat)
        gated = self.shared_expert.up_gate(hidden_T1H) if self.shared_expert else None
        probs, places = first.arrived(pending_routes.wait())
        second = plan.second(places)
        if second is not None:
            pending_routes = second.start_routes(second.routes(probs, places))
            pending_rows = second.start_rows(pending_rows.wait())
            probs, places = second.arrived(pending_routes.wait())
        arrived = (second or first).by_row(places)
        results = self.experts(pending_rows.wait(), probs, plan.received_E, *arrived, plan.chunk)
        if second is not None:
            pending_results = second.start_results(results)
            del results
            results = second.combine(pending_results)
        pending_results = first.start_results(results)
        del results
        shared = self.shared_expert(hidden_T1H, gated) if self.shared_expert else None
        return first.combine(pending_results), shared
