"""Load of the experts: counted over the global batch, evened out by a loss whose gradient is read in the backward pass.

The balance loss of a layer is E * sum_i f_i P_i (Qiu et al., "Demons in the Detail", 2025, eq. 2-6): f_i is the
fraction of all assignments of the global batch that went to expert i, P_i its mean score. A perfectly balanced layer
scores 1.0, whatever the layout. f carries no gradient, so

    d loss / d score_{t,i} = E * f_i * w_t        (w_t: the token's weight in the mean over the global batch)

needs f only when the gradient passes by. Each forward pass of a stage starts one sum of all its layers' counts
over the ranks, and the backward pass reads all that have arrived: with one micro-batch that is the whole batch. With
several, all are counted in a pass ahead of the step ("exact"), or f is estimated ("online", see `Online.fractions`).

Shape suffixes: T tokens, E experts, K experts per token, R sequences of a micro-batch, M micro-batches, U uses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.layers.forecast import Forecast
from model.layers.recompute import first_time
from parallel.collectives import LaterSum, PendingSum, SumsTogether, start_sum, sum_over

# Online: how much of what earlier micro-batches were given wrongly is made good by those that follow. At 0 nothing of
# the error in the mean over micro-batches is taken back, at 1 all of it, at the price of large swings in the last ones.
FEEDBACK = 0.5

# What a router sums up beside its scores, each weighted so that the sum over ranks and micro-batches is a mean.
NOTES = ("local_loss", "local_violation", "z_loss", "entropy", "top_k_mass", "dropped")


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of a micro-batch that a rank routes.

    Attributes:
        weight_T: each token's weight in the router's mean over the global batch, 0 for padding.
        total: tokens of the global batch that are not padding.
        first, length: place of the first token among the micro-batch's, and length of its sequences.
        rows: sequences of the micro-batch.
        use: which use of a layer that a step uses several times (the MTP layer's), from 0.
    """

    weight_T: Tensor
    total: int
    first: int
    length: int
    rows: int
    use: int = 0

    def row_T(self) -> Tensor:
        """The sequence of each token."""
        return (self.first + torch.arange(self.weight_T.numel(), device=self.weight_T.device)) // self.length


class _AttachBalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scores_TE: Tensor, weight_T: Tensor, score_gradient: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(weight_T)
        ctx.score_gradient, ctx.dtype = score_gradient, scores_TE.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight_T,) = ctx.saved_tensors
        return grad, weight_T.to(ctx.dtype)[:, None] * ctx.score_gradient().to(ctx.dtype), None, None


class Online:
    """The counts of a step's micro-batches as they come, for one use of a router, and what was made of them.

    Args:
        expected_ME: what the micro-batches are expected to count, on any scale.
    Attributes:
        forward_sums: one sum over the ranks for each forward pass. Backward passes come in the same order.
    """

    def __init__(self, k: int, expected_ME: Tensor):
        self.k, self.expected_ME = k, expected_ME
        self.forward_sums: list[LaterSum] = []
        self.seen_E = torch.zeros(expected_ME.shape[1], dtype=torch.int64, device=expected_ME.device)
        self.added = self.backward_passes = 0
        self.done: Any = 0.0  # share of the batch's assignments behind us; a tensor once there are some
        self.given: Any = 0.0  # what they were given of f

    def settle(self) -> Tensor:
        """int64 [E]: all that the forward passes so far have counted."""
        for counts in self.forward_sums[self.added :]:
            self.seen_E += counts.wait()
        self.added = len(self.forward_sums)
        return self.seen_E

    def fractions(self, total: int) -> Tensor:
        """f for the next backward pass.

        Assignments that have not been seen are taken to be spread as expected. What the passes so far were given too
        much or too little, compared with what is known now, is in part taken back from those to come.
        """
        seen, assignments = self.settle().double(), self.k * max(total, 1)
        to_come = (assignments - seen.sum()).clamp(min=0)
        estimate = load_fractions(seen + to_come * load_fractions(self.expected_ME[self.added :].sum(dim=0)))
        fraction = estimate
        if self.backward_passes:
            owed = self.done * estimate - self.given
            fraction = estimate + FEEDBACK * owed / (1 - self.done).clamp(min=1e-9)  # 0: only padding is to come
        own = self.forward_sums[self.backward_passes].wait().sum().double() / assignments
        self.done, self.given = self.done + own, self.given + own * fraction
        self.backward_passes += 1
        return fraction


