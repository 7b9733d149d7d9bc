"""What the network looks like: its dimensions, its layer pattern and its multi-token-prediction head.

A pattern is a string with one symbol a layer, in megatron-core's alphabet: ``G`` Gated DeltaNet, ``*`` gated
attention, ``E`` mixture of experts, ``-`` dense SwiGLU, ``|`` a pipeline cut. ``GEGEGE*E`` is the 3:1 hybrid of
Qwen3-Next: four blocks of a token mixer and a mixture of experts each. ``*-`` is a plain transformer block.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Protocol

LAYER_SYMBOLS = "G*E-"
LAYER_NAMES = {"G": "Gated DeltaNet", "*": "attention", "E": "experts", "-": "dense"}
HEAD_CHUNK = 1024  # tokens whose logits exist at once
KERNEL_HEAD_CHUNK = 8192  # the same on GPU kernels: as few sums of the head's gradient as memory allows
LAYER = "layer"  # to recompute: a whole layer
INFERENCE, DEPTH = "inference", "depth"  # keys of the multi-token-prediction steps
DELTA_CHUNK = 64  # tokens that the delta rule solves together
MAX_TAPS = 4  # of the convolution on GPU kernels
ALIGNED = 8  # numbers in bfloat16 that a row of an expert's weights is a multiple of, on GPU kernels

# Settings of ModelConfig that count something there must be one of.
SIZES = (
    "repeats",
    "hidden_size",
    "vocab_size",
    "attention_heads",
    "key_value_heads",
    "head_dim",
    "linear_key_heads",
    "linear_value_heads",
    "linear_key_dim",
    "linear_value_dim",
    "conv_kernel",
    "experts",
    "experts_per_token",
    "expert_size",
    "dense_size",
)
MOST_INDEXED, MOST_REPEATS = 2**31 - 1, 10_000  # by kernels; of a pattern, which is written out to be counted
FP8_ALIGNED = 16  # rows and columns of whatever is multiplied in FP8


class ModelError(ValueError):
    """A model setting that cannot be built; the message names the setting, its value, the reason and the mend."""


class Layout(Protocol):
    """Sizes of each kind of parallelism that modules are built for; `parallel.topology.Topology` has them."""

    @property
    def tensor(self) -> int: ...

    @property
    def pipeline(self) -> int: ...

    @property
    def virtual(self) -> int: ...  # pipeline stages of one process

    @property
    def context(self) -> int: ...

    @property
    def expert(self) -> int: ...

    @property
    def expert_tensor(self) -> int: ...


@dataclass(frozen=True)
class OneProcess:
    """The layout of a model that one process holds whole."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1


