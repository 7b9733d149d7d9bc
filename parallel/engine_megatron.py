"""The megatron-core engine behind the protocol of `parallel.engine`: DDP, distributed optimizer, gradient clipping."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate, ParamWithNamePredicate
from megatron.core.optimizer.param_layout import BufferKey, FullParamLayout, PerBufferParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from parallel import compat, half_state, layout_cost, main_grads, optimizer_state
from parallel.engine import Accept, AdamW, State
from parallel.optimizer_state import OptimizerShard
from parallel.replicas import bits_of, damaged_replicas
from parallel.stages import load_weights, run_schedule, sharded_weights
from parallel.topology import ParallelConfig


def _finalize(model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Sums gradients over ranks. Losses are already divided by their global counts, so nothing is divided here."""
    finalize_model_grads(model, None, **kwargs)


def _ddp_config() -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )


def _sharers(key: BufferKey, groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The processes that share a buffer."""
    return groups.intra_expt_dp if key.is_expert_parallel else groups.intra_dp_cp


def buffer_layout(chunk: MegatronModule, groups: ProcessGroupCollection, parallel: ParallelConfig) -> FullParamLayout:
    """Where the parameters of a pipeline stage lie in the flat buffers of each type; needs no numbers in them."""
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]

    def cut(bucket: int) -> dict[BufferKey, PerBufferParamLayout]:
        sizes = (groups.intra_dp_cp.size(), _ddp_config(), groups.intra_expt_dp.size())
        return DistributedOptimizer.compute_full_param_layout(parameters, bucket, *sizes).layouts

    def buckets(key: BufferKey) -> PerBufferParamLayout:
        """Of one buffer: as large as its own group wants them, unless then they were too few to overlap anything."""
        size, fewest = max(parallel.bucket, parallel.bucket_share * _sharers(key, groups).size()), 1
        if smallest[key].bucket_indices[-1][1] >= layout_cost.FEWEST_BUCKETS * parallel.bucket:
            fewest = layout_cost.FEWEST_BUCKETS
        while len((found := cut(size)[key]).bucket_indices) < fewest and size > 1:
            size //= 2
        return found

    smallest = cut(parallel.bucket)
    layout = FullParamLayout({key: buckets(key) for key in smallest})
    for buffer in layout.layouts.values():
        # megatron-core counts the alignment before a pipeline's second embedding into the bucket before it, and then
        # saves more numbers than it declares.
        places = buffer.param_index_map.values()
        buffer.per_bucket_numel_unpadded = [
            max(stop for _, stop, bucket in places if bucket == index) - start
            for index, (start, _) in enumerate(buffer.bucket_indices)
        ]
    return layout


def wrap(chunk: MegatronModule, groups: ProcessGroupCollection, parallel: ParallelConfig) -> DistributedDataParallel:
    """One pipeline stage with the buffers that its gradients are gathered and summed in."""
    layout = buffer_layout(chunk, groups, parallel)
    ddp = DistributedDataParallel(chunk.config, _ddp_config(), chunk, pg_collection=groups, full_param_layout=layout)
    main_grads.fuse(chunk)
    return ddp


def allocated_bytes(
    chunk: MegatronModule, groups: ProcessGroupCollection, parallel: ParallelConfig, adamw: AdamW
) -> dict[str, int]:
    """Bytes that training a pipeline stage takes on this process: weights, gradients, optimizer; padding included.

    AdamW's two moments, and a float32 copy of what is not float32, exist for this process's part of each buffer.
    """
    total = {"weights": 0, "gradients": 0, "optimizer": 0}
    for key, layout in buffer_layout(chunk, groups, parallel).layouts.items():
        sharers = _sharers(key, groups)
        numel = layout.bucket_indices[-1][1]
        total["weights"] += numel * key.param_dtype.itemsize
        total["gradients"] += numel * key.grad_dtype.itemsize
        own = 0  # a share of each bucket
        for start, stop, bucket in layout.param_index_map.values():
            begin, end = layout.bucket_indices[bucket]
            share = (end - begin) // sharers.size()
            first = begin + sharers.rank() * share
            own += max(0, min(stop, first + share) - max(start, first))
        total["optimizer"] += own * layout_cost.adamw_bytes(key.param_dtype == torch.float32, adamw.halved)
    return total


class MegatronEngine:
    """Runs training steps of one process's part of the model over megatron-core's process groups.

    Args:
        chunks: the process's pipeline stages, parameters filled; each takes a micro-batch, and all share one
            megatron-core ``config``.
        decays: whether weight decay applies to a parameter, by name.
        parallel: how large the buckets are that gradients and weights travel in.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        groups: ProcessGroupCollection,
        adamw: AdamW,
        device: torch.device,
        decays: Callable[[str], bool],
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008
    ) -> None:
        self.chunks, self.groups, self.device, self.adamw = chunks, groups, device, adamw
        config = chunks[0].config
        config.finalize_model_grads_func = _finalize
        self.wrapped = [wrap(chunk, groups, parallel) for chunk in chunks]
        # Gradients travel from the last micro-batch on.
        no_sync = [chunk.no_sync for chunk in self.wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        undecayed = ParamWithNamePredicate(name="undecayed", fn=lambda _, name: not decays(name))
        # megatron-core numbers a group's parameters as if all had one type, so the float32 ones of a bfloat16 model
        # get groups of their own. Only its scheduler, which we do not use, reads end_wd: here it tells groups apart.
        wide = ParamPredicate(name="float32", fn=lambda parameter: parameter.dtype == torch.float32)
        compat.use_torch_adamw(not adamw.halved)
        moments = torch.bfloat16 if adamw.halved else torch.float32
        with compat.optimizer_context(device):
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=1.0,
                    min_lr=0.0,
                    weight_decay=adamw.weight_decay,
                    adam_beta1=adamw.betas[0],
                    adam_beta2=adamw.betas[1],
                    adam_eps=adamw.eps,
                    bf16=config.bf16,
                    params_dtype=config.params_dtype,
                    use_distributed_optimizer=True,
                    use_precision_aware_optimizer=adamw.halved,
                    exp_avg_dtype=moments,
                    exp_avg_sq_dtype=moments,
                ),
                self.wrapped,
                config_overrides={
                    ParamKey(with_name_predicate=undecayed): ParamGroupOverride(wd_mult=0.0),
                    ParamKey(predicate=wide): ParamGroupOverride(end_wd=0.0),
                },
                pg_collection=groups,
                use_gloo_process_groups=False,
            )
        self.steps = 0
        self._apply_settings()

    def _apply_settings(self) -> None:
        """Sets what megatron-core leaves to its scheduler."""
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.adamw.weight_decay * group["wd_mult"]
            group["betas"], group["eps"] = self.adamw.betas, self.adamw.eps
            # One pass over memory instead of one for each operation, whose results would take as much again.
            group["fused"] = self.device.type == "cuda"

    def compute_gradients(self, batches: Sequence[Any], tokens: int) -> list[Any]:
        """Forward and backward passes of this rank's micro-batches of ``tokens`` tokens each, summed over the ranks.

        Returns:
            What the network returned for each micro-batch (last pipeline stage only).
        """
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return run_schedule(self.wrapped, batches, tokens, forward_only=False)

    def keep_gradients(self, kept: bool) -> None:
        """Nothing to do: they lie in buffers until the next step's."""

    def gradient_bits(self) -> int:
        """The bits of this process's gradients, added up: equal after equal computations."""
        buffers = [buffer for chunk in self.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return sum(int(bits_of(buffer.grad_data)) for buffer in buffers)

    def not_finite(self) -> dict[str, int]:
        """Parameters of this process whose gradients are not finite, and their places among all that it holds."""
        parameters = [pair for chunk in self.chunks for pair in chunk.named_parameters()]
        return {
            name: place
            for place, (name, parameter) in enumerate(parameters)
            if not bool(cast(Any, parameter).main_grad.isfinite().all())
        }

    def train_step(
        self, batches: Sequence[Any], tokens: int, lr: float, accept: Accept | None = None
    ) -> tuple[list[Any], float]:
        """One optimizer step over this rank's micro-batches of ``tokens`` tokens each.

        Each rank then has its own part of the new weights; the others' arrive while the next step's forward pass runs.
        Whoever reads weights before it calls `gather_weights`.

        Args:
            accept: decides from the outputs and the gradient norm whether the optimizer takes the step, alike on every
                rank; without it, what is not finite raises.
        Returns:
            What the network returned for each micro-batch (last pipeline stage only), and the gradient norm before
            clipping.
        Raises:
            FloatingPointError: on every rank, if a gradient of any is not finite; parameters are as before.
        """
        outputs = self.compute_gradients(batches, tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with compat.optimizer_context(self.device):
            # megatron-core's own `step` checks gradients only when it scales losses for float16.
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            if accept is not None and not accept(outputs, grad_norm):
                return outputs, grad_norm
            return outputs, self._step_optimizer(grad_norm)

    def _step_optimizer(self, grad_norm: float) -> float:
        """megatron-core's optimizer step with ready gradients, given up before it changes anything if they are bad."""
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm}; the optimizer step was not taken")
        if self.adamw.clip > 0:
            parameters = [x for part in self.optimizer.chained_optimizers for x in part.get_parameters()]
            clip_grad_by_total_norm_fp32(parameters, self.adamw.clip, grad_norm, self.adamw.halved)
        self.optimizer.step_with_ready_grads()
        self.steps += 1
        return grad_norm

    def damaged_replicas(self) -> list[str]:
        """Parameters that are not the same, bit for bit, on all ranks that hold them; the same answer everywhere."""
        self.gather_weights()
        experts = {id(x) for ddp in self.wrapped for buffer in ddp.expert_parallel_buffers for x in buffer.params}
        parameters = [pair for chunk in self.chunks for pair in chunk.named_parameters()]
        return damaged_replicas(parameters, [id(parameter) in experts for _, parameter in parameters], self.groups)

    def gather_weights(self) -> None:
        """Makes every rank's weights whole after a step. All ranks call it."""
        for chunk in self.wrapped:
            chunk.start_param_sync(force_sync=True)

    def sharded_state_dict(self, is_loading: bool) -> State:
        """Model and optimizer as megatron-core's sharded state dict, for saving or as a template for loading."""
        self.gather_weights()
        if is_loading or not self.steps:
            self._allocate_moments()
        weights = self._sharded_weights()
        optimizer = optimizer_state.sharded_state(self.shards(), weights)
        return weights | {"optimizer": optimizer, "optimizer_step": self.steps}

    def shards(self) -> Iterator[OptimizerShard]:
        held_as = half_state.shard if self.adamw.halved else optimizer_state.plain_shard
        return optimizer_state.distributed_shards(self.optimizer.chained_optimizers, held_as)

    def _sharded_weights(self) -> State:
        return sharded_weights(self.chunks, {"dp_cp_group": self.groups.dp_cp})

    def _allocate_moments(self) -> None:
        """Gives AdamW the state that it has after a step, for a checkpoint to fill; zeros are what it begins with."""
        for part in self.optimizer.chained_optimizers:
            if self.adamw.halved:
                half_state.allocate(part.optimizer)
                continue
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    moments = {name: torch.zeros_like(parameter) for name in optimizer_state.MOMENTS}
                    part.optimizer.state[parameter] = moments
        self._count_steps()

    def _count_steps(self) -> None:
        """Tells AdamW how many steps it has taken, where it wants to know it."""
        for part in self.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                if self.adamw.halved:
                    group["step"] = self.steps
                    continue
                for parameter in group["params"]:
                    where = parameter.device if group["fused"] else None
                    part.optimizer.state[parameter]["step"] = torch.tensor(float(self.steps), device=where)

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Takes what `sharded_state_dict` described and the checkpoint filled."""
        self.steps = state["optimizer_step"]
        load_weights(self.chunks, state)
        optimizer_state.take(self.shards(), self._sharded_weights(), state["optimizer"])
        self._apply_settings()
        self._count_steps()
        if self.adamw.halved:  # which rounds halfway cases up, where a checkpoint of torch's AdamW has them even
            self.gather_weights()
