"""The run that a campaign trains: small, and every kind of state in it."""

import json
from dataclasses import replace
from pathlib import Path

from data.config import DataConfig, PrepareConfig
from data.prepare.prepare import prepare
from model.config import BalanceConfig, ModelConfig, MtpConfig
from parallel.topology import ParallelConfig
from train.settings.optim import OptimConfig
from train.settings.run import BatchConfig, Config, RunConfig, WandbConfig

STEPS, SAVE_EVERY, VOCAB_SIZE = 12, 3, 300
WORDS = ("nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODEL = ModelConfig(
    pattern="GE*E",
    hidden_size=32,
    attention_heads=2,
    key_value_heads=1,
    head_dim=16,
    linear_key_heads=1,
    linear_value_heads=2,
    linear_key_dim=16,
    linear_value_dim=16,
    experts=4,
    experts_per_token=2,
    expert_size=16,
    shared_expert_size=16,
)


def make_corpus(root: Path) -> Path:
    """Counting, in words, in several shards."""
    texts = [" ".join(WORDS[int(digit)] for digit in str(number)) for number in range(0, 3000, 7)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text * 5}) + "\n" for text in texts))
    return prepare(
        PrepareConfig(
            input=str(root / "texts.jsonl"),
            output=str(root / "corpus"),
            vocab_size=VOCAB_SIZE,
            shard_tokens=4000,
            heldout_fraction=0.2,
            processes=1,
        )
    )


def campaign_config(root: Path, name: str, corpus: Path, **changes: object) -> Config:
    """Settings of a run of the campaign; ``changes`` by section, as dictionaries."""
    config = Config(
        run=RunConfig(
            name=name,
            dir=str(root),
            steps=STEPS,
            save_every=SAVE_EVERY,
            eval_every=2 * SAVE_EVERY,
            log_every=1,
            eval_samples=4,
            eval_prompts=0,
            start_timeout=1.0,
            step_timeout=0.2,
        ),
        data=DataConfig(corpus=str(corpus), seq_length=32),
        batch=BatchConfig(global_=8, micro=2),
        model=MODEL,
        mtp=MtpConfig(steps=1),
        balance=BalanceConfig(weight=0.01),
        parallel=ParallelConfig(expert=2),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        wandb=WandbConfig(mode="disabled"),
    )
    sections = {section: replace(getattr(config, section), **values) for section, values in changes.items()}
    config = replace(config, **sections)
    config.run.path.mkdir(parents=True, exist_ok=True)
    return config
