"""The seam of engines: all that `train/` asks of whoever runs its training steps.

An engine is built around a process's pipeline stages, whose parameters are filled. Between two steps, once
`gather_weights` was called, the stages themselves hold whole weights, so that `parallel.stages` can run, save and fill
them without knowing the engine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Protocol

from parallel.topology import RECOMPUTABLE, ParallelConfig, Topology, TopologyError

ENGINES = ("megatron", "deepspeed")
type State = dict[str, Any]  # megatron-core's sharded state dict


type Accept = Callable[[list[Any], float], bool]  # whether a step of these outputs and this gradient norm is taken


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What engine=deepspeed splits over the data-parallel processes, and where its optimizer works."""

    zero: Annotated[int, "ZeRO stage: 1 splits the optimizer, 2 also gradients, 3 also weights (no experts)"] = 1
    offload: Annotated[
        bool,
        "keeps the optimizer in the host's memory, and steps there with the fused CPU Adam",
    ] = False
    persistent: Annotated[int, "ZeRO 3: parameters of fewer numbers stay whole on every process"] = 100_000


@dataclass(frozen=True)
class AdamW:
    """What the optimizer needs to know; the learning rate comes with each step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    halved: bool = False  # the state takes half the memory (`parallel.half_state`)


def check_engine(
    engine: str, deepspeed: DeepSpeedConfig, topology: Topology, experts: int, dtype: str, verify_every: int = 0
) -> None:
    """Raises TopologyError for what an engine cannot do, with what can.

    Args:
        experts: mixtures of experts of the model. dtype: the model's type. verify_every: run.verify_every.
    """
    if engine not in ENGINES:
        raise TopologyError(f"engine={engine!r} is not known: choose {' or '.join(ENGINES)}")
    if engine != "deepspeed":
        return
    if deepspeed.zero not in (1, 2, 3):
        raise TopologyError(f"deepspeed.zero={deepspeed.zero} is not known: choose 1, 2 or 3")
    if deepspeed.zero == 3 and experts:
        raise TopologyError(
            "deepspeed.zero=3 does not split experts: choose deepspeed.zero=2 with deepspeed.offload=true, or spread "
            "the experts with parallel.expert"
        )
    for name, size in (("pipeline", topology.pipeline), ("expert_tensor", topology.expert_tensor)):
        if size > 1:
            raise TopologyError(
                f"parallel.{name}={size} is not for engine=deepspeed: choose parallel.{name}=1 and spread the model "
                f"with deepspeed.zero, parallel.tensor and parallel.expert, or engine=megatron"
            )
    if verify_every:
        raise TopologyError(
            f"run.verify_every={verify_every} is not for engine=deepspeed, which keeps no gradients to compare: choose "
            f"run.verify_every=0, or engine=megatron"
        )
    if deepspeed.zero == 3 and dtype != "float32":
        raise TopologyError(
            f"model.dtype={dtype} is not for deepspeed.zero=3, which has one type for all weights where norms need "
            f"float32: choose deepspeed.zero=2, model.dtype=float32, or engine=megatron"
        )


def check_recompute(
    engine: str, deepspeed: DeepSpeedConfig, parallel: ParallelConfig, mtp_steps: int, chained: bool
) -> None:
    """Raises TopologyError where engine=deepspeed would meet a weight's gradient in parts, which ZeRO 2 does not take:
    what is computed again has a backward pass of its own.

    Args:
        mtp_steps: how often the MTP layer is used. chained: whether full recomputation takes all its steps together.
    """
    with_weights = {"experts", "norm"} & set(parallel.recompute_modules or RECOMPUTABLE)
    in_parts = {"none": False, "selective": bool(with_weights), "full": not chained}[parallel.recompute]
    if engine == "deepspeed" and deepspeed.zero == 2 and mtp_steps > 1 and in_parts:
        raise TopologyError(
            f"parallel.recompute={parallel.recompute} with mtp.steps={mtp_steps} gives a weight of the MTP layer "
            f"several gradients in a backward pass, and deepspeed.zero=2 takes one: choose deepspeed.zero=1, "
            f"parallel.recompute=none, or full with mtp.keys=inference"
        )


def require_package(engine: str) -> None:
    """Raises TopologyError where what an engine is made of is not installed."""
    if engine == "deepspeed" and find_spec("deepspeed") is None:
        raise TopologyError("engine=deepspeed needs DeepSpeed, which is not installed: ./launch.sh setup deepspeed")


def require_planned(engine: str) -> None:
    """Raises TopologyError where nothing foresees what an engine holds and sends."""
    if engine != "megatron":
        raise TopologyError(f"engine={engine} is not planned for: leave it out and read what engine=megatron holds")


class Engine(Protocol):
    """Trains one process's part of the model. All ranks call each method together."""

    @property
    def chunks(self) -> Sequence[Any]:
        """The process's pipeline stages, in order."""

    @property
    def wrapped(self) -> Sequence[Any]:
        """The same as the engine runs them, with the types that it trains them in."""

    @property
    def groups(self) -> Any:
        """megatron-core's process groups."""

    def train_step(
        self, batches: Sequence[Any], tokens: int, lr: float, accept: Accept | None = None
    ) -> tuple[list[Any], float]:
        """One optimizer step over this rank's micro-batches of ``tokens`` tokens each.

        Losses arrive divided by their counts over the whole global batch: gradients are summed over ranks, not
        averaged. Each rank then needs to have its own part of the new weights only: whoever reads weights before the
        next step calls `gather_weights`.

        Args:
            accept: decides before anything changes whether the optimizer takes the step, alike on every rank; without
                it, what is not finite raises.
        Returns:
            What the network returned for each micro-batch (last pipeline stage only), and the gradient norm before
            clipping.
        Raises:
            FloatingPointError: on every rank, if a gradient of any is not finite; parameters are as before.
        """

    def compute_gradients(self, batches: Sequence[Any], tokens: int) -> list[Any]:
        """The forward and backward passes of a step alone; returns what the network returned."""

    def gradient_bits(self) -> int:
        """The bits of this process's gradients, added up: equal after equal computations."""

    def not_finite(self) -> dict[str, int]:
        """Parameters of this process whose gradients are not finite, and their places among all that it holds."""

    def damaged_replicas(self) -> list[str]:
        """Parameters that are not the same, bit for bit, on all ranks that hold them; the same answer everywhere."""

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken."""

    def keep_gradients(self, kept: bool) -> None:
        """Before a step: whether `shards` has its gradients afterwards."""

    def shards(self) -> Iterator[Any]:
        """What this process's optimizer holds of every parameter (`parallel.optimizer_state.OptimizerShard`)."""

    def gather_weights(self) -> None:
        """Makes every rank's weights whole after a step."""

    def sharded_state_dict(self, is_loading: bool) -> State:
        """Model and optimizer as megatron-core's sharded state dict, for saving or as a template for loading.

        Every engine uses the same names, shapes and types, so that a run may go on with another one:
        the weights by `parallel.stages.sharded_weights`; AdamW's moments, and the float32 copy of what is not float32,
        as ``optimizer.exp_avg.NAME``, ``optimizer.exp_avg_sq.NAME`` and ``optimizer.master.NAME``;
        ``optimizer_step``.
        """

    def load_state_dict(self, state: State) -> None:
        """Takes what `sharded_state_dict` described and the checkpoint filled."""
