"""Triton kernels of products with many matrices: rows sorted by expert, each times its own expert's matrix.

Hundreds of experts leave each a few hundred rows or fewer: time goes into the edges of tiles, into reading every weight
and into writing every gradient. So gradients are computed in tiles small enough for several to share a multiprocessor,
one writing while others multiply; and a product reads rows that several experts want from where they lie (``source``).

    product:   y_n = x_source(n) W_e(n)^T,  or  x_source(n) W_e(n)
    gradient:  dW_e = sum over the rows n of e of  left_n right_n^T

Shape suffixes: N rows sorted by expert, E experts, I columns in, O columns out.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """A tile of a product: rows, some more (a second product with the same columns), columns, inner columns."""

    rows: int
    more: int
    columns: int
    inner: int
    warps: int
    stages: int

    @property
    def height(self) -> int:
        """All its rows."""
        return self.rows + self.more


class GradientTile(NamedTuple):
    """A tile of a gradient: rows and columns of the matrix, rows of an expert at once."""

    height: int
    width: int
    inner: int
    warps: int
    stages: int


# The fastest on an H200 at 160 to 640 rows an expert.
TILE, GRADIENT_TILE = Tile(128, 0, 256, 64, 8, 4), GradientTile(128, 128, 32, 4, 3)


def product_tile(rows: int, experts: int) -> Tile:
    """The tile of the products of so many rows with so many experts' matrices."""
    return TILE


def gradient_tile(rows: int, experts: int) -> GradientTile:
    """The tile of the gradients of those matrices."""
    return GRADIENT_TILE


