"""The DeepSpeed engine behind the protocol of `parallel.engine`: ZeRO 1, 2 and 3, the optimizer on the CPU if asked.

ZeRO splits what megatron-core's distributed optimizer splits (1), also the gradients (2), also the weights (3). Its
checkpoints are megatron-core's, not DeepSpeed's own, which hold the experts of one expert-parallel rank alone
(0.19.8): a run goes on with either engine.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import deepspeed
import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.ops.adam import DeepSpeedCPUAdam
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from parallel import compat, optimizer_state
from parallel.collectives import sum_over
from parallel.deepspeed_groups import ExpertGroups, Mpu
from parallel.engine import Accept, AdamW, DeepSpeedConfig, State
from parallel.optimizer_state import MASTER, MOMENTS, OptimizerShard
from parallel.replicas import damaged_replicas
from parallel.stages import load_weights, sharded_weights

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
GROUP = 2**30
OFFLOAD_BUCKET = 2**27  # numbers of gradients that are reduced at once; several copies of them lie on the GPU


class _Stage(nn.Module):
    """The model as DeepSpeed is given it, and beside it the groups of its experts."""

    def __init__(self, chunk: MegatronModule, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.chunk = chunk
        if any(map(is_moe_param, chunk.parameters())):
            self.experts = ExpertGroups(groups, chunk.config.num_moe_experts)

    def forward(self, batch: Any) -> Any:
        return self.chunk(batch)


def _prepare_gradients(chunk: MegatronModule, groups: ProcessGroupCollection) -> None:
    """Makes every parameter's gradient what ZeRO is to average: the losses ask for sums over the data-parallel ranks.

    Of a parameter that all tensor-parallel ranks hold, each has the gradient of its own part of the sequence.
    """
    for parameter in chunk.parameters():
        if groups.tp.size() > 1 and vars(parameter).get("sequence_parallel"):
            parameter.register_hook(lambda gradient: sum_over(gradient, groups.tp))
        if is_moe_param(parameter):
            parameter.group_name = f"ep_size_{groups.tp_ep.size()}"
            parameter.model_parallel = groups.tp.size() > 1  # other ranks hold others: all count in the norm
        if groups.dp_cp.size() > 1:
            parameter.register_hook(lambda gradient: gradient * groups.dp_cp.size())


def _parameter_groups(chunk: MegatronModule, decays: Callable[[str], bool], adamw: AdamW) -> list[dict[str, Any]]:
    """AdamW's groups: what decays and what does not, dense parameters and experts, each of one type.

    A group's weights are copied whole while ZeRO is set up, so it holds `GROUP` numbers or a single parameter at most.
    """
    found: dict[tuple[bool, bool, torch.dtype], list[dict[str, Any]]] = {}
    for name, parameter in chunk.named_parameters():
        is_expert, decayed = is_moe_param(parameter), decays(name)
        own: dict[str, Any] = {"params": [], "weight_decay": adamw.weight_decay * decayed, "name": "dense"}
        if is_expert:
            own |= {"moe": True, "name": parameter.group_name}
        groups = found.setdefault((is_expert, decayed, parameter.dtype), [own])
        if groups[-1]["params"] and sum(map(torch.numel, groups[-1]["params"])) + parameter.numel() > GROUP:
            groups.append(own)
        groups[-1]["params"].append(parameter)
    return [group for groups in found.values() for group in groups]


def _config(settings: DeepSpeedConfig, adamw: AdamW, dtype: torch.dtype) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": settings.zero, "overlap_comm": False}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["reduce_bucket_size"] = OFFLOAD_BUCKET
    if settings.zero == 3:
        zero["stage3_param_persistence_threshold"] = settings.persistent
    return {
        "train_micro_batch_size_per_gpu": 1,  # unread: the engine is told where a step ends
        "managed_gradient_accumulation": False,
        "gradient_clipping": adamw.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": None,
    }


def cpu_adam_error() -> float:
    """The largest error of three steps of DeepSpeed's AdamW on the CPU, relative, against torch's in float64.

    The first time on a machine its code is compiled, for a minute or more.
    """
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 1000, generator=generator)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    fast, slow = nn.Parameter(start.clone()), nn.Parameter(start.double())
    optimizers = DeepSpeedCPUAdam([fast], **settings), torch.optim.AdamW([slow], **settings)
    for gradient in gradients:
        fast.grad, slow.grad = gradient.clone(), gradient.double()
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        return float((fast - slow).norm() / (slow - start).norm())


class DeepSpeedEngine:
    """Runs training steps of one process's part of the model, all of its layers, under ZeRO.

    Args:
        chunks: the model, parameters filled; it takes a micro-batch. decays: see `MegatronEngine`.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        groups: ProcessGroupCollection,
        adamw: AdamW,
        device: torch.device,
        decays: Callable[[str], bool],
        settings: DeepSpeedConfig,
    ) -> None:
        (chunk,) = chunks
        self.chunks, self.groups, self.settings = chunks, groups, settings
        compat.leave_out_shared_memory()
        _prepare_gradients(chunk, groups)
        own = _parameter_groups(chunk, decays, adamw)
        common: dict[str, Any] = {"lr": 1.0, "betas": adamw.betas, "eps": adamw.eps}
        optimizer = DeepSpeedCPUAdam(own, **common) if settings.offload else torch.optim.AdamW(own, **common)
        dtype = chunk.config.params_dtype
        self._engine, *_ = deepspeed.initialize(
            model=_Stage(chunk, groups), optimizer=optimizer, mpu=Mpu(groups), config=_config(settings, adamw, dtype)
        )
        self.wrapped = [self._engine.module.chunk]
        self._parameters = list(chunk.parameters())
        self._released = [x for x in self._parameters if settings.zero == 3 and not x.ds_persist]
        self.steps, self._grad_norm = 0, math.inf
        self._accept: Callable[[float], bool] | None = None
        self._accepted: bool | None = None
        self._kept: dict[int, Tensor] | None = None
        compat.ask_before_steps(self._zero, settings.zero, self._is_accepted)
        compat.note_before_steps(self._zero, self._note_gradient)
        if settings.zero == 2 and settings.offload:
            compat.send_gradients_to_the_host(self._zero)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self._engine.optimizer

    def compute_gradients(self, batches: Sequence[Any], tokens: int) -> list[Any]:
        """See `parallel.engine.Engine`; micro-batches may be of any size, so ``tokens`` is of no use here."""
        self._release_weights()
        outputs = []
        for batch in batches:
            losses = self._engine(batch)
            self._engine.backward(losses.total, scale_wrt_gas=False)
            outputs.append(losses)
        return outputs

    def train_step(
        self, batches: Sequence[Any], tokens: int, lr: float, accept: Accept | None = None
    ) -> tuple[list[Any], float]:
        """See `parallel.engine.Engine`."""
        outputs = self.compute_gradients(batches, tokens)
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._grad_norm, self._accepted = math.inf, None
        self._accept = accept and partial(accept, outputs)
        self._engine.step()
        if self._zero.overflow:
            if self._accepted is None and accept is not None:  # ZeRO has seen it before the norm
                self._accepted = accept(outputs, self._grad_norm)
            if self._accepted in (None, True):
                raise FloatingPointError("the gradient norm is not finite; the optimizer step was not taken")
        self.steps += not self._zero.overflow
        return outputs, self._grad_norm

    def _is_accepted(self, grad_norm: float) -> bool:
        """Asked by ZeRO before it changes anything; it refuses what is not finite itself."""
        self._grad_norm = grad_norm
        if self._accept is not None:
            self._accepted = self._accept(grad_norm)
        return self._accepted is not False

    def keep_gradients(self, kept: bool) -> None:
        """See `parallel.engine.Engine`: ZeRO lets go of a group's gradients once its step is taken."""
        self._kept = {} if kept else None

    def _note_gradient(self, group: int) -> None:
        if self._kept is not None:
            self._kept[group] = cast(Tensor, self.mains[group].grad)

    @property
    def mains(self) -> list[Tensor]:
        """The flat float32 tensors that AdamW works on, by their numbers at ZeRO."""
        zero = self._zero
        mains = zero.fp32_partitioned_groups_flat if self.settings.zero == 3 else zero.single_partition_of_fp32_groups
        return cast(list[Tensor], mains)

    def gradient(self, group: int) -> Tensor | None:
        """What the last step took of a flat tensor's gradient, if it was to be kept."""
        return self._kept.get(group) if self._kept else None

    def gradient_bits(self) -> int:
        """Not for this engine: `check_engine` refuses run.verify_every, which alone asks."""
        raise NotImplementedError("ZeRO does not keep the gradients of a step that is computed again")

    def not_finite(self) -> dict[str, int]:
        """Nothing: ZeRO has let go of the gradients of a step that was not taken."""
        return {}

    def damaged_replicas(self) -> list[str]:
        """See `parallel.engine.Engine`."""
        self.gather_weights()
        parameters = list(self.chunks[0].named_parameters())
        return damaged_replicas(parameters, [is_moe_param(x) for _, x in parameters], self.groups)

    def gather_weights(self) -> None:
        """See `parallel.engine.Engine`; only ZeRO 3 leaves weights with their owners, and takes them back later."""
        if self._released:
            self._released[0].all_gather(param_list=self._released)
            for parameter in self._released:
                parameter.ds_persist = True  # layers that are run between steps do not let go of them

    def _release_weights(self, changed: bool = False) -> None:
        if self._released:
            for parameter in self._released:
                parameter.ds_persist = False
            self._released[0].partition(param_list=self._released, has_been_updated=changed)

    def sharded_state_dict(self, is_loading: bool) -> State:
        """See `parallel.engine.Engine`."""
        self.gather_weights()
        weights = self._sharded_weights()
        optimizer = optimizer_state.sharded_state(self.shards(), weights)
        return weights | {"optimizer": optimizer, "optimizer_step": self.steps}

    def _sharded_weights(self) -> State:
        return sharded_weights(self.chunks, {"dp_cp_group": self.groups.dp_cp})

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """See `parallel.engine.Engine`."""
        self.steps = state["optimizer_step"]
        load_weights(self.chunks, state)
        for shard in self.shards():
            if MASTER not in shard.tensors:  # else the checkpoint has it, and may have filled it where it lies
                shard.main.copy_(shard.parameter.detach().flatten()[shard.start : shard.stop])
        optimizer_state.take(self.shards(), self._sharded_weights(), state["optimizer"])
        self._release_weights(changed=True)

    def shards(self) -> Iterator[OptimizerShard]:
        """What this process holds of every parameter."""
        yield from _whole_shards(self) if self.settings.zero == 3 else _flat_shards(self)

    def moments(self, main: Tensor) -> Mapping[str, Tensor]:
        """AdamW's moments of a flat tensor; zeros before the first step, as it would begin with."""
        state = self._zero.optimizer.state[main]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(main)
        state["step"] = self.steps if self.settings.offload else torch.tensor(float(self.steps))
        return {name: state[name] for name in MOMENTS}


