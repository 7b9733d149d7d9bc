"""Which files of a folder are trained on: what `datasets` and its hub mean by the way they lie."""

import json
from pathlib import Path

import datasets
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from data.errors import CorpusError
from data.read.endings import ROW_ENDINGS
from data.read.listing import list_files, splits_of

LAYOUTS = [
    ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
    ["data/train-00000-of-00001.parquet", "data/random-00000-of-00001-ab12.parquet", "other.parquet"],
    ["train.jsonl", "valid.jsonl", "test_0.jsonl"],
    ["my-train-file.jsonl", "my_dev.jsonl", "eval-1.jsonl", "latest.jsonl", "trainer.jsonl"],
    ["train/a.jsonl", "testing/b.jsonl", "rest/c.jsonl"],
    ["en/train/a.jsonl", "en/my-validation/b.jsonl", "test.jsonl"],
    ["dev 2/a.jsonl", "2-train/b.jsonl"],
    ["a.jsonl", "b/c.jsonl"],
    ["training/test.jsonl", "training/x.jsonl"],
]


def write_all(root: Path, names: list[str], text: str = '{"text": "a"}\n') -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def names_of(root: Path, **settings: str) -> list[str]:
    return [str(Path(file.path).relative_to(root)) for file in list_files(str(root), ROW_ENDINGS, **settings).files]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_files_are_of_the_splits_that_datasets_finds(tmp_path: Path, names: list[str]) -> None:
    root = write_all(tmp_path / "it", names)
    found = DataFilesDict.from_patterns(get_data_patterns(str(root)), base_path=str(root))
    expected = {split: {str(Path(file).relative_to(root)) for file in files} for split, files in found.items()}
    assert splits_of(names) == expected


def test_the_train_split_is_read_and_the_rest_is_said(tmp_path: Path) -> None:
    write_all(tmp_path, LAYOUTS[0])
    listing = list_files(str(tmp_path), ROW_ENDINGS)
    assert names_of(tmp_path) == LAYOUTS[0][:2]
    assert listing.left_out == ("split test: data/test-00000-of-00001.parquet",)
    assert names_of(tmp_path, split="test") == LAYOUTS[0][2:]
    with pytest.raises(CorpusError, match=r"data\.corpus=.* has no split validation: it has test, train"):
        names_of(tmp_path, split="validation")


def test_a_file_and_a_pattern_are_what_they_say(tmp_path: Path) -> None:
    write_all(tmp_path, ["test.jsonl", "train.jsonl"])
    assert [Path(f.path).name for f in list_files(str(tmp_path / "test.jsonl"), ROW_ENDINGS).files] == ["test.jsonl"]
    assert len(list_files(f"{tmp_path}/t*.jsonl", ROW_ENDINGS).files) == 2


def test_files_that_other_programs_put_beside_data(tmp_path: Path) -> None:
    names = ["dataset_infos.json", "README.md", ".cache/x.jsonl", "__pycache__/y.jsonl", "a.jsonl", "sub/state.json"]
    write_all(tmp_path, names)
    assert names_of(tmp_path) == ["a.jsonl"]


def test_a_saved_dataset_is_what_its_state_names(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path))
    datasets.load_from_disk(str(tmp_path)).map(lambda row: {"text": row["text"].upper()})
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    listing = list_files(str(tmp_path), ROW_ENDINGS)
    assert [Path(file.path).name for file in listing.files] == ["data-00000-of-00001.arrow"]
    assert listing.left_out[0].startswith("not named in state.json: cache-")
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(CorpusError, match=r"state\.json names data-00000-of-00001\.arrow, which is missing"):
        names_of(tmp_path)


def test_a_saved_dict_of_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    # Names that say nothing: the list of splits decides.
    datasets.DatasetDict({"train": one, "heldback": one}).save_to_disk(str(tmp_path))
    assert names_of(tmp_path) == ["train/data-00000-of-00001.arrow"]
    assert names_of(tmp_path, split="heldback") == ["heldback/data-00000-of-00001.arrow"]
    assert list_files(str(tmp_path), ROW_ENDINGS).left_out == ("split heldback: heldback/data-00000-of-00001.arrow",)


def test_shards_of_prepare_are_never_read_as_plain_files(tmp_path: Path) -> None:
    names = ["mine/train-00000-00000.parquet", "mine/heldout-00000-00000.parquet", "mine/tokenizer.json"]
    write_all(tmp_path, names)
    for path in (tmp_path, tmp_path / "mine", f"{tmp_path}/mine/*.parquet"):
        with pytest.raises(CorpusError, match=r"holds shards of a corpus made by prepare .* not its manifest\.json"):
            list_files(str(path), ROW_ENDINGS)
    (tmp_path / "mine/manifest.json").write_text(json.dumps({}))
    with pytest.raises(CorpusError, match=r"holds corpora made by prepare \(mine\): give the directory of one"):
        list_files(str(tmp_path), ROW_ENDINGS)
