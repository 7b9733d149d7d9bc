"""The output head: logits for whoever asks for them, and the losses of training, for which full logits never exist."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from model.batch import MicroBatch
from model.layers.loss import linear_cross_entropy
from parallel.main_grads import with_main_grad


class Head(ColumnParallelLinear):
    """megatron-core's output layer, which computes the losses of what it predicts.

    All that reads its weight in training is called through the module, whose hook waits for the weight's parts of other
    ranks.
    """

    def __init__(self, config, vocab_size: int, tp_group):
        super().__init__(
            config.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        with_main_grad(self.weight)

    def forward(self, states_T1H: list[Tensor], batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and the cross-entropy of every position at every prediction step: [1 + K, T].

        Args:
            states_T1H: what the head reads, for the next token and for each MTP step.
        """
        mtp, dtype = self.config.mtp, torch.promote_types(self.weight.dtype, torch.float32)
        # Its gradient is worked out on the way forward: it is told there what a step's loss counts for.
        factors = [1.0, *mtp.loss_weights(batch.tokens_before)]
        heads = [self.weight, *[self.weight.detach() if mtp.detach else self.weight] * mtp.steps]
        results = [
            linear_cross_entropy(hidden[:, 0], head, target, factor * weight, self.tp_group, self.weight.main_grad)
            for hidden, head, target, weight, factor in zip(
                states_T1H, heads, batch.targets_KT, batch.weights_KT.to(dtype), factors, strict=True
            )
        ]
        return torch.stack([mean for mean, _ in results]).sum(), torch.stack([losses for _, losses in results])

    def logits(self, hidden_T1H: Tensor) -> Tensor:
        """Over the whole vocabulary: [T, 1, H] -> [T, V]."""
        logits, _ = super().forward(hidden_T1H, runtime_gather_output=True)
        return logits[:, 0]
