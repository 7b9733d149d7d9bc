"""A small corpus and a small model whose losses at a step do not depend on how many steps there are to be."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from data.config import PrepareConfig
from data.prepare.prepare import prepare

ROOT = Path(__file__).parents[2]
LOSSES = ("loss", "lm_loss", "mtp_loss/1", "mtp_loss/2", "balance_loss", "z_loss", "grad_norm")
SMALL = (
    "run.log_every=1",
    "run.eval_samples=2",
    "run.eval_prompts=0",
    "data.seq_length=48",
    "batch.global=8",
    "batch.micro=2",
    "model.hidden_size=32",
    "model.pattern=GE*E",
    "wandb.mode=disabled",
    "optim.warmup_steps=0",
    "optim.lr=4e-3",
    "optim.min_lr=4e-3",
)


def small_corpus(root: Path) -> str:
    """Counting, in words."""
    words = ["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    texts = [" ".join(words[int(digit)] for digit in str(number)) for number in range(0, 6000, 7)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text * 5}) + "\n" for text in texts))
    output = str(root / "corpus")
    return prepare(
        PrepareConfig(
            input=str(root / "texts.jsonl"), output=output, vocab_size=300, shard_tokens=4000, heldout_fraction=0.2
        )
    )


class Runs:
    """Runs of one directory on the small corpus."""

    def __init__(self, directory: Path, corpus: str) -> None:
        self.directory, self.corpus = directory, corpus

    def line(self, name: str, *changes: str) -> list[str]:
        """The arguments of train."""
        return [
            "train",
            *SMALL,
            f"run.dir={self.directory}",
            f"run.name={name}",
            f"data.corpus={self.corpus}",
            *changes,
        ]

    def train(self, name: str, *changes: str, processes: int) -> None:
        """Trains a run undisturbed on this machine."""
        environment = os.environ | {"NPROC": str(processes), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "train", *self.line(name, *changes)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def losses(self, name: str) -> list[list[float]]:
        """Of each logged step."""
        return [[entry[key] for key in LOSSES] for entry in self._entries(name)]

    def steps(self, name: str) -> int:
        """How many steps are logged so far."""
        return len(list(self._entries(name)))

    def _entries(self, name: str) -> Iterator[dict]:
        file = self.directory / name / "metrics.jsonl"
        for line in file.read_text().splitlines() if file.exists() else []:
            if line.endswith("}"):
                yield json.loads(line)
