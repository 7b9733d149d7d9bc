"""Where the time of a forward and backward pass goes: each kind of module, the head, and what is left."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.cost import cost
from model.cost.cost import TRAINING_FACTOR, forward_flops, layer_flops
from model.layers.attention import GatedAttention
from model.layers.deltanet import GatedDeltaNet
from model.layers.experts import Experts, SharedExpert
from model.layers.loss import Targets, linear_cross_entropy
from model.layers.norm import ZeroCentredRMSNorm
from model.layers.router import Router
from model.network import LanguageModel
from train.measure.timing import WARM_UP, Clock, Mark, run_steps
from train.settings.run import Config

# What a kind of module is called in the table, and the parts of `model.cost.cost` that it computes.
PARTS: dict[type, tuple[str, tuple[str, ...]]] = {
    GatedDeltaNet: ("Gated DeltaNet", ("deltanet_projections", "deltanet_convolution", "delta_rule")),
    GatedAttention: ("attention", ("attention_projections", "attention_gate", "attention_scores")),
    Router: ("router", ("router",)),
    Experts: ("routed experts", ("routed_experts",)),
    SharedExpert: ("shared expert", ("shared_expert", "shared_expert_gate")),
    ZeroCentredRMSNorm: ("norms", ()),
}


HEAD = "head and loss"


@dataclass(frozen=True)
class ModuleTime:
    """One kind of module in a step, all its layers together: time, and the time its operations need at least."""

    name: str
    milliseconds: float
    floor_milliseconds: float


class Stopwatch:
    """Times the modules of `PARTS`, forwards and backwards, through hooks; what lies inside one counts as its."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.clock = Clock(device)
        self.marks: dict[type, list[list[Mark]]] = defaultdict(list)
        self.hooks: list[RemovableHandle] = []
        inside: set[nn.Module] = set()
        for module in network.modules():
            kind = next((kind for kind in PARTS if isinstance(module, kind)), None)
            if kind is None or module in inside:
                continue
            inside.update(module.modules())
            self.hooks += [
                module.register_forward_pre_hook(partial(self._begin, kind)),
                module.register_forward_hook(partial(self._end, kind)),
                module.register_full_backward_pre_hook(partial(self._begin, kind)),
                module.register_full_backward_hook(partial(self._end, kind)),
            ]

    def _begin(self, kind: type, *_: object) -> None:
        self.marks[kind].append([self.clock.mark()])

    def _end(self, kind: type, *_: object) -> None:
        self.marks[kind][-1].append(self.clock.mark())

    def take(self) -> dict[type, float]:
        """Milliseconds since the start; removes the hooks."""
        for hook in self.hooks:
            hook.remove()
        return {kind: sum(self.clock.between(*pair) for pair in pairs) for kind, pairs in self.marks.items()}


def operations(config: Config, vocab_size: int, tokens: int) -> dict[str, float]:
    """Operations of a process's part of a step of so many tokens, by part of `model.cost.cost`; forwards and backwards.

    Those of multi-token prediction stand under the parts that its layers have.
    """
    model, mtp, length = config.model, config.mtp, config.data.seq_length
    here = TRAINING_FACTOR * tokens / (config.parallel.tensor * config.parallel.context)
    found = {cost.HEAD: here * forward_flops(model, mtp, vocab_size, length)[cost.HEAD]}
    for symbol, number in Counter(model.layers + model.mtp_layers * mtp.steps).items():
        for part, each in layer_flops(symbol, model, length).items():
            found[part] = found.get(part, 0.0) + here * number * each
    return found


def head_milliseconds(network: LanguageModel, tokens: int, device: torch.device) -> float:
    """The head and its losses alone, forwards and backwards, at this number of tokens."""
    weight = network.head_weight
    each = range(1 + network.config.mtp.steps)
    hidden = [torch.randn(tokens, weight.shape[1], device=device).to(weight.dtype).requires_grad_() for _ in each]
    target = torch.randint(0, weight.shape[0], (tokens,), device=device)
    share = torch.full((tokens,), 1 / tokens, device=device)

    def step(_: int) -> None:
        linear_cross_entropy(hidden, weight, [Targets(target, share) for _ in each], network.tp_group)[0].backward()

    return statistics.median(run_steps(step, [weight, *hidden], range(WARM_UP + 3), device))


def parts_of(
    network: LanguageModel, step: Callable[[Tensor], None], tokens_RS: Tensor, total: float, rate: float, config: Config
) -> list[ModuleTime]:
    """The table of one size: each kind of module, the head, and what is left of a step.

    Args:
        total: milliseconds of a step. rate: operations a second of a large matrix product.
    """
    device = next(network.parameters()).device
    watch = Stopwatch(network, device)
    step(tokens_RS)
    found = watch.take()
    for parameter in network.parameters():
        parameter.grad = None
    tokens = tokens_RS[:, 1:].numel()
    needed = operations(config, network.vocab_size, tokens)

    def floor(names: Iterable[str]) -> float:
        return 1e3 * sum(needed.get(name, 0.0) for name in names) / rate

    rows = [ModuleTime(name, found[kind], floor(names)) for kind, (name, names) in PARTS.items() if kind in found]
    rows.append(
        ModuleTime(HEAD, head_milliseconds(network, tokens // config.parallel.context, device), floor([cost.HEAD]))
    )
    rest = total - sum(row.milliseconds for row in rows)
    return [*rows, ModuleTime("rows to and from experts, residuals, embedding", rest, 0.0)]
