"""Every recipe composes, fits its machines and stays short; the large one has its model's published numbers."""

import re
from pathlib import Path

import pytest

from model.config import check_kernels, check_model
from parallel.topology import microbatches, resolve
from train import usage
from train.__main__ import compose, run
from train.job.footprint import footprint, planned_vocab
from train.job.gpus import GPUS
from train.settings.run import Config

# Arguments that a recipe cannot do without, the processes that it is made for, and over how many its experts go.
CORPUS = ["data.corpus=corpora/mine"]
NEEDS = {
    "qwen3_next_80b_a3b": (CORPUS, 64, 64),
    "qwen3_next_80b_a3b_256k": ([*CORPUS, "run.dry_run=true"], 64, 64),
    "qwen3_30b_a3b": (CORPUS, 64, 64),
    "qwen3_32b": (CORPUS, 64, 1),
    "proxy": ([], 1, 1),
    "qwen3_5_0_8b": (CORPUS, 1, 1),
    "qwen3_5_2b": (CORPUS, 1, 1),
    "qwen3_5_4b": (CORPUS, 8, 1),
    "qwen3_5_9b": (CORPUS, 8, 1),
    "qwen3_5_35b_a3b": (CORPUS, 16, 8),
    "qwen3_5_122b_a10b": (CORPUS, 128, 8),
    "qwen3_coder_next": (CORPUS, 64, 8),
    "small_1gpu": ([], 1, 1),
    "lab/hybrid": ([], 1, 1),
    "medium_8gpu": ([], 8, 8),
    "large_64gpu": ([], 64, 8),
    "qwen3_next_80b_a3b_512gpu": ([], 512, 8),
}
RECIPE_FILES = sorted(usage.RECIPES.rglob("*.yaml"))


def composed(recipe: str) -> tuple[Config, int, int]:
    arguments, processes, expert = NEEDS.get(recipe, ([], 2, 2))
    return compose(["-cn", recipe, *arguments]), processes, expert


@pytest.mark.parametrize("recipe", usage.recipes())
def test_a_recipe_composes_and_fits_its_processes(recipe):
    config, processes, expert = composed(recipe)
    assert config.run.name == Path(recipe).name
    check_model(config.model, config.mtp)
    topology = resolve(config.parallel, config.model, processes)
    assert topology.expert == expert
    assert microbatches(topology, config.batch.global_, config.batch.micro) >= 1
    assert config.optim.warmup_steps < config.run.steps


# What a sampled step costs of a step (bench/RESULTS.md): measured on a GPU; on a CPU four times what was measured.
ON_GPU, ON_CPU = 1.34, 0.24


@pytest.mark.parametrize("recipe", usage.recipes())
def test_gauges_cost_a_recipe_less_than_one_percent(recipe: str):
    every = composed(recipe)[0].run.detail_every
    assert (ON_GPU if recipe in NEEDS else ON_CPU) / every < 0.01


@pytest.mark.parametrize("recipe", usage.recipes())
def test_a_recipe_builds_on_meta_as_its_estimate_says(recipe: str, capsys: pytest.CaptureFixture[str]):
    from train.plan.dry_run import dry_run  # imports megatron-core, which the rest of this file does without

    config, processes, _ = composed(recipe)
    topology = resolve(config.parallel, config.model, processes)
    vocab_size = planned_vocab(config, topology)
    formula = footprint(config, topology, vocab_size, pipeline_rank=0).parameters
    assert f"; {formula:,} parameters\n" in dry_run(config, topology)
    arguments = [argument for argument in NEEDS.get(recipe, ([],))[0] if argument not in CORPUS]
    assert run(["estimate", "-cn", recipe, *arguments]) == 0
    assert re.search(r"^  [\d,.]+ GPU-hours; ", capsys.readouterr().out, re.MULTILINE)


