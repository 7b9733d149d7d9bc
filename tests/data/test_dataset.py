"""Every kind of source gives the same documents, and the samples of a step do not depend on who reads them."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DataConfig, PrepareConfig
from data.dataset import Dataset, check_data
from data.errors import CorpusError
from data.loader import Loader
from data.order.batches import BatchSchedule
from data.prepare.prepare import prepare
from data.read.faults import Faults
from data.read.readers import spread_order
from data.text.tokenizer import Tokenizer, train_bpe
from tests.data.conftest import text_of
from tests.data.kinds import WRITERS, encoded, write_jsonl

SEQ, GLOBAL = 16, 8
TEXTS = [text_of(number) for number in range(90)]


@pytest.fixture(scope="module")
def settings_of(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Callable[..., DataConfig]:
    """Settings of a dataset of one kind, whose files are written once."""
    root = tmp_path_factory.mktemp("kinds")
    tokenizer = Tokenizer.from_path(tokenizer_file)
    written = {kind: write(root, tokenizer, TEXTS) for kind, write in WRITERS.items()}

    def make(kind: str, **changes) -> DataConfig:
        path, column = written[kind]
        common = {"seq_length": SEQ, "cache": str(root / "cache"), "tokenizer": str(tokenizer_file), "unit_bytes": 1600}
        common["shuffle_bytes"] = 2**14
        return DataConfig(**({"corpus": str(path), "column": column} | common | changes))

    return make


@pytest.fixture(scope="module")
def mixed(settings_of, tmp_path_factory, tokenizer_file: Path) -> Callable[..., DataConfig]:
    """Settings of a mixture of three kinds: prepared, token lists, Megatron; its weights change after 25 samples."""
    root = tmp_path_factory.mktemp("prepared")
    prepared = prepare(
        PrepareConfig(
            input=str(write_jsonl(root / "more.jsonl", "text", [text_of(n) for n in range(90, 190)])),
            output=str(root / "corpus"),
            tokenizer=str(tokenizer_file),
            shard_tokens=500,
            heldout_fraction=0.2,
        )
    )

    def make(**changes) -> DataConfig:
        config = settings_of("parquet tokens")
        sources = ((str(prepared), 0.5), (config.corpus, 0.3), (settings_of("megatron").corpus, 0.2))
        return replace(config, sources=sources, stages=((25 * SEQ, (1.0, 0.0, 3.0)),), **changes)

    return make


def documents_of(dataset: Dataset) -> Iterator[tuple[int, ...]]:
    for source in dataset.sources:
        for reader in (source.train, source.heldout):
            for unit in range(reader.num_units):
                read = reader.read(unit, Faults())
                yield from (tuple(read.document(number).tolist()) for number in range(read.num_documents))


def step_hashes(dataset: Dataset, world: int, first: int, steps: int, micro: int = 1) -> list[str]:
    """Hash of all tokens and documents of each global step, put together from what every rank reads."""
    rows: list[dict[int, bytes]] = [{} for _ in range(steps)]
    for rank in range(world):
        stream = dataset.train_stream(seed=3)
        with Loader(stream, BatchSchedule.constant(GLOBAL), micro, rank, world, first) as loader:
            for step in range(steps):
                for number, batch in enumerate(next(loader)):
                    for row in range(micro):
                        content = batch.tokens[row].numpy().tobytes() + batch.documents[row].numpy().tobytes()
                        rows[step][rank * (GLOBAL // world) + number * micro + row] = content
    assert all(sorted(step) == list(range(GLOBAL)) for step in rows)
    return [hashlib.sha256(b"".join(step[row] for row in range(GLOBAL))).hexdigest() for step in rows]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_source_holds_every_document_once(settings_of, tokenizer_file: Path, kind: str) -> None:
    dataset = Dataset(settings_of(kind))
    expected = sorted(map(tuple, encoded(Tokenizer.from_path(tokenizer_file), TEXTS, with_eod=True)))
    assert sorted(documents_of(dataset)) == expected
    (source,) = dataset.sources
    assert source.train.num_units > 3
    assert source.sizes.num_documents + source.heldout.read(0, Faults()).num_documents == len(TEXTS)
    # The counts that the order rests on are those of the documents themselves.
    read = [source.train.read(unit, Faults()) for unit in range(source.train.num_units)]
    assert source.sizes.documents.tolist() == [unit.num_documents for unit in read]
    assert source.sizes.tokens.tolist() == [unit.num_tokens for unit in read]


@pytest.fixture(scope="module")
def dataset_of(settings_of, mixed) -> Callable[[str, str, float], Dataset]:
    @cache
    def open_dataset(kind: str, packing: str, subset: float) -> Dataset:
        changes = {"packing": packing, "subset": subset}
        return Dataset(mixed(**changes) if kind == "mixture" else settings_of(kind, **changes))

    return open_dataset


@pytest.fixture(scope="module")
def straight(dataset_of) -> Callable[[str, str, float], list[str]]:
    """Hashes of the first 40 steps of a run of one rank that never stops; more than an epoch of any source."""

    @cache
    def read(kind: str, packing: str, subset: float) -> list[str]:
        return step_hashes(dataset_of(kind, packing, subset), world=1, first=0, steps=40)

    return read


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from([*WRITERS, "mixture", "mixture", "mixture"]),
    packing=st.sampled_from(["split", "best_fit"]),
    subset=st.sampled_from([1.0, 0.6]),
    worlds=st.lists(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 39), min_size=2, max_size=2, unique=True),
)
def test_a_step_is_the_same_on_any_ranks_and_after_any_resume(
    dataset_of, straight, kind: str, packing: str, subset: float, worlds: list[tuple[int, int]], cuts: list[int]
) -> None:
    expected = straight(kind, packing, subset)
    assert len(set(expected)) == len(expected)
    borders = [0, *sorted(cuts)[: len(worlds) - 1], 40]
    found = []
    for (world, micro), first, last in zip(worlds, borders, borders[1:], strict=False):
        # Opened again, as a resumed run does; the counts come from the cache.
        dataset = Dataset(dataset_of(kind, packing, subset).config)
        found += step_hashes(dataset, world, first, last - first, micro)
    assert found == expected


@pytest.mark.parametrize("kind", [*WRITERS, "mixture"])
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_four_ranks_then_two_then_four(dataset_of, straight, kind: str, packing: str) -> None:
    dataset = dataset_of(kind, packing, 1.0)
    parts = ((4, 0, 13), (2, 13, 16), (4, 29, 11))
    found = [step for world, first, steps in parts for step in step_hashes(dataset, world, first, steps)]
    assert found == straight(kind, packing, 1.0)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(mixed, straight, workers: int) -> None:
    dataset = Dataset(mixed(packing="best_fit", workers=workers))
    assert step_hashes(dataset, world=1, first=5, steps=20) == straight("mixture", "best_fit", 1.0)[5:25]


@pytest.mark.parametrize("kind", ["parquet tokens", "jsonl text", "megatron"])
def test_a_subset_is_part_of_a_larger_one_and_reads_no_more_than_its_units(settings_of, kind: str) -> None:
    kept: dict[float, set] = {}
    for subset in (0.1, 0.2, 0.5, 1.0):
        # Held-out units are chosen before: they are left out of the comparison.
        dataset = Dataset(settings_of(kind, subset=subset, heldout_fraction=0.0))
        (source,) = dataset.sources
        kept[subset] = set(documents_of(dataset))
        assert source.sizes.num_documents == len(kept[subset])
        whole = Dataset(settings_of(kind, heldout_fraction=0.0)).sources[0]
        assert source.train.num_units <= subset * whole.train.num_units + 2
        # Within a document of the share, or a unit where nobody knows the tokens before they are read.
        within = 0.15 if kind == "jsonl text" else 0.06
        assert abs(source.sizes.num_tokens / whole.sizes.num_tokens - subset) < within
    assert kept[0.1] < kept[0.2] < kept[0.5] < kept[1.0]
    other = set(documents_of(Dataset(settings_of(kind, subset=0.5, subset_seed=1, heldout_fraction=0.0))))
    assert other != kept[0.5]


@pytest.mark.parametrize("count", [1, 2, 13, 64, 1000])
def test_the_units_of_a_subset_are_spread_evenly(count: int) -> None:
    order = spread_order(count, seed=4)
    assert sorted(order) == list(range(count))
    for kept in (count // 8, count // 3, count // 2):
        # No stretch of the corpus has two units more or less than its share, but for the rounding of powers of two.
        found = np.histogram(order[:kept], bins=4, range=(0, count))[0]
        assert (np.abs(found - kept / 4) <= 2 + 0.02 * count).all()
    if count > 2:
        assert order.tolist() != spread_order(count, seed=5).tolist()


def test_a_run_says_what_it_really_reads(settings_of) -> None:
    dataset = Dataset(settings_of("parquet tokens", subset=0.5, packing="best_fit"))
    source = dataset.sources[0]
    (line,) = dataset.describe()
    assert f"{source.sizes.num_tokens:,} tokens to train on in {source.sizes.num_documents:,} documents" in line
    assert f"of {source.whole.num_tokens:,} (data.subset=0.5)" in line
    assert "best-fit packing fills 89.20% of all places" in line


def test_identity_names_what_changed(settings_of, mixed) -> None:
    config = settings_of("parquet tokens")
    before = Dataset(config).identity(seed=1)
    changes = {
        "data.seq_length": replace(config, seq_length=SEQ + 1),
        "data.packing": replace(config, packing="best_fit"),
        "data.subset": replace(config, subset=0.5),
        "data.corpus": settings_of("megatron"),
        "data.shuffle_bytes": replace(config, shuffle_bytes=2**13),
    }
    for name, changed in changes.items():
        after = Dataset(changed).identity(seed=1)
        assert name in {key for key in before if before[key] != after[key]}, name
    assert [key for key, value in Dataset(config).identity(seed=2).items() if value != before[key]] == ["seed"]
    # Another column of the same file has the same footer.
    assert before["data.column"] == "tokens" and before["data.eod_token"] == 0
    one = Dataset(mixed()).identity(seed=1)
    two = Dataset(replace(mixed(), stages=())).identity(seed=1)
    assert [key for key in one if one[key] != two[key]] == ["data.sources (weights)"]


def test_cursors_count_what_each_source_has_given(mixed) -> None:
    dataset = Dataset(mixed())
    cursors = dataset.cursors(25)
    # 25 samples of 0.5, 0.3 and 0.2: the exact shares, rounded one after the other.
    assert [cursor["samples"] for cursor in cursors.values()] == [12, 7, 6]
    assert sum(cursor["samples"] for cursor in dataset.cursors(1000).values()) == 1000
    assert [c["epoch"] for c in dataset.cursors(10**9).values()][1] == 0  # weight 0 after 25 samples
    progress = dataset.progress(1000)
    assert sum(value for name, value in progress.items() if name.startswith("tokens/")) == 1000 * SEQ
    epochs = [value for name, value in progress.items() if name.startswith("epoch/")]
    assert [int(epoch) for epoch in epochs] == [cursor["epoch"] for cursor in dataset.cursors(1000).values()]
    assert max(epochs) > 3


def test_a_source_that_would_be_read_too_often_is_refused(mixed) -> None:
    dataset = Dataset(mixed(max_repeats=1.5))
    dataset.check_repeats(100)
    with pytest.raises(CorpusError, match=r"data\.max_repeats=1\.5, but .* read \d\.\d\d times in 16,000 tokens"):
        dataset.check_repeats(1000)
    Dataset(mixed()).check_repeats(10**9)
    lines = dataset.describe(1000)
    assert sum(line.startswith("of the run: ") for line in lines) == 3
    assert any(" tokens, read " in line for line in lines)


def test_weights_come_from_a_file(mixed, tmp_path: Path) -> None:
    config = mixed()
    file = tmp_path / "weights.yaml"
    file.write_text("".join(f"{path}: {weight}\n" for path, weight in config.sources))
    there = replace(config, sources=(), sources_file=str(file))
    check_data(there, 0)
    assert Dataset(there).identity(3) == Dataset(config).identity(3)
    with pytest.raises(CorpusError, match=r"data\.sources_file=.*weights\.yaml and data\.sources are both given"):
        check_data(replace(config, sources_file=str(file)), 0)
    file.write_text("- a list")
    with pytest.raises(CorpusError, match="must hold a path and a weight a line"):
        check_data(there, 0)
    with pytest.raises(CorpusError, match=r"data\.sources_file=.*gone cannot be read"):
        check_data(replace(there, sources_file=str(tmp_path / "gone")), 0)


def test_a_far_sample_is_found_at_once(mixed) -> None:
    stream = Dataset(mixed(packing="best_fit")).train_stream(seed=3)
    reads = []
    for one in stream.streams:
        read = one.reader.read
        one.reader.read = lambda unit, faults, read=read: reads.append(unit) or read(unit, faults)
    stream.sample(10**9)
    assert len(reads) == 1
    stream.close()


def test_held_out_units_are_not_trained_on(settings_of) -> None:
    dataset = Dataset(settings_of("parquet tokens", heldout_fraction=0.3))
    (source,) = dataset.sources
    held = {tuple(source.heldout.read(u, Faults()).document(0)) for u in range(source.heldout.num_units)}
    trained = {tuple(source.train.read(u, Faults()).document(0)) for u in range(source.train.num_units)}
    assert held and trained and not held & trained
    assert dataset.heldout_stream().samples_per_epoch > 1


@pytest.mark.parametrize("none", [{"heldout_fraction": 0.0}, {"heldout_tokens": 0}])
def test_without_held_out_text_there_is_no_evaluation(settings_of, none: dict) -> None:
    dataset = Dataset(settings_of("parquet tokens", **none))
    dataset.check()
    assert not dataset.has_heldout
    assert dataset.describe()[-1] == "no evaluation: the held-out text fills no sample"
    with pytest.raises(CorpusError, match=r"all held-out text \(0 tokens.*data\.heldout_fraction="):
        dataset.heldout_stream()


@pytest.mark.parametrize("kind", ["parquet tokens", "jsonl text", "megatron"])
def test_a_corpus_of_one_unit_is_divided_by_its_documents(settings_of, tmp_path: Path, kind: str) -> None:
    config = settings_of(kind, heldout_fraction=0.2, unit_bytes=2**20, cache=str(tmp_path))
    if kind == "parquet tokens":
        table = pq.read_table(config.corpus)
        pq.write_table(table, tmp_path / "one.parquet")
        config = replace(config, corpus=str(tmp_path / "one.parquet"))
    (source,) = Dataset(config).sources
    assert source.train.num_units == source.heldout.num_units == 1
    parts = [reader.read(0, Faults()) for reader in (source.train, source.heldout)]
    train, heldout = ({bytes(part.document(n)) for n in range(part.num_documents)} for part in parts)
    assert len(train | heldout) == len(TEXTS) and not train & heldout
    assert 5 < len(heldout) < 35  # 90 draws of 0.2
    assert (source.sizes.num_documents, source.sizes.num_tokens) == (len(train), parts[0].num_tokens)


def test_held_out_text_is_capped_in_tokens(settings_of) -> None:
    (source,) = Dataset(settings_of("parquet tokens", heldout_fraction=0.5, heldout_tokens=500)).sources
    held = sum(source.heldout.read(unit, Faults()).num_tokens for unit in range(source.heldout.num_units))
    assert 200 < held < 1000  # whole row groups of seven documents


def test_sources_with_different_tokenizers_are_refused(mixed, tmp_path: Path) -> None:
    train_bpe(TEXTS, 300, progress=False).save(tmp_path / "tokenizer.json")
    with pytest.raises(CorpusError, match="have different tokenizers"):
        Dataset(mixed(tokenizer=str(tmp_path / "tokenizer.json")))
    config = replace(mixed(), tokenizer="")  # the prepared corpus brings the one that the others are read with
    assert Dataset(config).identity(0) == Dataset(mixed()).identity(0)
    with pytest.raises(CorpusError, match=r"data\.tokenizer must be given: .*tokens\.parquet"):
        Dataset(replace(config, sources=(), stages=(), corpus=config.sources[1][0]))
