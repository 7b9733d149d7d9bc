"""Routed experts from the router's logits to the combined rows, forwards and backwards, beside sonic-moe on QuACK.

    python -m tests.bench.experts [--tokens 8192 32768] [--tiles] [--tuned] [--rounds 7] [--output experts.json]

512 experts, top-10, hidden 2048, width 512, bfloat16, gradients from nothing; logits of random tokens and a drawn
router, as natural routing is at initialisation. Contestants take turns, so that a ratio is of the same minutes.
sonic-moe 0.1.2 (Apache-2.0) stands on quack-kernels, whose products have gathers and activations in them; once with its
own router and once with ours. It takes QuACK's default tiles, with ``--tuned`` those that QuACK's own tuner finds,
which compiles for minutes. QuACK wants to lie in a directory named site-packages: elsewhere it refuses its functions.
``--tiles`` also times our products in other tiles than `model.kernels.grouped` chooses.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from data.secrets import one_line
from model.kernels import grouped
from model.kernels.grouped import GRADIENT_TILE, TILE, GradientTile, Tile
from model.layers.experts import fused_moe
from model.layers.router import route
from model.layers.rows import count_sorted, invert, reorder
from train.measure.timing import Clock

EXPERTS, K, HIDDEN, WIDTH = 512, 10, 2048, 512
FLOPS = 18 * HIDDEN * WIDTH  # of a row: three matrices, two operations a number, forwards and twice that backwards
STEPS = 4  # of a contestant's turn
FEW = 256  # tokens, for which the same kernels are compiled
PATIENCE_S = 120.0
TILES = {
    "products in 192 x 128": (Tile(128, 64, 128, 64, 8, 4), GRADIENT_TILE),
    "products in 64 x 256": (Tile(64, 0, 256, 64, 4, 4), GRADIENT_TILE),
    "gradients in 256 x 128": (TILE, GradientTile(256, 128, 32, 8, 3)),
    "gradients in 128 x 256": (TILE, GradientTile(128, 256, 32, 8, 3)),
    "gradients in 128 x 128 by 64": (TILE, GradientTile(128, 128, 64, 4, 3)),
}

OWN = (grouped.product_tile, grouped.gradient_tile)

type Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # tokens, logits and both weights to tokens


def ours(x_TH: Tensor, logits_TE: Tensor, weight1_E2FH: Tensor, weight2_EHF: Tensor, k: int = K) -> Tensor:
    """What `model.layers.experts.MixtureOfExperts` does between its router's logits and the shared expert."""
    _, weights_TK, experts_TK = route(logits_TE, k)
    ordered, order = experts_TK.flatten().int().sort(stable=True)
    inverse = invert(order)
    counts, probs = count_sorted(ordered, weight1_E2FH.shape[0]), reorder(weights_TK.flatten(), order, inverse)
    return fused_moe(x_TH, weight1_E2FH, weight2_EHF, probs, counts, order // k, inverse.view(experts_TK.shape))


def in_tiles(tiles: tuple[Tile, GradientTile] | None, *arguments: Tensor) -> Tensor:
    """The same in other tiles (None: our own); for the backward pass they stay until another contestant's turn."""
    own = tiles is None
    grouped.product_tile = OWN[0] if own else lambda rows, experts: tiles[0]
    grouped.gradient_tile = OWN[1] if own else lambda rows, experts: tiles[1]
    return ours(*arguments)


def sonic_layer(tuned: bool, own_router: bool) -> Layer:
    """sonic-moe's layer from logits on, as `sonicmoe.functional.moe_TC_softmax_topk_layer` puts it together.

    Args:
        own_router: its top-k; else ours.
    """
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    for module in (functional.forward, functional.backward):
        for name in {"gemm", "gemm_gated", "gemm_dgated"} & {*vars(module)}:
            plain = vars(module)[name]
            setattr(module, name, partial(getattr(plain, "func", plain), tuned=tuned))

    def layer(x_TH: Tensor, logits_TE: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
        tokens, rows, swiglu = x_TH.shape[0], x_TH.shape[0] * K, ActivationType("swiglu")
        if own_router:
            scores, experts = functional.TC_Softmax_Topk_Router_Function.apply(logits_TE, EXPERTS, K, True, False)
        else:
            _, scores, experts = route(logits_TE, K)
            experts = experts.int()
        sizes = (EXPERTS, EXPERTS + 1, rows, rows, rows)  # counts, borders, gather, scatter and its inverse
        indices = [torch.empty(size, dtype=torch.int32, device=x_TH.device) for size in sizes]
        functional.TC_topk_router_metadata_triton(experts, EXPERTS, *indices)
        _, borders, gather, scatter, back = indices
        # [2F, H, E] and [H, F, E] views of the weights as they lie.
        w1, w2 = weight1.flatten(1, 2).permute(1, 2, 0), weight2.permute(1, 2, 0)
        tables = (gather, scatter, back, None, False, swiglu)
        active, h = functional._UpProjection.apply(x_TH, w1, None, borders, rows, K, *tables, False, True)
        return functional._DownProjection.apply(active, h, w2, None, scores, borders, tokens, K, *tables)

    return layer


class Contest:
    """Contestants that take turns on the same tokens."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens, self.clock = tokens, Clock(device)
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int, std: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

        x, router = draw(tokens, HIDDEN, std=1.0), draw(EXPERTS, HIDDEN, std=0.02)
        logits = (x @ router.T).float()
        weights = (draw(EXPERTS, 2, WIDTH, HIDDEN, std=0.02), draw(EXPERTS, HIDDEN, WIDTH, std=0.02))
        self.leaves = [leaf.requires_grad_() for leaf in (x, logits, *weights)]
        self.grad = draw(tokens, HIDDEN, std=1.0)
        self.times: dict[str, list[float]] = {}

    def results(self, layer: Layer) -> list[Tensor]:
        """The output and the gradients of all leaves."""
        out = layer(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)]

    def turn(self, name: str, layer: Layer) -> None:
        """Some steps back to back; the median counts."""
        self.results(layer)
        marks = [self.clock.mark()]
        for _ in range(STEPS):
            self.results(layer)
            marks.append(self.clock.mark())
        each = [self.clock.between(first, last) for first, last in pairwise(marks)]
        self.times.setdefault(name, []).append(statistics.median(each))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance of two contestants' outputs and gradients."""
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in zip(found, expected, strict=True))


def measured(tokens: int, contestants: dict[str, Layer], rounds: int, device: torch.device) -> dict[str, dict]:
    """Times all that run here in turns, and says how far each is from ours, the first, or why it failed."""
    contest, rows = Contest(tokens, device), {}
    (own, layer), *_ = contestants.items()
    expected = contest.results(layer)  # ours: where it fails, there is nothing to compare
    for name, layer in contestants.items():
        try:
            # The sums of thousands of products of bfloat16 in two orders: a per cent.
            rows[name] = {"error": error(contest.results(layer), expected)}
        except Exception as failure:  # too little memory, tiles that do not fit, a peer of other versions: a result too
            rows[name] = {"failed": one_line(failure)}
    able = {name: layer for name, layer in contestants.items() if "failed" not in rows[name]}
    for _ in range(rounds):
        for name, layer in able.items():
            contest.turn(name, layer)
    base = contest.times[own]
    for name, times in contest.times.items():
        ratios = sorted(other / mine for mine, other in zip(base, times, strict=True))  # of speeds
        milliseconds = statistics.median(times)
        rows[name] |= {
            "milliseconds": milliseconds,
            "tflops": tokens * K * FLOPS / milliseconds / 1e9,
            "ours_over_it": statistics.median(ratios),
            "least_and_most": [ratios[0], ratios[-1]],
        }
    return rows


def compile_tiles(name: str) -> None:
    """Compiles our kernels in the tiles of that name, into the cache that other processes read."""
    contest = Contest(FEW, torch.device("cuda"))
    contest.results(partial(in_tiles, TILES[name]))
    torch.cuda.synchronize()


def table(tokens: int, rows: dict[str, dict]) -> str:
    """What `measured` found, as lines."""
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens} tokens:"]
    lines += ["| | ms | TFLOP/s | ours over it (least, most) | error |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} | | | |")
            continue
        least, most = row["least_and_most"]
        numbers = f"{row['milliseconds']:.2f} | {row['tflops']:.0f} | {row['ours_over_it']:.3f}"
        lines.append(f"| {name} | {numbers} ({least:.3f}, {most:.3f}) | {row['error']:.1e} |")
    return "\n".join(lines)


