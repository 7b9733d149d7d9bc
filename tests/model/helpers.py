"""Small models with telling weights, documents from their starts, and the comparison of a fast path with its twin."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.batch import MicroBatch, count_targets
from model.config import BalanceConfig, ModelConfig
from model.layers.balance import Balance, RoutedTokens, load_fractions

# Twins compute the same sums in another order: at float64 they differ by some 1e-16 times the number of terms and
# the condition of the intermediate systems. A wrong mask, scale or index shows as 1e-3 or more.
FLOAT64_TOLERANCE = 1e-10

SMALL = ModelConfig(
    hidden_size=24,
    attention_heads=4,
    key_value_heads=2,
    head_dim=8,
    rotary_fraction=0.5,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=8,
    linear_value_dim=6,
    experts=6,
    experts_per_token=2,
    expert_size=10,
    shared_expert_size=6,
    dtype="float64",
)
# A single micro-batch is the global batch: the share that evens out micro-batches would only add to the weight.
BALANCE = BalanceConfig(weight=0.1, micro_weight=0.0)


def ids_from_starts(length: int, *starts: Sequence[int]) -> Tensor:
    """Document ids [rows, length], one row for each list of the places where a new document starts."""
    ids = torch.zeros(len(starts), length, dtype=torch.int64)
    for row, places in enumerate(starts):
        ids[row, list(places)] = 1
    return ids.cumsum(dim=1)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fills a module so that every parameter matters: gains off one, gates off a half, routing far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            drawn = 0.3 * noise
        elif name.endswith(("A_log", "dt_bias", "embedding.word_embeddings.weight")):
            drawn = noise
        else:
            drawn = noise * parameter.shape[-1] ** -0.5
        parameter.copy_(drawn)


def routed(weight_T: Tensor, total: int | None = None, rows: int = 1, use: int = 0) -> RoutedTokens:
    """Tokens for a router: sequences of equal length; ``total`` counts the valid ones of the global batch."""
    total = int((weight_T > 0).sum()) if total is None else total
    return RoutedTokens(weight_T, total, first=0, length=weight_T.numel() // rows, rows=rows, use=use)


def noted_balance_loss(balance: Balance) -> Tensor:
    """The balance loss of the forward passes since the last step, from what the router has counted and noted."""
    return balance.num_experts * (load_fractions(balance.seen()) * balance.mean_scores).sum()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters, to be given to its twin."""
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}


def assert_close(fast: Tensor, slow: Tensor, tolerance: float, what: str) -> None:
    """Largest difference within the tolerance, relative to the largest value where that exceeds one."""
    assert fast.shape == slow.shape, what
    scale = max(1.0, slow.abs().max().item()) if slow.numel() else 1.0
    difference = (fast - slow).abs().max().item() if slow.numel() else 0.0
    assert difference <= tolerance * scale, f"{what} differs by {difference:.3g} at a scale of {scale:.3g}"


def _with_gradients(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of each leaf for a fixed random weighting of the output."""
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), weighting)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"output": out.detach(), **named}


def _assert_all_close(fast: dict[str, Tensor], slow: dict[str, Tensor], tolerance: float) -> None:
    for what, expected in slow.items():
        assert expected.abs().max() > 1e-9, f"{what} is zero: it would agree with nothing computed"
        assert_close(fast[what], expected, tolerance, what)


def assert_twins(fast: Callable, slow: Callable, inputs: dict[str, Tensor], tolerance=FLOAT64_TOLERANCE) -> None:
    """Two functions give the same output and the same gradient of every input, none of them zero throughout."""
    results = []
    for function in (fast, slow):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        results.append(_with_gradients(function(*leaves.values()), leaves))
    _assert_all_close(*results, tolerance)


def assert_module_twin(
    module: nn.Module, fast: Callable, slow: Callable, hidden: Tensor, tolerance=FLOAT64_TOLERANCE
) -> None:
    """The same for a module: ``fast`` takes its input, ``slow`` the input and the parameters by name."""
    x = hidden.detach().clone().requires_grad_()
    results = [_with_gradients(fast(x), {"input": x, **dict(module.named_parameters())})]
    x, weights = hidden.detach().clone().requires_grad_(), weights_of(module)
    results.append(_with_gradients(slow(x, weights), {"input": x, **weights}))
    _assert_all_close(*results, tolerance)


def kept_bytes(network: nn.Module, rows: int, length: int, part: int = 0, parts: int = 1) -> int:
    """Bytes of all storages that the graph of a forward pass over packed documents keeps, parameters left out.

    Args:
        part, parts: which of equal parts of each sequence this process has.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, network.vocab_size, (rows, length + 1), generator=generator)
    documents = torch.zeros_like(tokens)
    documents[:, length // 2 :] = 1
    counts = count_targets(documents, network.config.mtp.steps)
    batch = MicroBatch.build(tokens, documents, counts, (part, parts))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held here too, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = network(batch)
        assert losses.total.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