@dataclass(frozen=True)
class ModelConfig:
    """Shape and initialisation of the network. Defaults are Qwen3-Next-80B-A3B's where a default is needed."""

    pattern: Annotated[str, "layers: G Gated DeltaNet, * gated attention, E experts, - dense, | cut"] = "GEGEGE*E"
    repeats: Annotated[int, "how many times the pattern is repeated"] = 1
    hidden_size: Annotated[int, "width of the residual stream"] = 128
    vocab_size: Annotated[int | None, "rows of the embedding; null takes the tokenizer's, padded to 64"] = None
    attention_heads: Annotated[int, "query heads of gated attention"] = 4
    key_value_heads: Annotated[int, "key/value heads of gated attention (GQA groups)"] = 2
    head_dim: Annotated[int, "dimensions of an attention head"] = 32
    attention_gate: Annotated[bool, "attention's output gate; false: plain softmax attention"] = True
    rotary_fraction: Annotated[float, "share of head_dim that RoPE rotates"] = 0.25
    rope_base: Annotated[float, "RoPE base (theta)"] = 1e7
    yarn_factor: Annotated[float, "how many times YaRN stretches the context that RoPE was trained on; 1: not"] = 1.0
    yarn_original_length: Annotated[int | None, "YaRN: tokens of the context before it was stretched"] = None
    linear_key_heads: Annotated[int, "query/key heads of Gated DeltaNet"] = 2
    linear_value_heads: Annotated[int, "value heads of Gated DeltaNet, a multiple of linear_key_heads"] = 4
    linear_key_dim: Annotated[int, "dimensions of a Gated DeltaNet query/key head"] = 64
    linear_value_dim: Annotated[int, "dimensions of a Gated DeltaNet value head"] = 64
    conv_kernel: Annotated[int, "taps of the causal depthwise convolution in Gated DeltaNet"] = 4
    experts: Annotated[int, "routed experts in a mixture-of-experts layer"] = 16
    experts_per_token: Annotated[int, "routed experts that each token uses (top-k)"] = 4
    expert_size: Annotated[int, "hidden width of a routed expert"] = 64
    shared_expert_size: Annotated[int, "hidden width of the shared expert; 0: none"] = 64
    dense_size: Annotated[int, "hidden width of a dense layer"] = 256
    tied_embeddings: Annotated[bool, "the output head is the embedding: one matrix, read at both ends"] = False
    norm_eps: Annotated[float, "epsilon of every RMSNorm"] = 1e-6
    init_std: Annotated[float, "standard deviation of linear and embedding weights at the start"] = 0.02
    dtype: Annotated[str, "parameter and activation type: float32 or bfloat16"] = "float32"
    backend: Annotated[str, "what linear layers are made of: torch, or te (Transformer Engine, on GPUs)"] = "torch"
    fp8: Annotated[
        str, "te: what has a scale where projections round to 8 bits: off, block or current (a whole tensor)"
    ] = "off"

    @property
    def layers(self) -> str:
        """The whole trunk as one symbol a layer, without pipeline cuts."""
        return (self.pattern * self.repeats).replace("|", "")

    @property
    def mtp_layers(self) -> str:
        """The layers of the multi-token-prediction layer: attention, and what the trunk has beside its mixers."""
        return "*E" if "E" in self.layers else "*-"

    @property
    def stages(self) -> tuple[str, ...]:
        """The trunk cut at its ``|`` marks."""
        return tuple((self.pattern * self.repeats).strip("|").split("|"))

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return int(self.head_dim * self.rotary_fraction)


