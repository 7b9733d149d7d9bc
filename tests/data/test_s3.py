"""prepare and training over S3 itself: a server of its protocol on loopback, slow and only where moto is installed."""

import json
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from data.config import DataConfig, PrepareConfig
from data.dataset import Dataset
from data.prepare.join import join_parts
from data.prepare.prepare import prepare
from data.read.corpus import Corpus
from tests.data.conftest import text_of

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket of a server that lives as long as the test."""
    server_of = pytest.importorskip("moto.server", reason="needs pip install 'moto[server,s3]'")
    s3fs = pytest.importorskip("s3fs", reason="needs ./launch.sh setup s3")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    # Another test's server in this process has left its buckets behind.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_corpus_is_made_in_parts_and_read(bucket: str, tmp_path: Path, tokenizer_file: Path) -> None:
    import s3fs

    rows = [json.dumps({"text": text_of(number)}) + "\n" for number in range(120)]
    local = tmp_path / "in"
    local.mkdir()
    for number in range(3):
        (local / f"{number}.jsonl").write_text("".join(rows[40 * number : 40 * number + 40]))
        s3fs.S3FileSystem().put_file(str(local / f"{number}.jsonl"), f"bucket/raw/{number}.jsonl")
    config = PrepareConfig(
        input=str(local),
        output=str(tmp_path / "local"),
        tokenizer=str(tokenizer_file),
        heldout_fraction=0.2,
        piece_bytes=3000,
        shard_tokens=500,
    )
    prepare(config)
    remote = replace(config, input=f"{bucket}/raw", output=f"{bucket}/made")
    for part in ("1/2", "2/2"):
        prepare(replace(remote, part=part, processes=2))
    join_parts(remote.output)
    assert Corpus.open(remote.output).fingerprint == Corpus.open(config.output).fingerprint
    data = DataConfig(corpus=remote.output, seq_length=16, cache=str(tmp_path / "cache"))
    found, expected = (Dataset(replace(data, corpus=path)).train_stream(0) for path in (remote.output, config.output))
    for index in range(20):
        assert (found.sample(index).tokens == expected.sample(index).tokens).all()
    raw = replace(data, corpus=f"{bucket}/raw/*.jsonl", tokenizer=str(tokenizer_file), heldout_fraction=0.0)
    assert Dataset(raw).sources[0].sizes.num_documents == 120
