"""The order of samples depends on seed, epoch and number alone, and every rank reads its slice of it."""

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import PrepareConfig
from data.errors import CorpusError
from data.loader import Loader, heldout_batches
from data.order.batches import Batch, BatchSchedule
from data.order.lanes import permutation
from data.order.packing import Sample
from data.order.stream import TokenStream
from data.prepare.prepare import prepare
from data.read.corpus import Corpus
from data.read.prepared import PreparedReader

SEQ = 16


# Of tokens in 2 bytes: room for four lanes over shards of about 500 tokens, with windows of several samples.
SHUFFLE_BYTES = 2**14


def stream_of(
    corpus: Corpus, split: str, seq_length: int, seed: int, shuffle_bytes: int = SHUFFLE_BYTES
) -> TokenStream:
    reader = PreparedReader(corpus, split)
    return TokenStream(reader, reader.known(), seq_length, seed, shuffle_bytes)


@pytest.fixture
def stream(corpus: Corpus) -> TokenStream:
    return stream_of(corpus, "train", SEQ, seed=5)


def in_order(stream: TokenStream, epoch: int) -> list[Sample]:
    """The samples of an epoch in the order in which their tokens lie."""
    first = epoch * stream.samples_per_epoch
    places = range(first, first + stream.samples_per_epoch)
    return [stream.sample(index) for index in sorted(places, key=lambda index: stream._find(index).position)]


def epoch_tokens(stream: TokenStream, epoch: int) -> np.ndarray:
    """The tokens of one epoch laid end to end, each once."""
    samples = in_order(stream, epoch)
    return np.concatenate([sample.tokens[:-1] for sample in samples] + [samples[-1].tokens[-1:]])


def rows_of_step(stream: TokenStream, step: int, global_batch: int, micro: int, world: int) -> torch.Tensor:
    """Tokens of a step's samples in the order of their lanes, put together from every rank's microbatches."""
    rows = torch.full((global_batch, SEQ + 1), -1)
    for rank in range(world):
        with Loader(stream, BatchSchedule.constant(global_batch), micro, rank, world, start_step=step) as loader:
            for number, batch in enumerate(next(loader)):
                start = rank * (global_batch // world) + number * micro
                rows[start : start + micro] = batch.tokens
    return rows


def assert_equal_batches(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.documents, other.documents)


def test_neighbours_come_from_other_lanes_and_windows_are_dealt_out_at_random(stream: TokenStream) -> None:
    count, window = stream.lanes.count, stream.lanes.window
    assert count == 4 and window > 4
    places = [stream._find(index) for index in range(stream.samples_per_epoch)]
    assert sorted(place.position for place in places) == list(range(stream.samples_per_epoch))
    for first in range(0, stream.samples_per_epoch - count, count):
        assert len({place.lane for place in places[first : first + count]}) == count
    own = [place.position for place in places if place.lane == 3]
    assert own != sorted(own)
    for first in range(0, len(own), window):
        assert max(own[first : first + window]) < min(own[first + window :], default=10**9)


def test_memory_holds_what_is_needed_still_and_no_more(stream: TokenStream) -> None:
    held, reads = [], []
    read = stream.reader.read
    stream.reader.read = lambda unit, faults: reads.append(unit) or read(unit, faults)
    total = 2 * stream.samples_per_epoch
    for index in range(8):
        stream.ask(index)
    for index in range(total):
        stream.ask(index + 8)
        stream.sample(index)
        stream.release(index + 1)
        held.append(stream.cache.held)
    # A lane has two units open, and three for a moment: one that ends, one that begins within the same window.
    assert max(held) <= 3 * stream.lanes.count
    # An epoch reads each unit once, but for those that lie in two lanes.
    assert len(reads) <= 2 * (stream.reader.num_units + stream.lanes.count)
    stream.close()


def test_a_rank_of_many_holds_only_what_it_will_use(make_corpus: Callable[..., Corpus]) -> None:
    stream = stream_of(make_corpus("many", num_documents=500, shard_tokens=300), "train", SEQ, seed=5)
    with Loader(stream, BatchSchedule.constant(16), 1, rank=3, world=8, ahead=4) as loader:
        held = []
        for _ in range(1000):
            next(loader)
            held.append(stream.cache.held)
    assert stream.reader.num_units > 20 and stream.lanes.count == 8
    # One lane's units, and what its next steps need: forty epochs leave nothing behind.
    assert max(held) <= 4 and max(held[500:]) <= max(held[:500])


def test_an_epoch_holds_every_document_once(stream: TokenStream) -> None:
    assert stream.reader.num_units > 3
    for epoch in (0, 1):
        tokens = epoch_tokens(stream, epoch)
        texts = np.split(tokens, np.flatnonzero(tokens == stream.reader.corpus.eod_id) + 1)
        whole = sorted(tuple(document) for document in stream.reader.corpus.documents("train"))
        # The remainder that fills no sample cuts the last document and may drop a few more whole.
        dropped = stream.sizes.num_tokens - len(tokens)
        assert dropped < SEQ
        found = {tuple(text) for text in texts[:-1]}
        assert len(found) == len(texts) - 1
        assert found <= set(whole)
        assert sum(map(len, set(whole) - found)) == len(texts[-1]) + dropped


def test_document_numbers_change_exactly_after_the_end_of_a_document(stream: TokenStream) -> None:
    crossings = 0
    for index in range(stream.samples_per_epoch):
        tokens, documents, _ = stream.sample(index)
        assert documents[0] == 0
        np.testing.assert_array_equal(np.diff(documents), tokens[:-1] == stream.reader.corpus.eod_id)
        crossings += int(documents[-1])
    assert crossings > 0


def test_each_epoch_and_seed_has_an_order_of_its_own(corpus: Corpus, stream: TokenStream) -> None:
    first, second = epoch_tokens(stream, 0), epoch_tokens(stream, 1)
    other_seed = epoch_tokens(stream_of(corpus, "train", SEQ, seed=6), 0)
    again = epoch_tokens(stream_of(corpus, "train", SEQ, seed=5), 0)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other_seed)


