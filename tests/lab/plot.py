"""A line plot as SVG: of each arm the mean over its seeds, and a band from the least to the largest of them."""

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 64, 190, 28, 36
COLORS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8a5a9e", "#b08a1e", "#5b6770", "#0e9aa7")
TICKS = 5

Band = tuple[float, float, float, float]  # step, least, mean, largest


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, about `TICKS` of them."""
    size = 10.0 ** floor(log10((high - low) / TICKS))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= TICKS)
    first = int(-(-low // step))
    return [number * step for number in range(first, int(high // step) + 1)]


def svg(title: str, lines: Mapping[str, Sequence[Band]]) -> str:
    """The plot of some arms' bands over steps.

    Raises:
        ValueError: nothing to draw.
    """
    points = [band for bands in lines.values() for band in bands]
    if not points:
        raise ValueError(f"{title}: no numbers to draw")
    last, low, high = max(p[0] for p in points), min(p[1] for p in points), max(p[3] for p in points)
    high = high if high > low else low + 1.0

    def x(step: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * step / last:.1f}"

    def y(value: float) -> str:
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low):.1f}"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
    ]
    for value in ticks(low, high):
        out.append(f'<path d="M{LEFT} {y(value)}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(value)}" dy="4" text-anchor="end">{value:.4g}</text>')
    for value in ticks(0, last):
        out.append(f'<text x="{x(value)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:.0f}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>')
    for number, (name, bands) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        edge = [f"{x(step)} {y(top)}" for step, _, _, top in bands]
        edge += [f"{x(step)} {y(bottom)}" for step, bottom, _, _ in reversed(bands)]
        out.append(f'<path d="M{" L".join(edge)}Z" fill="{color}" opacity=".18"/>')
        middle = " L".join(f"{x(step)} {y(mean)}" for step, _, mean, _ in bands)
        out.append(f'<path d="M{middle}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        place = TOP + 12 + 16 * number
        out.append(f'<path d="M{WIDTH - RIGHT + 12} {place - 4}h16" stroke="{color}" stroke-width="2"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 34}" y="{place}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>", ""])