@dataclass(frozen=True)
class MtpConfig:
    """Multi-token prediction: one shared layer (gated attention + experts or dense) applied ``steps`` times.

    Whether the keys of a step are those that inference has: see `model.layers.mtp`.
    """

    steps: Annotated[int, "tokens predicted beyond the next one; 0 trains no MTP layer"] = 2
    keys: Annotated[
        str,
        "what a step attends to: inference (first step's keys, then the draft's own) or depth (its own)",
    ] = "inference"
    weight: Annotated[
        float | tuple[tuple[float, float], ...],
        "weight of the MTP loss; or [[tokens, weight], ...]: from so many tokens on, as in [[0, 0.3], [1e13, 0.1]]",
    ] = 0.3
    step_weights: Annotated[
        float | tuple[float, ...],
        "steps' shares of the MTP loss, made to sum to 1: a list, or the ratio of each share to the one before",
    ] = 1.0
    detach: Annotated[bool, "only the MTP layer learns from the MTP loss: not the trunk, embedding or head"] = False

    def weight_at(self, tokens: float) -> float:
        """Weight of the MTP loss once so many tokens are behind."""
        if isinstance(self.weight, float):
            return self.weight
        return [weight for begin, weight in self.weight if begin <= tokens][-1]

    def loss_weights(self, tokens: float) -> list[float]:
        """What each step's loss is multiplied by once so many tokens are behind; the sum is `weight_at`."""
        shares = self.step_weights
        if isinstance(shares, float):
            shares = tuple(shares**step for step in range(self.steps))
        return [self.weight_at(tokens) * share / sum(shares) for share in shares]


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the load of experts even."""

    weight: Annotated[float, "weight of the load-balancing loss; a balanced layer adds 1.0 x weight"] = 1e-3
    scope: Annotated[str, "tokens whose load is evened out: global (batch), micro (-batch) or sequence"] = "global"
    micro_weight: Annotated[float, "global: share of the weight that evens out each micro-batch besides"] = 0.01
    mode: Annotated[str, "global, several micro-batches: online (forecasts loads) or exact (a pass more)"] = "online"
    z_weight: Annotated[float, "weight of the router's z-loss, the mean of logsumexp(logits)^2 per layer"] = 0.0
    bias_rate: Annotated[float, "step of the bias that chooses experts with too little load; 0: no bias"] = 0.0
    capacity: Annotated[
        float | None,
        "in training an expert takes so many even shares of a micro-batch of all processes, the weakest are dropped; "
        "null: all are taken",
    ] = None
    forced: Annotated[bool, "benchmarks only: experts in turn, perfectly balanced, whatever the token"] = False


BALANCE_CHOICES = {"scope": ("global", "micro", "sequence"), "mode": ("online", "exact")}


def check_balance(balance: BalanceConfig) -> None:
    """Raises ModelError for the first setting that cannot be used."""
    for name, choices in BALANCE_CHOICES.items():
        value = getattr(balance, name)
        if value not in choices:
            known = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ModelError(f"balance.{name}={value!r} is not known: choose {known}")
    for name in ("weight", "micro_weight", "z_weight", "bias_rate"):
        value = getattr(balance, name)
        if not 0 <= value < float("inf"):
            raise ModelError(
                f"balance.{name}={value} would drive loads apart: choose a finite number of at least 0 (0: none)"
            )
    if balance.capacity is not None and not 1 <= balance.capacity < float("inf"):
        raise ModelError(
            f"balance.capacity={balance.capacity} would drop tokens of evenly used experts too: choose a number of at "
            f"least 1, or null to drop none"
        )
    if balance.mode == "exact" and balance.scope != "global":
        raise ModelError(
            f"balance.mode=exact counts the global batch ahead, and balance.scope={balance.scope} does not read it: "
            f"choose balance.scope=global or balance.mode=online"
        )
    if balance.mode == "exact" and not balance.weight:
        raise ModelError(
            f"balance.mode=exact counts the global batch ahead for the balance loss, which "
            f"balance.weight={balance.weight} leaves out: choose a weight above 0 or balance.mode=online"
        )
    if balance.forced and balance.bias_rate:
        raise ModelError(
            f"balance.forced=true chooses experts in turn: balance.bias_rate={balance.bias_rate} moves nothing, set 0"
        )


def check_model(model: ModelConfig, mtp: MtpConfig) -> None:
    """Raises ModelError for the first setting that cannot be built."""
    _check_numbers(model)
    unknown = sorted(set(model.pattern) - set(LAYER_SYMBOLS + "|"))
    if unknown or not model.layers:
        raise ModelError(
            f"model.pattern={model.pattern!r} has {'unknown symbols ' + ''.join(unknown) if unknown else 'no layers'}: "
            f"use G (Gated DeltaNet), * (gated attention), E (experts), - (dense) and | (pipeline cut), as in GEGEGE*E"
        )
    if "" in model.stages:
        raise ModelError(
            f"model.pattern={model.pattern!r} x {model.repeats} has a pipeline stage without layers: "
            f"put a layer between each two '|'"
        )
    for many, few in (
        ("attention_heads", "key_value_heads"),
        ("linear_value_heads", "linear_key_heads"),
    ):
        heads, groups = getattr(model, many), getattr(model, few)
        if heads % groups:
            raise ModelError(
                f"model.{many}={heads} is not a multiple of model.{few}={groups}: "
                f"each key head serves the same number of {many.replace('_', ' ')}"
            )
    if model.rotary_dim % 2 or not 0 <= model.rotary_dim <= model.head_dim:
        raise ModelError(
            f"model.rotary_fraction={model.rotary_fraction} of model.head_dim={model.head_dim} rotates "
            f"{model.rotary_dim} dimensions: RoPE turns pairs, so choose a fraction that gives an even number"
        )
    if not 1 <= model.yarn_factor < float("inf"):
        raise ModelError(f"model.yarn_factor={model.yarn_factor} must be at least 1 (1: RoPE as it is)")
    if model.yarn_factor > 1 and (model.yarn_original_length or 0) < 1:
        raise ModelError(
            f"model.yarn_original_length={model.yarn_original_length} must be the context, in tokens, that the model "
            f"was trained on before model.yarn_factor={model.yarn_factor} stretches it"
        )
    if not 2 <= model.experts_per_token <= model.experts:
        raise ModelError(
            f"model.experts_per_token={model.experts_per_token} must lie between 2 and model.experts={model.experts}: "
            f"the weights of a token's experts sum to one, so a single expert's would teach the router nothing"
        )
    if model.dtype not in ("float32", "bfloat16"):
        raise ModelError(f"model.dtype={model.dtype!r} is not known: choose float32 or bfloat16")
    # The tensor memory accelerator of Hopper reads rows that start at multiples of 16 bytes.
    for name in ("hidden_size", "expert_size") if model.dtype == "bfloat16" else ():
        if getattr(model, name) % ALIGNED:
            raise ModelError(
                f"model.{name}={getattr(model, name)} is not a multiple of {ALIGNED}, as the kernels of model.dtype="
                f"bfloat16 need it: choose {-(-getattr(model, name) // ALIGNED) * ALIGNED}"
            )
    check_mtp(mtp)


def _check_numbers(model: ModelConfig) -> None:
    for name in SIZES:
        value, most = getattr(model, name), MOST_REPEATS if name == "repeats" else MOST_INDEXED
        if value is not None and not 1 <= value <= most:
            raise ModelError(f"model.{name}={value} must be at least 1, and at most {most}")
    if not 0 <= model.shared_expert_size <= MOST_INDEXED:
        raise ModelError(f"model.shared_expert_size={model.shared_expert_size} must be at least 0 (no shared expert)")
    if not math.isfinite(model.rotary_fraction):
        raise ModelError(f"model.rotary_fraction={model.rotary_fraction} must lie from 0 to 1")
    for name in ("rope_base", "norm_eps", "init_std"):
        if not 0 < getattr(model, name) < math.inf:
            raise ModelError(f"model.{name}={getattr(model, name)} must be a number above 0")


def key_head_copies(key_heads: int, parts: int) -> int:
    """How often context parallelism repeats each key/value head, so that its processes can share them out."""
    return math.lcm(key_heads, parts) // key_heads


def passes_states(key_heads: int, parts: int) -> bool:
    """Whether the parts of a sequence hand on the states of Gated DeltaNet, because they cannot share out its heads.

    Handing on is plain torch: heads are worth their exchange wherever there are enough.
    """
    return key_heads % parts != 0


def check_kernels(model: ModelConfig, layout: Layout) -> None:
    """Raises ModelError for what a GPU's kernels cannot compute in this layout."""
    if model.dtype != "bfloat16" or "G" not in model.layers:
        return
    heads = model.linear_key_heads // layout.tensor
    if layout.context > 1 and passes_states(heads, layout.context):
        raise ModelError(
            f"parallel.context={layout.context} cannot share out model.linear_key_heads={model.linear_key_heads} / "
            f"parallel.tensor={layout.tensor} = {heads} heads of Gated DeltaNet, and handing on its states has no GPU "
            f"kernel: choose a parallel.context that divides {heads}"
        )
    if model.conv_kernel > MAX_TAPS:
        raise ModelError(
            f"model.conv_kernel={model.conv_kernel} is more than the GPU kernel takes: choose {MAX_TAPS} or fewer"
        )