def _flat_shards(engine: DeepSpeedEngine) -> Iterator[OptimizerShard]:
    """ZeRO 1 and 2: a rank's partition is a run of the group's parameters, laid end to end."""
    zero = engine._zero
    for number, main in enumerate(engine.mains):
        moments, first = engine.moments(main), zero.real_dp_process_group[number].rank() * main.numel()
        places = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
        for parameter, place in places:
            start, stop = max(first - place, 0), min(first + main.numel() - place, parameter.numel())
            if start < stop:
                yield _shard(engine, number, parameter, moments, place + start - first, start, stop)


def _whole_shards(engine: DeepSpeedEngine) -> Iterator[OptimizerShard]:
    """ZeRO 3: a rank has its part of every parameter, equally large on all but for the end."""
    zero, rank = engine._zero, engine.groups.dp_cp.rank()
    for parameter in engine._parameters:
        number, place, numel = zero.grad_position[zero.get_param_id(parameter)]
        moments = engine.moments(engine.mains[number])
        start, stop = rank * numel, min((rank + 1) * numel, parameter.ds_numel)
        if start < stop:
            yield _shard(engine, number, parameter, moments, place, start, stop)


def _shard(
    engine: DeepSpeedEngine,
    group: int,
    parameter: nn.Parameter,
    moments: Mapping[str, Tensor],
    place: int,
    start: int,
    stop: int,
) -> OptimizerShard:
    """A part of a parameter that lies at a place of a group's flat tensor."""
    own = {name: moment.narrow(0, place, stop - start) for name, moment in moments.items()}
    main, gradient = engine.mains[group].detach().narrow(0, place, stop - start), engine.gradient(group)
    if gradient is not None:
        main.grad = gradient.narrow(0, place, stop - start)
    return OptimizerShard(parameter, main, own, start, stop)