class Balance(nn.Module):
    """One router's counts, and the loss that reads them.

    Attributes:
        counts: int64 [uses, E], assignments of valid tokens in the whole last step; saved with the model.
        bias: float32 [E], added to the scores to choose experts, or None; saved with the model.
        counted_UME: the step's counts by micro-batch, where they were counted ahead of it.
        histogram_MB: what a step's micro-batches hold, where its loads are to be forecast.
        recording: whether passes also note what `train.routing` reports.
    """

    counts: Tensor
    bias: Tensor | None
    mean_scores: Tensor
    notes: Tensor
    counted_UME: Tensor | None
    histogram_MB: Tensor | None
    recording: bool

    def __init__(self, config, pg_collection):
        super().__init__()
        settings, self.num_experts, self.k = config.balance, config.shape.experts, config.shape.experts_per_token
        is_global = settings.scope == "global"
        self.by_row = settings.scope == "sequence"
        self.global_weight = settings.weight if is_global else 0.0
        self.local_weight = settings.weight * (settings.micro_weight if is_global else 1.0)
        self.bias_rate = settings.bias_rate
        self.local_group = pg_collection.tp_cp
        self.sums = SumsTogether(pg_collection.tp_dp_cp)  # `LanguageModel` gives all balances of a stage the same
        self.register_buffer("bias", torch.zeros(self.num_experts) if self.bias_rate else None)
        self.ahead: list[list[Tensor]] | None = None  # counts of each use's passes, while they are counted ahead
        self.online: list[Online] = []
        self.set_uses(1)

    def set_uses(self, uses: int) -> None:
        """How often a step uses the layer: each use has counts of its own, and the loss is the mean over them."""
        shape = (uses, self.num_experts)
        self.register_buffer("counts", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("mean_scores", torch.zeros(shape), persistent=False)
        self.register_buffer("notes", torch.zeros(len(NOTES)), persistent=False)
        self.forecast = Forecast(uses, self.num_experts)
        self.begin_step(recording=True)

    def forward(
        self, weights_TK: Tensor, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, tokens: RoutedTokens
    ) -> Tensor:
        """The weights unchanged, with the balance loss attached to them; counts the experts."""
        if self.ahead is not None:
            self.ahead[tokens.use].append(self.count(experts_TK, tokens)[0])
            return weights_TK
        counts = None
        if first_time() and self.counted_UME is None:
            counts = self.count(experts_TK, tokens)
            self.online[tokens.use].forward_sums.append(self.sums.add(counts[0]))
        if not torch.is_grad_enabled() or not (self.global_weight or self.local_weight or self.recording):
            return weights_TK
        local = None
        if self.local_weight or self.recording:
            if self.by_row or counts is None:
                counts = self.count(experts_TK, tokens, self.by_row)
            local = start_sum(counts, self.local_group)
        if self.recording and local is not None:
            self.note(logits_TE, scores_TE, experts_TK, tokens, local)
        gradient = partial(self.score_gradient, tokens, local)
        return _AttachBalanceLoss.apply(weights_TK, scores_TE, tokens.weight_T, gradient)

    def count(self, experts_TK: Tensor, tokens: RoutedTokens, by_row: bool = False) -> Tensor:
        """int64 [1, E] or, by sequence, [R, E]: assignments of this rank's valid tokens to each expert."""
        rows = tokens.rows if by_row else 1
        place_TK = experts_TK + tokens.row_T()[:, None] * self.num_experts if by_row else experts_TK
        valid_TK = (tokens.weight_T > 0)[:, None].expand_as(experts_TK)
        counts = torch.zeros(rows * self.num_experts, dtype=torch.int64, device=experts_TK.device)
        return counts.scatter_add_(0, place_TK.flatten(), valid_TK.flatten().long()).view(rows, -1)

    def score_gradient(self, tokens: RoutedTokens, local: PendingSum | None) -> Tensor:
        """d loss / d score over the token's weight: [E], or [T, E] by sequence. Called in the backward pass."""
        total = self.global_weight * self.fractions(tokens)
        if self.local_weight:
            assert local is not None  # started in the forward pass
            fraction_RE = load_fractions(local.wait())
            total = total + self.local_weight * (fraction_RE[tokens.row_T()] if self.by_row else fraction_RE[0])
        return self.num_experts * total

    def fractions(self, tokens: RoutedTokens) -> Tensor:
        """float64 [E]: f over the global batch, as far as it is known. Called once a backward pass."""
        if self.counted_UME is not None:
            return load_fractions(self.counted_UME[tokens.use].sum(dim=0))
        return self.online[tokens.use].fractions(tokens.total)

    @torch.no_grad()
    def note(
        self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, tokens: RoutedTokens, local: PendingSum
    ) -> None:
        """Sums up this rank's tokens for the report."""
        weight_T, counts_RE = tokens.weight_T.to(scores_TE.dtype), local.wait()
        fraction_RE = load_fractions(counts_RE).to(scores_TE.dtype)
        fraction = fraction_RE[tokens.row_T()] if self.by_row else fraction_RE
        violation = load_fractions(counts_RE.sum(dim=0)).max() * self.num_experts - 1
        log_sum_T = logits_TE.logsumexp(dim=-1)
        self.mean_scores[tokens.use] += weight_T @ scores_TE
        self.notes[: NOTES.index("dropped")] += torch.stack(
            [
                self.num_experts * (weight_T @ (scores_TE * fraction).sum(dim=-1)),
                weight_T.sum() * violation.to(scores_TE.dtype),
                weight_T @ log_sum_T.square(),
                weight_T @ (log_sum_T - (scores_TE * logits_TE).sum(dim=-1)),
                weight_T @ scores_TE.gather(1, experts_TK).sum(dim=-1),
            ]
        )

    @torch.no_grad()
    def note_dropped(self, dropped_TK: Tensor, tokens: RoutedTokens) -> None:
        """Sums up, for the report, the share of this rank's assignments that no expert takes."""
        dtype = self.notes.dtype
        self.notes[NOTES.index("dropped")] += tokens.weight_T.to(dtype) @ dropped_TK.to(dtype).mean(dim=1)

    def begin_step(self, recording: bool, histogram_MB: Tensor | None = None) -> None:
        """Forgets what an earlier step may have left.

        Args:
            histogram_MB: the buckets of each micro-batch's tokens over all ranks, where loads are to be forecast.
        """
        for online in self.online:
            online.settle()  # no sum over the ranks is left under way
        expected_UME = self.mean_scores.new_zeros(len(self.counts), 0, self.num_experts)
        if histogram_MB is not None:
            expected_UME = self.forecast.counts(histogram_MB, self.counts)
        self.online = [Online(self.k, expected_ME) for expected_ME in expected_UME]
        self.mean_scores.zero_()
        self.notes.zero_()
        self.recording, self.histogram_MB, self.counted_UME = recording, histogram_MB, None

    def end_step(self) -> None:
        """Keeps the counts of the step that has ended, and moves the bias towards experts that had too little.

        The bias: DeepSeek-V3 report, 2024, section 2.1.2, "auxiliary-loss-free load balancing".
        """
        self.counts.copy_(self.seen())
        if self.histogram_MB is not None:
            self.forecast.learn(self.histogram_MB, self.by_micro_batch())
        if self.bias is not None:
            load = self.counts.sum(dim=0).double()
            self.bias += self.bias_rate * (load.mean() - load).sign().to(self.bias.dtype)

    def seen(self) -> Tensor:
        """int64 [U, E]: what the step's forward passes so far have counted, or all of them, counted ahead."""
        if self.counted_UME is not None:
            return self.counted_UME.sum(dim=1)
        return torch.stack([online.settle() for online in self.online])

    def by_micro_batch(self) -> Tensor:
        """int64 [U, M, E]: what the step's micro-batches have counted."""
        if self.counted_UME is not None:
            return self.counted_UME
        return torch.stack([torch.stack([counts.wait() for counts in use.forward_sums]) for use in self.online])

    def take_counts(self, counted_UME: Tensor) -> None:
        """Ends the counting ahead of a step with what it has counted, summed over the ranks.

        The last step's counts stay until `end_step`: the step may be refused, or computed once more.
        """
        self.ahead, self.counted_UME = None, counted_UME


def load_fractions(counts: Tensor) -> Tensor:
    """Counts over their sum along the last dimension, float64; zero where nothing was counted."""
    counts = counts.double()
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


@contextmanager
def counting_ahead(balances: Iterable[Balance], group) -> Iterator[None]:
    """Forward passes inside, without gradients, count the step to come; one sum over the ranks for all layers."""
    balances = list(balances)
    for balance in balances:
        balance.ahead = [[] for _ in balance.counts]
    yield
    if balances:
        own = [torch.stack([torch.stack(passes) for passes in balance.ahead or []]) for balance in balances]
        parts = sum_over(torch.cat(own), group).split([len(part) for part in own])
        for balance, counted_UME in zip(balances, parts, strict=True):
            balance.take_counts(counted_UME)
