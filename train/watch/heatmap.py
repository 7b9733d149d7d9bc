"""Loads of experts as an image: a row a layer, a column an expert, as the report draws them."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from train.watch.catalog import METRICS, Kind
from train.watch.dashboard import order

HEATMAPS = tuple(metric.name for metric in METRICS if metric.kind is Kind.HEATMAP)
OCTAVES = 3  # loads from an eighth to eight times an even share have colours of their own
CELL = 6  # pixels of a row; columns have fewer where there are many
WIDTH = 1024
# From no load over an even share to eight of them; blue and orange are told apart by everybody.
RAMP = np.array([(11, 79, 138), (131, 180, 220), (244, 244, 242), (237, 168, 105), (163, 68, 0)], dtype=float)
MISSING = (128, 128, 128)
type Values = Mapping[str, float | list[float]]
type Pixels = npt.NDArray[np.uint8]


def heatmaps(values: Values) -> dict[str, Pixels]:
    """The image of each metric of a logged step that is a list of numbers a layer."""
    named = sorted((name for name in values if name.rpartition("/")[0] in HEATMAPS), key=order)
    rows = groupby(named, key=lambda name: name.rpartition("/")[0])
    return {metric: image([as_list(values[name]) for name in names]) for metric, names in rows}


def image(loads: Sequence[Sequence[float]]) -> Pixels:
    """uint8 [rows x CELL, columns x cell, 3] of loads, an even share being 1.0."""
    table = np.array(loads, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (np.log2(table) + OCTAVES) / (2 * OCTAVES) * (len(RAMP) - 1)
    place = np.clip(np.nan_to_num(place, nan=0.0, neginf=0.0), 0, len(RAMP) - 1)
    colours = np.stack([np.interp(place, range(len(RAMP)), channel) for channel in RAMP.T], axis=-1)
    colours[~np.isfinite(table)] = MISSING
    cell = max(1, min(CELL, WIDTH // table.shape[1]))
    pixels: Pixels = np.rint(colours).astype(np.uint8).repeat(CELL, axis=0).repeat(cell, axis=1)
    return pixels


def as_list(value: float | list[float]) -> list[float]:
    """A value that is one number for each column."""
    return value if isinstance(value, list) else [value]
