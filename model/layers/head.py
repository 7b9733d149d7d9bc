"""The output head: logits for whoever asks for them, and the losses of training, for which full logits never exist."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from model.batch import MicroBatch
from model.layers.loss import Targets, linear_cross_entropy
from parallel.main_grads import with_main_grad


class Head(ColumnParallelLinear):
    """megatron-core's output layer, which computes the losses of what it predicts.

    All that reads its weight in training is called through the module, whose hook waits for the weight's parts of other
    ranks.
    """

    def __init__(self, config, vocab_size: int, tp_group, holds_weight: bool = True):
        super().__init__(
            config.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=not holds_weight,
            tp_group=tp_group,
        )
        self.tied = config.shape.tied_embeddings
        if not self.tied:
            with_main_grad(self.weight)

    def forward(self, states_T1H: list[Tensor], batch: MicroBatch, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and the cross-entropy of every position at every prediction step: [1 + K, T].

        Args:
            states_T1H: what the head reads, for the next token and for each MTP step.
            weight_VH: its matrix; a tied one gets its gradient from autograd, which adds the embedding's.
        """
        mtp, dtype = self.config.mtp, torch.promote_types(weight_VH.dtype, torch.float32)
        # Its gradient is worked out on the way forward: it is told there what a step's loss counts for.
        factors = [1.0, *mtp.loss_weights(batch.tokens_before)]
        main_grad = None if self.tied else self.weight.main_grad
        targets = [
            Targets(target, factor * weight, head_learns=step == 0 or not mtp.detach)
            for step, (target, weight, factor) in enumerate(
                zip(batch.targets_KT, batch.weights_KT.to(dtype), factors, strict=True)
            )
        ]
        hidden = [states[:, 0] for states in states_T1H]
        return linear_cross_entropy(hidden, weight_VH, targets, self.tp_group, main_grad)

    def logits(self, hidden_T1H: Tensor, weight_VH: Tensor) -> Tensor:
        """Over the whole vocabulary: [T, 1, H] -> [T, V]."""
        logits, _ = super().forward(hidden_T1H, weight_VH, runtime_gather_output=True)
        return logits[:, 0]