def check_mtp(mtp: MtpConfig) -> None:
    """Raises ModelError for the first setting of multi-token prediction that cannot be used."""
    if mtp.steps < 0:
        raise ModelError(f"mtp.steps={mtp.steps} must not be negative")
    if mtp.keys not in (INFERENCE, DEPTH):
        raise ModelError(f"mtp.keys={mtp.keys!r} is not known: choose {INFERENCE} or {DEPTH}")
    phases = ((0.0, mtp.weight),) if isinstance(mtp.weight, float) else mtp.weight
    begins = [begin for begin, _ in phases]
    if not begins or begins[0] != 0 or begins != sorted(set(begins)) or not all(0 <= w < math.inf for _, w in phases):
        raise ModelError(
            f"mtp.weight={_listed(mtp.weight)} cannot be followed: a number of at least 0, or pairs [tokens, weight] "
            f"from 0 tokens on at rising numbers of tokens, as in [[0, 0.3], [10000000000000, 0.1]]"
        )
    shares = [mtp.step_weights] if isinstance(mtp.step_weights, float) else mtp.step_weights
    wrong_number = not isinstance(mtp.step_weights, float) and len(shares) != mtp.steps
    if wrong_number or not all(0 < share < math.inf for share in shares):
        raise ModelError(
            f"mtp.step_weights={_listed(mtp.step_weights)} cannot be used: a ratio above 0, or as many numbers above 0 "
            f"as there are steps (mtp.steps={mtp.steps})"
        )


def _listed(value: float | tuple) -> float | list:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