def main() -> None:
    """Prints a table for each number of tokens: beside sonic-moe, then in other tiles, which compile meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiles", action="store_true", help="also our products in other tiles")
    parser.add_argument("--tuned", action="store_true", help="QuACK's own tuner")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here: the kernels run on one only")
    device, everything = torch.device("cuda"), {}
    with multiprocessing.get_context("spawn").Pool(len(TILES) if asked.tiles else 1) as pool:
        compiled = pool.map_async(compile_tiles, TILES) if asked.tiles else None
        peers: dict[str, Layer] = {}
        try:
            peers["sonic-moe, our router"] = sonic_layer(asked.tuned, own_router=False)
            peers["sonic-moe"] = sonic_layer(asked.tuned, own_router=True)
        except ImportError as failure:
            print(f"sonic-moe is left out: {failure}", flush=True)
        groups = {"beside others": peers}
        if asked.tiles:
            groups["tiles"] = {f"tessera, {name}": partial(in_tiles, tiles) for name, tiles in TILES.items()}
        for group, contestants in groups.items():
            if group == "tiles" and compiled is not None:
                compiled.wait(PATIENCE_S)
            for tokens in asked.tokens:
                together = {"tessera": partial(in_tiles, None), **contestants}
                rows = everything[f"{group}, {tokens}"] = measured(tokens, together, asked.rounds, device)
                print(f"\n{table(tokens, rows)}", flush=True)
                if asked.output:
                    asked.output.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