@triton.jit
def _tile_rows(ends, tiles, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    own = tl.program_id(0)
    expert = tl.arange(0, COLUMNS)
    first = tl.load(ends + expert - 1, (expert > 0) & (expert < EXPERTS), 0)
    last = tl.load(ends + expert, expert < EXPERTS, 0)
    needed = tl.where(expert < EXPERTS, (last - first + ROWS - 1) // ROWS, 0)
    before = tl.sum(tl.where(expert < own, needed, 0), 0)
    start, end = tl.load(ends + own - 1, own > 0, 0), tl.load(ends + own)
    for tile in range(0, (end - start + ROWS - 1) // ROWS):
        place = tiles + 3 * (before + tile)
        tl.store(place, own)
        tl.store(place + 1, start + tile * ROWS)
        tl.store(place + 2, end)


def tile_rows(ends_E: Tensor, rows: int) -> Tensor:
    """int32 [tiles, 3]: the expert of each tile of rows, its first row, and the end of its expert's; -1 past the last.

    Tiles are as high as those of `product_tile`.

    Args:
        ends_E: int32, the end of each expert's rows; the last is ``rows``.
    """
    experts = ends_E.numel()
    height = product_tile(rows, experts).height
    tiles = torch.full((rows // height + experts, 3), -1, dtype=torch.int32, device=ends_E.device)
    _tile_rows[(experts,)](ends_E, tiles, experts, triton.next_power_of_2(experts), height)
    return tiles


@triton.jit
def _places(source, first, last, IN: tl.constexpr, GATHERED: tl.constexpr, ROWS: tl.constexpr):
    """Where the rows of a tile lie that are gathered."""
    places = first
    if GATHERED:
        row = first + tl.arange(0, ROWS)
        places = tl.load(source + row, row < last, 0).to(tl.int64)[:, None] * IN
    return places


@triton.jit
def _left(x, places, first, last, inner, IN: tl.constexpr, GATHERED: tl.constexpr, ROWS: tl.constexpr,
          INNER: tl.constexpr):  # fmt: skip
    """Some columns of the rows of a tile."""
    if GATHERED:
        row, column = first + tl.arange(0, ROWS), inner + tl.arange(0, INNER)[None, :]
        part = tl.load(x + places + column, (row < last)[:, None] & (column < IN), 0.0)
    else:
        part = x.load([first, inner])
    return part


@triton.jit
def _store(out, total, first, last, column, OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    place = column + tl.arange(0, COLUMNS)[None, :]
    out += row.to(tl.int64)[:, None] * OUT + place
    tl.store(out, total.to(out.dtype.element_ty), (row < last)[:, None] & (place < OUT))


@triton.jit
def _product(x, x_more, source, weight, out, tiles, IN: tl.constexpr, OUT: tl.constexpr, TURNED: tl.constexpr,
             GATHERED: tl.constexpr, ROWS: tl.constexpr, MORE: tl.constexpr, COLUMNS: tl.constexpr,
             INNER: tl.constexpr):  # fmt: skip
    PARTS: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    tile, column = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * COLUMNS
    expert = tl.load(tiles + 3 * tile)
    if expert < 0:
        return
    first, last = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    places = _places(source, first, last, IN, GATHERED, ROWS)
    places_more = _places(source, first + ROWS, last, IN, GATHERED, MORE if MORE else 16)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Triton's tiles are powers of two: three quarters of the next one are two products with the same columns.
    rest = tl.zeros([MORE if MORE else 16, COLUMNS], tl.float32)
    for inner in range(0, IN, INNER):
        # Rows of the next expert, where a tile is not full, give results that are not stored. Columns past the end are
        # zero on the left, so that the next matrix, which stands there on the right, adds nothing.
        if TURNED:
            right = weight.load([expert * OUT + column, inner]).T
        else:
            right = weight.load([expert * IN + inner, column])
        total = tl.dot(_left(x, places, first, last, inner, IN, GATHERED, ROWS, INNER), right, total)
        if MORE:
            left = _left(x_more, places_more, first + ROWS, last, inner, IN, GATHERED, MORE, INNER)
            rest = tl.dot(left, right, rest)
    _store(out, total, first, last, column, OUT, ROWS, COLUMNS)
    if MORE:
        _store(out, rest, first + ROWS, last, column, OUT, MORE, COLUMNS)


def grouped_product(
    x: Tensor, weight: Tensor, tiles: Tensor, rows: int, turned: bool, source_N: Tensor | None = None
) -> Tensor:
    """Each row times its expert's matrix: [N, O].

    Args:
        x: [N, I], or [T, I] with the row of each n in ``source_N``. tiles: of `tile_rows`.
        weight: [E, O, I] if ``turned`` (it is applied transposed, as a linear layer's), else [E, I, O].
    """
    inner, columns = (weight.shape[2], weight.shape[1]) if turned else (weight.shape[1], weight.shape[2])
    out_NO = x.new_empty(rows, columns)
    if not rows:
        return out_NO
    tile = product_tile(rows, weight.shape[0])
    lefts = [x, x]
    if source_N is None:
        lefts = [TensorDescriptor.from_tensor(x, [size or tile.rows, tile.inner]) for size in (tile.rows, tile.more)]
    block = [tile.columns, tile.inner] if turned else [tile.inner, tile.columns]
    right = TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), block)
    _product[(tiles.shape[0] * triton.cdiv(columns, tile.columns),)](
        *lefts, source_N, right, out_NO, tiles, inner, columns, turned, source_N is not None, tile.rows, tile.more,
        tile.columns, tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_NO


@triton.jit
def _gradient(left, right, ends, out, OUT: tl.constexpr, IN: tl.constexpr, ADD: tl.constexpr, HEIGHT: tl.constexpr,
              WIDTH: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    ACROSS: tl.constexpr = (IN + WIDTH - 1) // WIDTH
    DOWN: tl.constexpr = (OUT + HEIGHT - 1) // HEIGHT
    tile = tl.program_id(0)
    expert = tile // (DOWN * ACROSS)
    top, side = tile // ACROSS % DOWN * HEIGHT, tile % ACROSS * WIDTH
    o = top + tl.arange(0, HEIGHT)[None, :]
    first, last = tl.load(ends + expert - 1, expert > 0, 0), tl.load(ends + expert)
    if ADD and first == last:
        return
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for start in range(first, last, INNER):
        row = start + tl.arange(0, INNER)[:, None]
        # Rows of the next expert are zero on the left, so that they add nothing.
        inside = row < last if OUT % HEIGHT == 0 else (row < last) & (o < OUT)
        a = tl.load(left + row.to(tl.int64) * OUT + o, inside, 0.0)
        total = tl.dot(a.T, right.load([start, side]), total)
    if ADD:
        row, column = top + tl.arange(0, HEIGHT)[:, None], side + tl.arange(0, WIDTH)[None, :]
        place = out + (expert * OUT + row).to(tl.int64) * IN + column
        inside = (row < OUT) & (column < IN)
        tl.store(place, tl.load(place, inside) + total, inside)
    else:
        out.store([expert, top, side], total.to(out.dtype)[None, :, :])


def grouped_gradient(left_NO: Tensor, right_NI: Tensor, ends_E: Tensor, total_EOI: Tensor | None = None) -> Tensor:
    """The sum over each expert's rows of left^T right: [E, O, I]; zero for an expert without rows.

    Args:
        total_EOI: float32; if given the result is added to it, and it is returned.
    """
    experts, height, width = ends_E.numel(), left_NO.shape[1], right_NI.shape[1]
    if not left_NO.shape[0]:
        return left_NO.new_zeros(experts, height, width) if total_EOI is None else total_EOI
    out_EOI = left_NO.new_empty(experts, height, width) if total_EOI is None else total_EOI
    tile = gradient_tile(left_NO.shape[0], experts)
    right = TensorDescriptor.from_tensor(right_NI, [tile.inner, tile.width])
    target = TensorDescriptor.from_tensor(out_EOI, [1, tile.height, tile.width]) if total_EOI is None else out_EOI
    _gradient[(experts * triton.cdiv(height, tile.height) * triton.cdiv(width, tile.width),)](
        left_NO, right, ends_E, target, height, width, total_EOI is not None, tile.height, tile.width, tile.inner,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_EOI
