"""Model settings: what is derived from them, and the one line for each that cannot be built."""

from dataclasses import replace

import pytest

from model.config import (
    SIZES,
    BalanceConfig,
    ModelConfig,
    ModelError,
    MtpConfig,
    OneProcess,
    check_balance,
    check_kernels,
    check_model,
)


def test_defaults_can_be_built() -> None:
    check_model(ModelConfig(), MtpConfig())
    check_model(ModelConfig(pattern="*-*E", shared_expert_size=0, attention_gate=False), MtpConfig())
    check_model(ModelConfig(vocab_size=64, dtype="bfloat16", rotary_fraction=0.0), MtpConfig(steps=0, weight=0.0))


def test_layers_and_stages() -> None:
    shape = ModelConfig(pattern="GE|*E|", repeats=2)
    assert shape.layers == "GE*EGE*E"
    assert shape.stages == ("GE", "*E", "GE", "*E")
    assert ModelConfig(pattern="GE", repeats=3).stages == ("GEGEGE",)
    assert ModelConfig(pattern="|GE").stages == ("GE",)


def test_rotary_dim() -> None:
    assert ModelConfig(head_dim=256, rotary_fraction=0.25).rotary_dim == 64


MISTAKES = {
    "unknown symbol": ({"pattern": "GEM*EX"}, "model.pattern='GEM*EX' has unknown symbols MX: use G (Gated DeltaNet)"),
    "empty pattern": ({"pattern": ""}, "model.pattern='' has no layers: use G (Gated DeltaNet)"),
    "cuts only": ({"pattern": "||"}, "model.pattern='||' has no layers: use G"),
    "empty stage": (
        {"pattern": "GE||*E"},
        "model.pattern='GE||*E' x 1 has a pipeline stage without layers: put a layer",
    ),
    "empty stage between repeats": (
        {"pattern": "|GE|", "repeats": 2},
        "model.pattern='|GE|' x 2 has a pipeline stage without layers: put a layer",
    ),
    "query heads": (
        {"attention_heads": 6, "key_value_heads": 4},
        "model.attention_heads=6 is not a multiple of model.key_value_heads=4: each key head serves the same number of "
        "attention heads",
    ),
    "value heads": (
        {"linear_value_heads": 3, "linear_key_heads": 2},
        "model.linear_value_heads=3 is not a multiple of model.linear_key_heads=2: each key head serves the same "
        "number of linear value heads",
    ),
    "odd rotary dimension": (
        {"head_dim": 12, "rotary_fraction": 0.25},
        "model.rotary_fraction=0.25 of model.head_dim=12 rotates 3 dimensions: RoPE turns pairs, so choose a fraction",
    ),
    "rotates too much": (
        {"head_dim": 8, "rotary_fraction": 1.5},
        "model.rotary_fraction=1.5 of model.head_dim=8 rotates",
    ),
    "YaRN that shrinks": ({"yarn_factor": 0.5}, "model.yarn_factor=0.5 must be at least 1"),
    "YaRN from nothing": ({"yarn_factor": 4.0}, "model.yarn_original_length=None must be the context, in tokens"),
    "rotates less than nothing": ({"head_dim": 8, "rotary_fraction": -0.5}, "rotates -4 dimensions"),
    "too many experts a token": (
        {"experts": 4, "experts_per_token": 5},
        "model.experts_per_token=5 must lie between 2 and model.experts=4",
    ),
    "one expert a token": (
        {"experts_per_token": 1},
        "model.experts_per_token=1 must lie between 2 and model.experts=16: the weights of a token's experts",
    ),
    "a row of experts": (
        {"dtype": "bfloat16", "expert_size": 100},
        "model.expert_size=100 is not a multiple of 8, as the kernels of model.dtype=bfloat16 need it: choose 104",
    ),
    "type": ({"dtype": "float16"}, "model.dtype='float16' is not known: choose float32 or bfloat16"),
    **{f"{name} of none": ({name: 0}, f"model.{name}=0 must be at least 1") for name in SIZES},
    "negative shared expert": (
        {"shared_expert_size": -1},
        "model.shared_expert_size=-1 must be at least 0 (no shared expert)",
    ),
    "more layers than memory": ({"repeats": 10**30}, "and at most 10000"),
    "rotates an unknown share": ({"rotary_fraction": float("nan")}, "model.rotary_fraction=nan must lie from 0 to 1"),
    **{
        f"{name} of {value}": ({name: value}, f"model.{name}={value} must be a number above 0")
        for name in ("rope_base", "norm_eps", "init_std")
        for value in (0.0, -1.0, float("nan"), float("inf"))
    },
    "negative repeats": ({"repeats": -1}, "model.repeats=-1 must be at least 1"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_refused_with_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ModelError) as refusal:
        check_model(replace(ModelConfig(), **changes), MtpConfig())
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight": float("nan")}, "mtp.weight=nan cannot be followed"),
        ({"weight": ((0.0, 0.3), (9.0, float("inf")))}, "mtp.weight=[[0.0, 0.3], [9.0, inf]] cannot be followed"),
        ({"step_weights": float("inf")}, "mtp.step_weights=inf cannot be used"),
        ({"steps": -1}, "mtp.steps=-1 must not be negative"),
        ({"keys": "own"}, "mtp.keys='own' is not known: choose inference or depth"),
        ({"weight": -0.1}, "mtp.weight=-0.1 cannot be followed"),
        ({"weight": ()}, "mtp.weight=[] cannot be followed"),
        ({"weight": ((5.0, 0.1),)}, "mtp.weight=[[5.0, 0.1]] cannot be followed"),
        ({"weight": ((0.0, 0.3), (9.0, 0.1), (9.0, 0.2))}, "from 0 tokens on at rising numbers of tokens"),
        ({"weight": ((0.0, 0.3), (9.0, -0.1))}, "cannot be followed"),
        ({"step_weights": 0.0}, "mtp.step_weights=0.0 cannot be used: a ratio above 0"),
        ({"step_weights": (1.0, -1.0)}, "mtp.step_weights=[1.0, -1.0] cannot be used"),
        ({"step_weights": (1.0,)}, "as many numbers above 0 as there are steps (mtp.steps=2)"),
    ],
)
def test_mistaken_prediction_settings_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        check_model(ModelConfig(), replace(MtpConfig(), **changes))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scope": "batch"}, "balance.scope='batch' is not known: choose global, micro or sequence"),
        ({"mode": "fast"}, "balance.mode='fast' is not known: choose online or exact"),
        *(
            ({name: value}, f"balance.{name}={value} would drive loads apart: choose a finite number of at")
            for name in ("weight", "micro_weight", "z_weight", "bias_rate")
            for value in (-0.1, float("inf"), float("nan"))
        ),
        (
            {"mode": "exact", "scope": "micro"},
            "balance.mode=exact counts the global batch ahead, and balance.scope=micro does not read it: choose "
            "balance.scope=global or balance.mode=online",
        ),
        (
            {"mode": "exact", "weight": 0.0},
            "balance.mode=exact counts the global batch ahead for the balance loss, which balance.weight=0.0 leaves "
            "out: choose a weight above 0 or balance.mode=online",
        ),
        (
            {"forced": True, "bias_rate": 0.001},
            "balance.forced=true chooses experts in turn: balance.bias_rate=0.001 moves nothing, set 0",
        ),
        (
            {"capacity": 0.9},
            "balance.capacity=0.9 would drop tokens of evenly used experts too: choose a number of at least 1, or null",
        ),
    ],
)
def test_mistaken_balance_settings_are_refused(changes: dict, says: str) -> None:
    check_balance(BalanceConfig())
    with pytest.raises(ModelError) as refusal:
        check_balance(replace(BalanceConfig(), **changes))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_prediction_weights_follow_their_schedule() -> None:
    mtp = MtpConfig(steps=2, weight=((0.0, 0.3), (1e13, 0.1)), step_weights=(3.0, 1.0))
    check_model(ModelConfig(), mtp)
    assert [mtp.weight_at(tokens) for tokens in (0, 1e13 - 1, 1e13, 1e15)] == [0.3, 0.3, 0.1, 0.1]
    assert mtp.loss_weights(0) == pytest.approx([0.225, 0.075])
    assert MtpConfig(steps=0).loss_weights(0) == []
    assert MtpConfig(steps=3, weight=0.7, step_weights=0.5).loss_weights(0) == pytest.approx([0.4, 0.2, 0.1])


def test_what_has_no_kernel_on_a_gpu_is_refused() -> None:
    model = ModelConfig(dtype="bfloat16", linear_key_heads=4, linear_value_heads=4)
    check_kernels(model, OneProcess(context=4))
    check_kernels(replace(model, dtype="float32"), OneProcess(context=8))
    check_kernels(replace(model, pattern="*E"), OneProcess(context=8))
    with pytest.raises(ModelError, match=r"parallel.context=4 cannot share out .* = 2 heads .* that divides 2"):
        check_kernels(model, OneProcess(context=4, tensor=2))
    with pytest.raises(ModelError, match=r"model.conv_kernel=5 is more than the GPU kernel takes: choose 4"):
        check_kernels(replace(model, conv_kernel=5), OneProcess())
