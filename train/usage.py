"""The help texts, made from the settings themselves and from the files in recipes/."""

import textwrap
from functools import cache
from itertools import groupby
from pathlib import Path

from data.config import PrepareConfig
from train.hub.settings import ExportConfig, ImportConfig
from train.plan.estimate import EstimateConfig
from train.settings.commands import (
    BenchConfig,
    DashboardConfig,
    DryRunConfig,
    EvaluateConfig,
    GenerateConfig,
    ReportConfig,
    StatusConfig,
)
from train.settings.run import Config
from train.settings.tree import MISSING, Setting, settings

RECIPES = Path(__file__).parent.parent / "recipes"
COLUMNS = 118
FOUNDATION = "base"  # what every recipe starts from; not a recipe itself

SUMMARIES = {
    "train": "Trains a recipe. Training again under the same run.name resumes that run.",
    "estimate": "Says what a recipe would cost: parameters, operations, memory of a GPU, GPU-hours and money.",
    "prepare": "Turns raw text into a corpus: tokenized shards, a tokenizer and a manifest.",
    "evaluate": "Measures a run's last checkpoint on held-out text.",
    "generate": "Writes text with a run's last checkpoint.",
    "status": "Says how a run is: step, speed, last checkpoint, health, time left.",
    "report": "Writes one HTML page of a run, or of several beside each other, that needs nothing else.",
    "dashboard": "Publishes the same sections and panels as a view of a W&B project.",
    "export": "Writes a run's weights as a Hugging Face checkpoint, for transformers, vLLM and SGLang.",
    "import": "Makes a run of a Hugging Face checkpoint, for others to start from: train run.init=NAME.",
    "bench": "Times forward and backward passes on GPUs, where their time goes, and others'.",
    "doctor": "Says what this machine is, and checks every kernel of a recipe's model against its twin.",
}
EXAMPLES = {
    "train": (
        ("train", "the default recipe: tiny"),
        ("train -cn tiny_512e run.steps=5", "another recipe, one setting changed"),
        ("train run.name=mine seed=1 optim=wsd", "a named run, another group choice"),
        ("train data.corpus=corpora/mine", "on a corpus made by prepare"),
        ("train engine=deepspeed deepspeed.offload=true", "DeepSpeed's ZeRO, AdamW on the CPU"),
        ("train -m seed=1,2,3 optim.lr=1e-3,2e-3", "six runs: a sweep"),
        ("train -cn qwen3_next_80b_a3b run.dry_run=true parallel.world=512", "what one GPU of 512 would hold"),
    ),
    "estimate": (
        ("estimate -cn qwen3_next_80b_a3b", "the recipe on the GPUs that it is made for"),
        ("estimate -cn qwen3_32b parallel.tensor=4 estimate.price=2", "another layout, with money"),
        ("estimate -cn qwen3_next_80b_a3b estimate.compare=true", "beside Qwen3-32B and Qwen3-30B-A3B"),
        ("estimate -cn qwen3_next_80b_a3b estimate.propose=5", "the fastest layouts for as many GPUs"),
    ),
    "prepare": (
        ("prepare input=texts/ output=corpora/mine", "a directory; given again it goes on"),
        ("prepare input=web/ output=s3://b/web tokenizer=t.json part=3/64", "one of 64 machines"),
        ("prepare --join s3://b/web", "makes a corpus of the parts"),
        ("prepare --check corpora/mine", "proves every file and token"),
        ("prepare --repair corpora/mine", "makes damaged files again"),
        (
            "prepare --index -cn tiny data.corpus=corpora/mine",
            "counts ahead what a run will read",
        ),
    ),
    "evaluate": (
        ("evaluate run=mine samples=256", "more held-out text than while training"),
        ("evaluate run=mine draft=3 prompts=200", "what drafts of three tokens are worth"),
        ("evaluate run=mine data.corpus=corpora/other", "on another corpus of the same tokenizer"),
    ),
    "generate": (
        ("generate run=mine prompt='def main('", "the likeliest continuation"),
        ("generate run=mine temperature=0.8 seed=2", "a sampled one"),
        ("generate run=mine prompt_file=prompt.txt", "of a file's text"),
        ("generate run=mine draft=2", "with drafts from the MTP layer: the same text in fewer passes"),
    ),
    "status": (("status run=mine", "from another terminal, whether it runs or not"),),
    "report": (
        ("report run=mine", "runs/mine/report.html, to open in a browser, whether the run runs or not"),
        ("report run=[mine,other]", "both in each figure, and the settings in which they differ"),
        ("report run=mine output=mine.html", "another file"),
    ),
    "dashboard": (
        ("dashboard run=mine", "a view of the project that the run is filed under; wants your key"),
        ("dashboard run=mine output=view.json", "what would be published, without an account"),
    ),
    "export": (
        ("export run=mine out=models/mine", "the last checkpoint, as it was trained"),
        ("export run=mine out=models/mine dtype=bfloat16", "in half the room"),
    ),
    "import": (
        ("import hf=models/theirs run=theirs", "as runs/theirs"),
        ("train run.init=theirs run.name=further data.corpus=corpora/mine", "trains on from its weights"),
    ),
    "bench": (
        ("bench", "the recipe tiny, in minutes on a CPU"),
        ("bench -cn proxy", "four real-width blocks on a GPU, beside others"),
        ("bench -cn proxy 'bench.also=[\"model.repeats=3\"]'", "then twelve blocks"),
        ("bench -cn proxy parallel.expert=2", "its experts over two GPUs"),
    ),
    "doctor": (
        ("doctor", "the kernels of the recipe tiny"),
        ("doctor -cn proxy", "those of the real widths"),
    ),
}
OPTIONS = {
    "-cn, --config-name X": "recipe: a name, or a path to a file of yours (mine/x.yaml)",
    "-cd, --config-dir X": "folder with recipes and groups of yours, looked into before recipes/",
    "-m, --multirun": "key=a,b: once for each combination, one after the other; as a Slurm array one a job",
    "-c, --cfg job": "shows what the recipe and the settings come to, and ends",
}
CONFIGS = {
    "train": DryRunConfig,
    "estimate": EstimateConfig,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "status": StatusConfig,
    "report": ReportConfig,
    "dashboard": DashboardConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "bench": BenchConfig,
    "doctor": Config,
}
SECTIONS = {setting.path.partition(".")[0] for setting in settings(Config) if "." in setting.path}
ANYWHERE = ("evaluate", "generate")  # which take parallel.* and data.* in place of the run's
WITH_RECIPE = ("train", "estimate", "bench", "doctor")