def test_80b_fits_512_h100s_with_experts_inside_each_node_as_estimate_and_dry_run_say():
    """Its experts' gradients and optimizer are shared by the holders of the same experts, one in each of 16 nodes."""
    from train.plan.dry_run import dry_run

    config, processes, expert = composed("qwen3_next_80b_a3b_512gpu")
    topology = resolve(config.parallel, config.model, processes)
    assert topology.expert_owners == expert == 8 and topology.expert_replicas == 16
    vocab_size, room = planned_vocab(config, topology), 0.9 * GPUS["H100"].memory
    check_kernels(config.model, topology)
    for stage, rank in ((0, 0), (3, 511)):
        built = dry_run(config, topology, rank)
        held = dict(re.findall(r"^  ([a-z ]+?) +([\d.]+) GiB$", built[: built.index("a GPU sends")], re.MULTILINE))
        assert 0.5 * room < float(held["total"]) * 2**30 < room
        formula = footprint(config, topology, vocab_size, stage).memory
        # By the formula rows of different widths share a buffer evenly; what is built pads them and cuts where it can.
        for part in ("weights", "gradients", "optimizer"):
            assert float(held[part]) * 2**30 == pytest.approx(formula[part], rel=0.02), part
        # The moments and the copies of 12 bytes would take 40 GB, were they not shared by 16 nodes.
        assert float(held["optimizer"]) < 3


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.relative_to(usage.RECIPES).as_posix())
def test_a_recipe_file_is_short_and_says_what_it_is(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in usage.groups().items() for name in names])
def test_every_choice_of_a_group_composes(choice):
    assert compose([choice, "data.corpus=embedded"]).run.name == "tiny"


def test_the_default_is_tiny():
    config = compose([])
    assert config == compose(["-cn", "tiny"])
    assert (config.model.layers, config.model.experts, config.model.experts_per_token) == ("GEGEGE*E", 16, 4)
    # What a serving engine's CPU kernels need of the tiny model.
    assert config.model.head_dim >= 32
    assert (config.model.linear_key_dim, config.model.linear_value_dim) == (64, 64)


def test_tiny_512e_is_tiny_with_qwen3_nexts_experts():
    model, tiny = compose(["-cn", "tiny_512e"]).model, compose([]).model
    assert (model.experts, model.experts_per_token) == (512, 10)
    assert (model.pattern, model.hidden_size, model.head_dim) == (tiny.pattern, tiny.hidden_size, tiny.head_dim)


def test_qwen3_next_80b_a3b_has_the_published_numbers():
    """config.json of Qwen3-Next-80B-A3B; a block there is a token mixer and a mixture of experts: two layers here."""
    config, *_ = composed("qwen3_next_80b_a3b")
    model = config.model
    assert model.layers == "GEGEGE*E" * 12  # 48 blocks, every 4th with full attention
    assert (model.hidden_size, model.vocab_size) == (2048, 151936)
    assert (model.attention_heads, model.key_value_heads, model.head_dim) == (16, 2, 256)
    assert (model.rotary_fraction, model.rope_base) == (0.25, 1e7)
    assert (model.linear_key_heads, model.linear_value_heads) == (16, 32)
    assert (model.linear_key_dim, model.linear_value_dim, model.conv_kernel) == (128, 128, 4)
    assert (model.experts, model.experts_per_token, model.expert_size) == (512, 10, 512)
    assert model.shared_expert_size == 512
    assert (model.norm_eps, model.init_std, config.balance.weight) == (1e-6, 0.02, 1e-3)
    assert model.dtype == "bfloat16"
    assert config.mtp.steps == 1
    assert config.parallel.expert == 64
    assert config.data.seq_length == 4096