def test_documents_of_one_shard_come_in_another_order_each_epoch(make_corpus: Callable[..., Corpus]) -> None:
    stream = stream_of(make_corpus("one-shard", shard_tokens=10**6), "train", SEQ, seed=5)
    assert stream.reader.num_units == 1
    assert not np.array_equal(epoch_tokens(stream, 0), epoch_tokens(stream, 1))


def test_shards_too_come_in_another_order_each_epoch(stream: TokenStream) -> None:
    orders = [tuple(stream._unit_layout(epoch)[0]) for epoch in range(8)]
    assert len(set(orders)) > 1
    assert all(sorted(order) == list(range(stream.reader.num_units)) for order in orders)


def test_unshuffled_stream_is_the_corpus_as_it_lies(corpus: Corpus) -> None:
    stream = stream_of(corpus, "heldout", SEQ, seed=0, shuffle_bytes=0)
    laid = np.concatenate(list(corpus.documents("heldout")))
    np.testing.assert_array_equal(epoch_tokens(stream, 0), laid[: stream.samples_per_epoch * SEQ + 1])
    np.testing.assert_array_equal(epoch_tokens(stream, 1), epoch_tokens(stream, 0))


def test_seeking_reads_only_the_shards_it_needs(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    shard = Corpus.shard
    monkeypatch.setattr(Corpus, "shard", lambda self, *a: opened.append(a[1]) or shard(self, *a))
    far = stream_of(corpus, "train", SEQ, seed=5)
    index = 1000 * far.samples_per_epoch + far.samples_per_epoch // 2
    far.sample(index)
    # 17 tokens lie in one shard or in two neighbours.
    assert 1 <= len(opened) <= 2


def test_order_does_not_change_between_releases() -> None:
    # Written down once: a change here breaks the resuming of runs, and needs a new ORDER_VERSION.
    assert permutation(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]


@pytest.mark.parametrize("step", [0, 3, 40])
def test_a_step_is_the_same_in_every_layout(stream: TokenStream, step: int) -> None:
    global_batch = 16
    numbers = stream.in_lanes(range(step * global_batch, (step + 1) * global_batch))
    assert sorted(numbers) == list(range(step * global_batch, (step + 1) * global_batch))
    expected = np.stack([stream.sample(index).tokens for index in numbers])
    for world in (1, 2, 4):
        for micro in (1, 2, 4):
            rows = rows_of_step(stream, step, global_batch, micro, world)
            np.testing.assert_array_equal(rows.numpy(), expected)


def test_steps_run_over_the_end_of_an_epoch(stream: TokenStream) -> None:
    global_batch = 8
    step = stream.samples_per_epoch // global_batch
    assert stream.samples_per_epoch % global_batch  # so that this step holds samples of two epochs
    rows = rows_of_step(stream, step, global_batch, micro=2, world=2)
    expected = [stream.sample(index).tokens.tolist() for index in range(step * global_batch, (step + 1) * global_batch)]
    assert sorted(rows.tolist()) == sorted(expected)


def test_resuming_at_a_step_equals_going_on(stream: TokenStream, corpus: Corpus) -> None:
    with Loader(stream, BatchSchedule.constant(8), 2, rank=1, world=2) as loader:
        steps = list(islice(loader, 10))
        assert loader.step == 10
    fresh = stream_of(corpus, "train", SEQ, seed=5)
    with Loader(fresh, BatchSchedule.constant(8), 2, rank=1, world=2, start_step=6) as loader:
        for expected in steps[6:]:
            assert_equal_batches(next(loader), expected)
        assert loader.step == 10


@pytest.mark.parametrize("world", [1, 2])
def test_a_schedule_deals_out_the_same_samples_in_order(corpus: Corpus, stream: TokenStream, world: int) -> None:
    schedule = BatchSchedule(((0, 4), (6, 8)), ((0, SEQ // 2), (8, SEQ)))
    # Each loader reads a stream of its own, as each process does.
    loaders = [Loader(stream_of(corpus, "train", SEQ, seed=5), schedule, 2, rank, world) for rank in range(world)]
    inputs: list[list[int]] = []
    micro_batches = []
    for _ in range(4):
        steps = [next(loader) for loader in loaders]
        micro_batches.append(len(steps[0]))
        for batches in steps:
            inputs += [row.tolist() for batch in batches for row in batch.tokens[:, :-1]]
    resumed = [Loader(stream_of(corpus, "train", SEQ, 5), schedule, 2, rank, world, 3) for rank in range(world)]
    for loader, step in zip(resumed, steps, strict=True):
        assert_equal_batches(next(loader), step)
    for loader in [*loaders, *resumed]:
        loader.close()
    # Four samples twice, then eight twice; the first eight are cut in halves, which hold the same tokens.
    assert micro_batches == [2 // world, 2 // world, 4 // world, 4 // world]
    steps = [stream.in_lanes(range(first, last)) for first, last in ((0, 4), (4, 8), (8, 16), (16, 24))]
    expected = np.stack([stream.sample(index).tokens[:-1] for step in steps for index in step])
    halves = expected[:8].reshape(-1, SEQ // 2).tolist()
    assert inputs == halves + expected[8:].tolist()


def test_batches_have_the_documented_shapes(stream: TokenStream) -> None:
    with Loader(stream, BatchSchedule.constant(12), 3, rank=0, world=2) as loader:
        batches = next(loader)
    assert len(batches) == 2
    for batch in batches:
        assert batch.tokens.shape == batch.documents.shape == (3, SEQ + 1)
        assert (batch.tokens.dtype, batch.documents.dtype) == (torch.int64, torch.int32)
        assert batch.num_samples == 3


def test_closing_ends_the_thread_and_the_iteration(stream: TokenStream) -> None:
    before = set(threading.enumerate())
    loader = Loader(stream, BatchSchedule.constant(4), 2, rank=0, world=1)
    next(loader)
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"loader", "reader"}
    loader.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()  # twice does no harm


def test_closing_before_the_first_step(stream: TokenStream) -> None:
    loader = Loader(stream, BatchSchedule.constant(4), 2, rank=0, world=1)
    loader.close()
    assert list(loader) == []


def test_reading_error_reaches_the_consumer(corpus: Corpus) -> None:
    for shard in corpus.path.glob("train-*.parquet"):
        shard.write_bytes(b"x" * shard.stat().st_size)
    before = set(threading.enumerate())
    with Loader(stream_of(corpus, "train", SEQ, 0), BatchSchedule.constant(4), 2, rank=0, world=1) as loader:
        with pytest.raises(CorpusError, match=r"train-[\d-]+\.parquet is corrupt"):
            next(loader)
        # Asking again must not wait for a thread that is gone.
        with pytest.raises(StopIteration):
            next(loader)
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(("global_batch", "micro", "world"), [(6, 4, 1), (8, 4, 4), (0, 1, 1), (4, 0, 1)])
def test_batch_that_does_not_divide_is_refused(stream: TokenStream, global_batch: int, micro: int, world: int) -> None:
    with pytest.raises(CorpusError, match=rf"batch\.global={global_batch} .* batch\.micro={micro}"):
        Loader(stream, BatchSchedule.constant(global_batch), micro, 0, world)


def test_too_little_text_names_the_setting(corpus: Corpus) -> None:
    tokens = corpus.totals("heldout").tokens
    with pytest.raises(CorpusError, match=rf"data\.seq_length={tokens} .* heldout"):
        stream_of(corpus, "heldout", tokens, 0)
    assert stream_of(corpus, "heldout", tokens - 1, 0).samples_per_epoch == 1


def test_negative_seed_is_refused(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="seed=-1"):
        stream_of(corpus, "train", SEQ, -1)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("max_samples", [None, 1, 7, 10_000])
def test_held_out_pass_gives_each_sample_to_one_rank(corpus: Corpus, world: int, max_samples: int | None) -> None:
    stream = stream_of(corpus, "heldout", SEQ, 0, shuffle_bytes=0)
    total = stream.samples_per_epoch
    count = total if max_samples is None else min(total, max_samples)
    shares = [list(heldout_batches(stream, 3, rank, world, max_samples)) for rank in range(world)]

    assert len({len(share) for share in shares}) == 1
    assert sum(batch.num_samples for share in shares for batch in share) == count
    rows = torch.cat([batch.tokens for batches in zip(*shares, strict=True) for batch in batches])
    documents = torch.cat([batch.documents for batches in zip(*shares, strict=True) for batch in batches])
    expected = np.stack([stream.sample(n * total // count).tokens for n in range(count)])
    np.testing.assert_array_equal(rows[:count], expected)
    assert (documents[:count] >= 0).all()
    assert (documents[count:] == -1).all()


def test_fewer_held_out_samples_are_spread_over_the_split(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(corpus, "heldout", SEQ, 0, shuffle_bytes=0)
    read: list[int] = []
    sample = TokenStream.sample
    monkeypatch.setattr(TokenStream, "sample", lambda self, index: read.append(index) or sample(self, index))
    assert len(list(heldout_batches(stream, 1, 0, 1, max_samples=5))) == 5
    step = stream.samples_per_epoch / 5
    assert step > 2
    gaps = np.diff([*read, stream.samples_per_epoch])
    assert read[0] == 0
    assert (np.abs(gaps - step) < 1).all()


def test_held_out_pass_refuses_a_shuffled_stream(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="shuffle=False"):
        next(heldout_batches(stream_of(corpus, "heldout", SEQ, 0), 1, 0, 1))


def test_corpus_without_held_out_text_cannot_be_evaluated(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "text.txt").write_text("only a little text")
    config = PrepareConfig(
        input=str(tmp_path / "text.txt"),
        output=str(tmp_path / "out"),
        tokenizer=str(tokenizer_file),
        heldout_fraction=0,
    )
    corpus = Corpus.open(prepare(config))
    assert corpus.totals("heldout").tokens == 0
    with pytest.raises(CorpusError, match=r"heldout split of .* \(0 tokens"):
        stream_of(corpus, "heldout", SEQ, 0)
