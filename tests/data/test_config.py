"""Settings that cannot work are refused by name, before any work."""

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest

from data.config import DataConfig, PrepareConfig
from data.dataset import check_data
from data.errors import CorpusError
from data.prepare.check import check_prepare
from data.read.corpus import Corpus


def test_defaults_and_a_prepared_corpus_pass(corpus: Corpus, tmp_path: Path) -> None:
    check_data(DataConfig(cache=str(tmp_path / "not" / "yet")), mtp_steps=2)
    assert not (tmp_path / "not").exists()
    check_data(DataConfig(corpus=str(corpus.path), seq_length=4), mtp_steps=2)


@pytest.mark.parametrize(("seq_length", "mtp_steps"), [(1, 0), (3, 2), (-5, 0)])
def test_sequence_without_a_target_for_every_step(seq_length: int, mtp_steps: int) -> None:
    with pytest.raises(CorpusError, match=rf"data\.seq_length={seq_length} .*use {mtp_steps + 2} or more"):
        check_data(DataConfig(seq_length=seq_length), mtp_steps)
    check_data(DataConfig(seq_length=mtp_steps + 2), mtp_steps)


def test_vocabulary_too_small_for_bytes() -> None:
    with pytest.raises(CorpusError, match=r"data\.vocab_size=256 .*use 257"):
        check_data(DataConfig(vocab_size=256), 0)
    check_data(DataConfig(vocab_size=257), 0)


def test_cache_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorpusError, match=r"data\.cache=.* cannot be written: .*file.*: Not a directory"):
        check_data(DataConfig(cache=str(tmp_path / "file" / "cache")), 0)


def test_corpus_path_is_checked(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data\.corpus=.*nowhere does not exist"):
        check_data(DataConfig(corpus=str(tmp_path / "nowhere")), 0)
    (corpus.path / "train-00000-00001.parquet").unlink()
    with pytest.raises(CorpusError, match=r"train-00000-00001\.parquet is missing"):
        check_data(DataConfig(corpus=str(corpus.path)), 0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("input", ""),
        ("output", ""),
        ("vocab_size", 256),
        ("train_bytes", 0),
        ("eod_token", "</s>"),
        ("sample_by", "word"),
        ("shard_tokens", 0),
        ("shard_tokens", 2**31),
        ("heldout_fraction", -0.1),
        ("heldout_fraction", 1.0),
    ],
)
def test_prepare_settings_out_of_range_are_named(setting: str, value: object) -> None:
    good = PrepareConfig(input="embedded", output="out")
    check_prepare(good)
    with pytest.raises(CorpusError, match=f"^{setting}='?{value}") as error:
        check_prepare(dataclasses.replace(good, **{setting: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [DataConfig, PrepareConfig])
def test_every_field_explains_itself(config: type) -> None:
    for name, annotation in get_type_hints(config, include_extras=True).items():
        assert len(annotation.__metadata__[0]) > 10, name