LADDER = {  # (GPU of the estimate, share of its peak): tokens, GPU-hours, memory that README of recipes/ states
    "small_1gpu": "estimate.gpu=H100 estimate.mfu=0.2",
    "medium_8gpu": "estimate.gpu=H100 estimate.mfu=0.3",
    "large_64gpu": "estimate.gpu=H100 estimate.mfu=0.3",
    "qwen3_next_80b_a3b_512gpu": "estimate.gpu=H100 estimate.mfu=0.3",
    "qwen3_5_0_8b": "estimate.gpu=H100 estimate.mfu=0.3",
    "qwen3_5_2b": "estimate.gpu=H100 estimate.mfu=0.3",
    "qwen3_5_4b": "estimate.gpu=H200 estimate.mfu=0.3",
    "qwen3_5_9b": "estimate.gpu=H100 estimate.mfu=0.3",
    "qwen3_5_35b_a3b": "estimate.gpu=H100 estimate.mfu=0.3",
    "qwen3_5_122b_a10b": "estimate.gpu=H200 estimate.mfu=0.3",
    "qwen3_coder_next": "estimate.gpu=H200 estimate.mfu=0.3",
}


@pytest.mark.parametrize("recipe", LADDER)
def test_the_ladder_of_machines_states_its_estimates(recipe: str, capsys: pytest.CaptureFixture[str]):
    assert run(["estimate", "-cn", recipe, *LADDER[recipe].split()]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  fits: ", text, re.MULTILINE)
    row = next(line for line in (usage.RECIPES / "README.md").read_text().splitlines() if f"| `{recipe}` |" in line)
    tokens, hours = re.search(r"^([\d.e+]+) tokens on", text, re.MULTILINE), re.search(r"  ([\d,.]+) GPU-hours", text)
    memory = re.search(r"recompute \w+\n(?:.*\n)+?  total +([\d.]+) GiB", text)
    number, scale = re.search(r"([\d.]+) ([BT]) tokens", row).groups()
    assert float(tokens[1]) == pytest.approx(float(number) * {"B": 1e9, "T": 1e12}[scale], rel=0.01)
    assert f"{hours[1]} GPU-hours" in row and f"{float(memory[1]):.0f} GiB" in row
    assert f"launch.sh train -cn {recipe}`" in row
    header = (usage.RECIPES / f"{recipe}.yaml").read_text().splitlines()[1]
    assert f"launch.sh train -cn {recipe}; " in header and f" {hours[1]} H" in header
    assert f" {float(memory[1]):.0f} GiB" in header


def test_qwen3_32b_has_the_published_numbers():
    """Tables 1 and 2 of the Qwen3 technical report, and config.json of Qwen3-32B."""
    config, *_ = composed("qwen3_32b")
    model = config.model
    assert model.layers == "*-" * 64
    assert (model.hidden_size, model.vocab_size, model.dense_size) == (5120, 151936, 25600)
    assert (model.attention_heads, model.key_value_heads, model.head_dim) == (64, 8, 128)
    assert (model.rotary_fraction, model.rope_base, model.attention_gate) == (1.0, 1e6, False)
    assert config.mtp.steps == 0


def test_qwen3_30b_a3b_has_the_published_numbers():
    """Tables 1 and 2 of the Qwen3 technical report, and config.json of Qwen3-30B-A3B."""
    config, *_ = composed("qwen3_30b_a3b")
    model = config.model
    assert model.layers == "*E" * 48
    assert (model.hidden_size, model.vocab_size) == (2048, 151936)
    assert (model.attention_heads, model.key_value_heads, model.head_dim) == (32, 4, 128)
    assert (model.experts, model.experts_per_token, model.expert_size) == (128, 8, 768)
    assert (model.rotary_fraction, model.rope_base, model.attention_gate) == (1.0, 1e6, False)
    assert model.shared_expert_size == config.mtp.steps == 0


@pytest.mark.parametrize(
    ("recipe", "published"), [("qwen3_next_80b_a3b", 15e12), ("qwen3_32b", 36e12), ("qwen3_30b_a3b", 36e12)]
)
def test_a_large_recipe_trains_on_the_published_number_of_tokens(recipe: str, published: float):
    config, *_ = composed(recipe)
    tokens = config.run.steps * config.batch.global_ * config.data.seq_length
    assert published <= tokens < published + config.batch.global_ * config.data.seq_length
