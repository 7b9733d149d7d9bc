"""A slice of the 80B model at its full width is exported and imported in less memory than two copies of it.

Slow: it writes three copies of 7.7 GB. It shows that neither command ever holds the model.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.hf import pieces as hf
from parallel.checkpoint import stored
from tests.train.hf_runs import make_corpus, make_run
from train.job.shelf import Shelf, write_state

ROOT = Path(__file__).parents[2]
SLICE = ModelConfig(
    pattern="GE*E",
    vocab_size=151936,
    hidden_size=2048,
    attention_heads=16,
    key_value_heads=2,
    head_dim=256,
    linear_key_heads=16,
    linear_value_heads=32,
    linear_key_dim=128,
    linear_value_dim=128,
    experts=512,
    experts_per_token=10,
    expert_size=512,
    shared_expert_size=512,
    dtype="bfloat16",
)


def numbers(piece: hf.Piece) -> torch.Tensor:
    """Numbers that repeat, since drawing 4 G of them would take minutes."""
    dtype = torch.float32 if piece.float32 else torch.bfloat16
    drawn = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(len(piece.ours))).to(dtype)
    count = math.prod(piece.whole)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(piece.whole)


def peak_bytes(*arguments: str) -> int:
    """Most memory that a command had at once."""
    process = subprocess.Popen([sys.executable, "-m", "train", *arguments], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_slice_of_80b(tmp_path: Path) -> None:
    run = make_run(tmp_path, "slice", SLICE, make_corpus(tmp_path), mtp=0)
    pieces = list(hf.pieces(SLICE, mtp=False, stacked=lambda layer: False))
    path = Shelf(run.run.checkpoints).path(1)
    path.mkdir(parents=True)
    chunks = [
        stored.StoredSlice(
            piece.ours,
            piece.whole,
            0,
            piece.whole,
            torch.float32 if piece.float32 else torch.bfloat16,
            lambda piece=piece: numbers(piece),
        )
        for piece in pieces
    ]
    stored.write_checkpoint(path, chunks)
    write_state(path, 1, {}, {})
    size = sum(math.prod(chunk.whole) * chunk.dtype.itemsize for chunk in chunks)
    place = f"run.dir={tmp_path}"
    exporting = peak_bytes("export", "run=slice", place, f"out={tmp_path}/out")
    importing = peak_bytes("import", f"hf={tmp_path}/out", "run=back", place)
    print(f"{size / 1e9:.2f} GB of weights: export peaked at {exporting / 1e9:.2f} GB, import {importing / 1e9:.2f} GB")
    assert size > 7e9
    assert max(exporting, importing) < 2 * size
    back = stored.StoredTensors(Shelf(tmp_path / "back" / "checkpoints").path(0))
    for piece in pieces:
        assert torch.equal(back.read(piece.ours), numbers(piece)), piece.ours
