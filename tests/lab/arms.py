"""What the lab compares: arms, each one change of the recipe ``lab/hybrid``, and the comparisons that read them."""

from dataclasses import dataclass

from train.watch import metrics

RECIPE = "lab/hybrid"
SEEDS = (1, 2, 3)
STEPS = 1200  # of each run, unless a lease is shorter
BASE = "base"
# What everything is on a machine without a GPU, and how little it trains there, to see that all arms run.
MINIATURE = (
    *("model.dtype=float32", "model.hidden_size=64", "model.attention_heads=2", "model.key_value_heads=1"),
    *("model.head_dim=32", "model.linear_key_heads=1", "model.linear_value_heads=2", "model.linear_key_dim=16"),
    *("model.linear_value_dim=16", "model.experts=16", "model.expert_size=16", "model.shared_expert_size=16"),
    *("data.seq_length=128", "run.eval_samples=8", "run.detail_every=1", "run.log_every=1", "optim.warmup_steps=1"),
)


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        overrides: settings that differ from the recipe's. seams: what no setting changes (`tests.lab.seams`).
        cost: of a step, in steps of the base, for planning.
    """

    overrides: tuple[str, ...] = ()
    seams: tuple[str, ...] = ()
    cost: float = 1.0


# As many parameters as Gated DeltaNet's layers have, gates included.
ATTENTION = ("model.pattern=*E*E*E*E", "model.attention_heads=8", "model.key_value_heads=4")
PURE = ("batch.micro=2",)  # rows of a step lie in the order of their sources: micro-batches of one or two kinds
ARMS = {
    BASE: Arm(),
    "gate off": Arm(("model.attention_gate=false",)),
    "attention": Arm(ATTENTION),
    "attention, gate off": Arm((*ATTENTION, "model.attention_gate=false")),
    "norms undecayed": Arm(seams=("undecayed_norms",)),
    "norms plain": Arm(seams=("plain_norms",)),
    "router as drawn": Arm(seams=("router_as_drawn",)),
    "1 step": Arm(("mtp.steps=1",), cost=1.4),
    "3 steps": Arm(("mtp.steps=3",), cost=2.0),
    "3 steps, keys by depth": Arm(("mtp.steps=3", "mtp.keys=depth"), cost=2.0),
    "deltanet": Arm(("model.pattern=GEGEGEGE",)),
    "router bfloat16": Arm(seams=("router_bfloat16",)),
    "64 experts": Arm(("model.experts=64",)),
    "256 experts": Arm(("model.experts=256",), cost=1.2),
    "512 experts": Arm(("model.experts=512",), cost=1.5),
    "global, pure": Arm(PURE, cost=3.0),
    "micro, pure": Arm((*PURE, "balance.scope=micro"), cost=3.0),
    "bias, pure": Arm((*PURE, "balance.weight=0", "balance.bias_rate=0.001"), cost=3.0),
}
# The arms in the order in which a lease trains them, each group for all seeds before the next.
ORDER = (tuple(ARMS)[:10], tuple(ARMS)[10:12], tuple(ARMS)[12:15], tuple(ARMS)[15:])

EARLY_STEPS = 200
EARLY = " early"  # means over the logged steps up to EARLY_STEPS
GAIN_SPREAD = "largest gain - 1"  # of all norms, in size
GAIN_LEAST = "least gain"
SHARPEST = "largest attention sink"  # of the layers
INFORMATION = "mutual information"
FAILED_PROBE = "failed probe"


@dataclass(frozen=True)
class Comparison:
    """A question and what answers it.

    Attributes:
        pairs: arms beside what each is compared with. measures: what is read of each run, by name.
        curve: the metric that the plot shows over the steps.
    """

    title: str
    question: str
    pairs: tuple[tuple[str, str], ...]
    measures: tuple[str, ...]
    curve: str

    @property
    def arms(self) -> list[str]:
        """All arms, each once, compared ones behind what they are compared with."""
        return list(dict.fromkeys(arm for base, other in self.pairs for arm in (base, other)))


def _against_base(*arms: str) -> tuple[tuple[str, str], ...]:
    return tuple((BASE, arm) for arm in arms)


LOSS = metrics.HELDOUT_LM_LOSS
ACCEPTANCE = tuple(metrics.heldout_acceptance(step) for step in (1, 2, 3))
COMPARISONS = {
    "a": Comparison(
        "Output gate of attention",
        "Does the gate prevent attention sinks and massive activations?",
        ((BASE, "gate off"), ("attention", "attention, gate off")),
        (LOSS, metrics.ATTENTION_SINK, SHARPEST, metrics.ACTIVATION_PEAK, metrics.MASSIVE_ACTIVATIONS),
        metrics.ATTENTION_SINK,
    ),
    "b": Comparison(
        "Norms: zero-centred and decayed",
        "Does weight decay on zero-centred norm weights keep gains near 1, and what does either cost? Plain weights "
        "without decay take the same steps as undecayed ones, so they are no arm.",
        _against_base("norms undecayed", "norms plain"),
        (LOSS, GAIN_SPREAD, GAIN_LEAST, metrics.ACTIVATION_PEAK),
        GAIN_SPREAD,
    ),
    "c": Comparison(
        "Router rows of equal norm",
        f"Are experts loaded more evenly in the first {EARLY_STEPS} steps?",
        _against_base("router as drawn"),
        tuple(name + EARLY for name in (metrics.MAX_VIOLATION, metrics.LOAD_VARIATION, metrics.LOAD_MIN)) + (LOSS,),
        metrics.MAX_VIOLATION,
    ),
    "d": Comparison(
        "Scope of balance, micro-batches of one or two kinds of text",
        "Does balance over the global batch let experts specialise, and lower the loss?",
        (("global, pure", "micro, pure"), ("global, pure", "bias, pure")),
        (LOSS, INFORMATION, metrics.MAX_VIOLATION),
        metrics.MAX_VIOLATION,
    ),
    "e": Comparison(
        "Number of experts at equal active parameters",
        "Do more experts lower the loss?",
        _against_base("64 experts", "256 experts", "512 experts"),
        (LOSS, metrics.MAX_VIOLATION, INFORMATION),
        metrics.LM_LOSS,
    ),
    "f": Comparison(
        "Gated DeltaNet and attention 3:1, or one alone",
        "Does the mixture lose less than either alone, recall included?",
        _against_base("attention", "deltanet"),
        (LOSS, f"{metrics.NEEDLE_LOSS}/at_0", f"{metrics.NEEDLE_LOSS}/at_75", f"{LOSS}/after_511"),
        metrics.LM_LOSS,
    ),
    "g": Comparison(
        "Multi-token prediction",
        "Does it cost or help the trunk, and which training makes the best drafts?",
        (*_against_base("1 step", "3 steps", "3 steps, keys by depth"), ("3 steps", "3 steps, keys by depth")),
        (LOSS, *ACCEPTANCE, metrics.HELDOUT_ACCEPTED_LENGTH),
        metrics.LM_LOSS,
    ),
    "h": Comparison(
        "Router in bfloat16",
        "Do scores and counts in bfloat16 hurt?",
        _against_base("router bfloat16"),
        (LOSS, metrics.MAX_VIOLATION, INFORMATION),
        metrics.LM_LOSS,
    ),
}


def run_name(arm: str, seed: int) -> str:
    """The directory and file name of a run."""
    return f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"