@cache
def recipes(folder: Path = RECIPES) -> list[str]:
    """Names that -cn takes: files of the folder and of its sub-folders, but for choices of groups."""
    files = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml")]
    return sorted(str(path) for path in files if str(path) != FOUNDATION and path.parts[0] not in SECTIONS)


@cache
def groups(folders: tuple[Path, ...] = (RECIPES,)) -> dict[str, list[str]]:
    """Choices of each group of settings, as in ``model=tiny``, over all folders."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/*.yaml")):
        if path.parent.name in SECTIONS:
            found.setdefault(path.parent.name, []).append(path.stem)
    return found


def overview() -> str:
    """Help without a command."""
    width = max(map(len, SUMMARIES))
    lines = ["usage: ./launch.sh COMMAND [-cn RECIPE] [key=value ...]", ""]
    lines += [f"  {command:<{width}}  {summary}" for command, summary in SUMMARIES.items()]
    return "\n".join([*lines, "", "./launch.sh COMMAND --help shows a command's settings and examples."])


def command_help(command: str) -> str:
    """Everything that a command takes."""
    options = "[-cn RECIPE] [-cd DIR] [-m] [--cfg job] [key=value ...]" if command in WITH_RECIPE else "[key=value ...]"
    lines = [SUMMARIES[command], "", f"usage: ./launch.sh {command} {options}", "", "examples:"]
    width = max(len(example) for example, _ in EXAMPLES[command])
    lines += [f"  ./launch.sh {example:<{width}}  {text}" for example, text in EXAMPLES[command]]
    if command in WITH_RECIPE:
        lines += ["", "options:", *(line for option, text in OPTIONS.items() for line in _entry(option, text, 20))]
    if command == "train":
        lines += ["", "recipes (-cn), files of recipes/:"]
        width = max(map(len, recipes()))
        for recipe in recipes():
            lines += _entry(recipe, _first_comment(RECIPES / f"{recipe}.yaml"), width)
        lines += ["", "groups (GROUP=CHOICE swaps a section; a recipe has chosen them):"]
        for group, choices in groups().items():
            lines += _entry(group, ", ".join(choices), width)
    if command == "bench":
        lines += ["", "It starts as many processes as the layout needs (parallel.*), or NPROC."]
    if command in ("estimate", "bench"):
        lines += ["", "Every setting of train may be given too (train --help lists them); no corpus is needed."]
    elif command == "train":
        lines += ["", "NPROC=n sets the processes on this machine; else one a GPU, or 2 on CPU."]
    elif command in ANYWHERE:
        lines += [
            "",
            "parallel.* and data.* may be given too (train --help lists them): the layout and the text of the run",
        ]
        lines += ["do not bind. Without parallel.* and NPROC it takes the fewest processes that hold the model."]
    where = ", used where the recipe says nothing" if command == "train" else ""
    lines += ["", f"settings with their defaults{where}:", ""]
    recipe_settings = [*_settings(Config), ""] if command == "train" else []
    return "\n".join(lines + recipe_settings + _settings(CONFIGS[command]))


def _settings(cls: type) -> list[str]:
    listed = list(settings(cls))
    width = max(len(f"{setting.path}={_default_text(setting)}") for setting in listed)
    lines: list[str] = []
    for _, section in groupby(listed, key=lambda setting: setting.path.rpartition(".")[0]):
        lines += [""] if lines else []
        for setting in section:
            lines += _entry(f"{setting.path}={_default_text(setting)}", setting.help, width)
    return lines


def _entry(left: str, text: str, width: int) -> list[str]:
    """A line of a two-column list; text that is too long goes on below itself."""
    first, *rest = textwrap.wrap(text, COLUMNS - width - 4)
    return [f"  {left:<{width}}  {first}", *(" " * (width + 4) + line for line in rest)]


def _default_text(setting: Setting) -> str:
    if setting.default is None:
        return "null"
    if setting.default == MISSING:
        return "..."
    if isinstance(setting.default, tuple):
        return str(list(setting.default)).replace(" ", "")
    return str(setting.default)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else "(it says nothing of itself)"
