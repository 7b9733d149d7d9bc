"""Every kind of source gives the same documents, and the samples of a step do not depend on who reads them."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DataConfig, PrepareConfig
from data.dataset import Dataset
from data.errors import CorpusError
from data.loader import Loader
from data.order.batches import BatchSchedule
from data.prepare.prepare import prepare
from data.read.faults import Faults
from data.text.tokenizer import Tokenizer, train_bpe
from tests.data.conftest import text_of
from tests.data.kinds import WRITERS, encoded, write_jsonl

SEQ, GLOBAL = 16, 8
TEXTS = [text_of(number) for number in range(90)]


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Units and windows so small that a few kilobytes hold many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.order.stream.WINDOW_SAMPLES", 24)
        patch.setattr("data.order.mixture.BLOCK_SAMPLES", 32)
        yield


@pytest.fixture(scope="module")
def settings_of(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Callable[..., DataConfig]:
    """Settings of a dataset of one kind, whose files are written once."""
    root = tmp_path_factory.mktemp("kinds")
    tokenizer = Tokenizer.from_path(tokenizer_file)
    written = {kind: write(root, tokenizer, TEXTS) for kind, write in WRITERS.items()}

    def make(kind: str, **changes) -> DataConfig:
        path, column = written[kind]
        common = {"seq_length": SEQ, "cache": str(root / "cache"), "tokenizer": str(tokenizer_file), "unit_bytes": 1600}
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
                        rows[step][(number * world + rank) * micro + row] = content
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


def test_formats_of_the_same_text_keep_the_same_subset(settings_of) -> None:
    kinds = ("parquet tokens", "parquet text", "jsonl text", "megatron")
    kept = {kind: {} for kind in kinds}
    for kind in kinds:
        for subset in (0.2, 0.5, 1.0):
            # Held-out units are chosen before, and differ between formats: they are left out of the comparison.
            dataset = Dataset(settings_of(kind, subset=subset, heldout_fraction=0.0))
            kept[kind][subset] = set(documents_of(dataset))
            assert dataset.sources[0].sizes.num_documents == len(kept[kind][subset])
    assert all(kept[kind] == kept[kinds[0]] for kind in kinds)
    few, half, all_ = (kept[kinds[0]][subset] for subset in (0.2, 0.5, 1.0))
    assert few < half < all_
    # A binomial of 90 documents: three standard deviations.
    assert abs(len(half) - 45) < 15 and abs(len(few) - 18) < 12
    other = set(documents_of(Dataset(settings_of("megatron", subset=0.5, subset_seed=1, heldout_fraction=0.0))))
    assert other != half


def test_a_run_says_what_it_really_reads(settings_of) -> None:
    dataset = Dataset(settings_of("parquet tokens", subset=0.5, packing="best_fit"))
    source = dataset.sources[0]
    (line,) = dataset.describe()
    assert f"{source.sizes.num_tokens:,} tokens to train on in {source.sizes.num_documents:,} documents" in line
    assert f"of {source.whole.num_tokens:,} (data.subset=0.5)" in line
    assert "best-fit packing fills 86.43% of all places" in line


def test_identity_names_what_changed(settings_of, mixed) -> None:
    config = settings_of("parquet tokens")
    before = Dataset(config).identity(seed=1)
    changes = {
        "data.seq_length": replace(config, seq_length=SEQ + 1),
        "data.packing": replace(config, packing="best_fit"),
        "data.subset": replace(config, subset=0.5),
        "data.corpus": settings_of("megatron"),
    }
    for name, changed in changes.items():
        after = Dataset(changed).identity(seed=1)
        assert name in {key for key in before if before[key] != after[key]}, name
    assert [key for key, value in Dataset(config).identity(seed=2).items() if value != before[key]] == ["seed"]
    one = Dataset(mixed()).identity(seed=1)
    two = Dataset(replace(mixed(), stages=())).identity(seed=1)
    assert [key for key in one if one[key] != two[key]] == ["data.sources (weights)"]


def test_cursors_count_what_each_source_has_given(mixed) -> None:
    dataset = Dataset(mixed())
    stream = dataset.train_stream(seed=3)
    cursors = dataset.cursors(25, stream)
    # 25 samples of 0.5, 0.3 and 0.2: the exact shares, rounded one after the other.
    assert [cursor["samples"] for cursor in cursors.values()] == [12, 7, 6]
    assert sum(cursor["samples"] for cursor in dataset.cursors(1000, stream).values()) == 1000
    assert [c["epoch"] for c in dataset.cursors(10**9, stream).values()][1] == 0  # weight 0 after 25 samples
    stream.close()


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


def test_without_held_out_text_a_run_is_refused(settings_of) -> None:
    dataset = Dataset(settings_of("parquet tokens", heldout_fraction=0.0))
    with pytest.raises(CorpusError, match=r"all held-out text \(0 tokens.*data\.heldout_fraction=0\.0"):
        dataset.check()


def test_sources_with_different_tokenizers_are_refused(mixed, tmp_path: Path) -> None:
    train_bpe(TEXTS, 300, progress=False).save(tmp_path / "tokenizer.json")
    with pytest.raises(CorpusError, match="have different tokenizers"):
        Dataset(mixed(tokenizer=str(tmp_path / "tokenizer.json")))
    config = replace(mixed(), tokenizer="")  # the prepared corpus brings the one that the others are read with
    assert Dataset(config).identity(0) == Dataset(mixed()).identity(0)
    with pytest.raises(CorpusError, match=r"data\.tokenizer must be given: .*tokens\.parquet"):
        Dataset(replace(config, sources=(), stages=(), corpus=config.sources[1][0]))
