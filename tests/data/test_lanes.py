"""Samples are dealt out from all over an epoch: each once, in bounded memory, the kinds of a sorted corpus mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.lanes import FEW_LANES, Lanes
from data.order.stream import TokenStream
from data.read.faults import Faults
from data.read.readers import Reader
from data.read.units import Sizes, Unit

SEQ, SHARDS, SHARD_TOKENS = 64, 4096, 64 * 64
LANES = st.builds(Lanes, st.integers(1, 300), st.sampled_from([1, 2, 4, 8, 64]), st.integers(1, 40)).filter(
    lambda lanes: lanes.count <= lanes.samples
)


class MadeUp(Reader):
    """Shards of which only the sizes are asked for."""

    path, vocab_size, in_process = "made up", 1000, True
    num_units, num_bytes, identity = SHARDS, 0, ["made up"]

    def label(self, unit: int) -> str:
        return str(unit)

    def read(self, unit: int, faults: Faults) -> Unit:
        raise AssertionError("only sizes are asked for")

    def known(self) -> Sizes:
        each = np.ones(SHARDS, dtype=np.int64)
        return Sizes(each, each * SHARD_TOKENS, each * 0, "made up")


@settings(deadline=None)
@given(LANES)
def test_every_place_has_a_position_of_its_own(lanes: Lanes) -> None:
    found = [lanes.find(place) for place in range(lanes.samples)]
    assert lanes.lane(np.arange(lanes.samples)).tolist() == [lane for lane, _, _ in found]
    positions = [lanes.start(lane) + window * lanes.window + number for lane, window, number in found]
    assert sorted(positions) == list(range(lanes.samples))
    assert all(number < lanes.window_size(lane, window) for lane, window, number in found)
    assert sum(map(lanes.length, range(lanes.count))) == lanes.samples
    for first in range(0, lanes.samples // lanes.count * lanes.count, lanes.count):
        assert len({lane for lane, _, _ in found[first : first + lanes.count]}) == lanes.count


@settings(deadline=None)
@given(LANES, st.data())
def test_the_last_place_that_may_need_a_position(lanes: Lanes, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, lanes.count - 1))
    position = lanes.start(lane) + data.draw(st.integers(0, lanes.length(lane) - 1))
    window = (position - lanes.start(lane)) // lanes.window
    # Which sample of its window comes when is random: any of them may hold the position.
    places = [place for place in range(lanes.samples) if lanes.find(place)[:2] == (lane, window)]
    assert lanes.last_place(lane, position) == max(places)
    assert lanes.last_place(lane, lanes.start(lane) + lanes.length(lane) + 3) == lanes.last_place(
        lane, lanes.start(lane) + lanes.length(lane) - 1
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200).filter(sum), st.integers(1, 2**20))
def test_lanes_keep_to_their_bytes(sizes: list[int], num_bytes: int) -> None:
    units = np.array(sizes)
    filled = units[units > 0]
    lanes = Lanes.within(num_bytes, units, 10**6, 50)
    assert lanes.count == 1 or 2 * lanes.count * filled.mean() <= num_bytes
    assert lanes.count & (lanes.count - 1) == 0 and lanes.count <= len(filled)
    if num_bytes >= 2 * FEW_LANES * filled.mean() and len(filled) >= FEW_LANES:
        assert lanes.count >= FEW_LANES
    # Two units at a window's border are within what a lane may hold, and so is half as much again.
    assert lanes.window == 1 or lanes.window * 50 * 2 <= num_bytes / lanes.count - filled.mean() + 1e-6


def stream(lanes: int) -> TokenStream:
    reader = MadeUp()
    made = TokenStream(reader, reader.known(), SEQ, 0, lanes * 2 * SHARD_TOKENS * 2)
    assert made.lanes.count == lanes
    return made


def shards_of(made: TokenStream, first: int, count: int) -> np.ndarray:
    places = [made._find(index) for index in range(first, first + count)]
    return np.array([made._unit_layout(place.epoch)[0][place.spans[0][0]] for place in places])


@pytest.mark.parametrize(("lanes", "kinds", "batch"), [(64, 4, 1024), (64, 10, 64), (64, 10, 1024), (128, 30, 1024)])
def test_a_batch_of_a_sorted_corpus_holds_its_kinds_as_random_drawing_would(lanes: int, kinds: int, batch: int) -> None:
    made = stream(lanes)
    found = []
    for first in range(0, made.samples_per_epoch - batch, made.samples_per_epoch // 15):
        shards = shards_of(made, first - first % batch, batch)
        assert len(set(shards)) >= 32
        counts = np.bincount(shards * kinds // SHARDS, minlength=kinds)
        found.append(((counts - batch / kinds) ** 2 / (batch / kinds)).sum())
    # Random drawing has a mean of kinds - 1.
    assert np.mean(found) <= 1.5 * (kinds - 1)


def test_few_samples_in_a_row_are_spread_too() -> None:
    made = stream(64)
    for first in range(0, 6400, 8):
        assert len({int(shard) * 8 // SHARDS for shard in shards_of(made, first, 8)}) >= 6


def test_ranks_have_lanes_of_their_own() -> None:
    made = stream(64)
    world, batch = 8, 256
    lanes: list[set[int]] = [set() for _ in range(world)]
    for step in range(20):
        numbers = np.array(made.in_lanes(range(step * batch, (step + 1) * batch)))
        for rank, own in enumerate(numbers.reshape(world, -1)):
            lanes[rank] |= set(made.lane_of(own).tolist())
    assert [len(own) for own in lanes] == [64 // world] * world
    assert not set.intersection(lanes[0], lanes[1])
