"""What all tests share: which are quick, and that GPU tests skip, with their reason, where there is no GPU."""

import signal
from pathlib import Path

import hypothesis
import pytest

from tests.sandbox import bare, clone, installing  # noqa: F401 (fixtures)

# What trains runs or starts many processes: all other tests are marked `quick`.
LONG = (
    "data/test_embedded.py",
    "data/test_restart.py",
    "faults/",
    "gpu/",
    "cluster/",
    "parallel/test_collectives.py",
    "parallel/test_compat.py",
    "parallel/test_deepspeed.py",
    "parallel/test_dense.py",
    "parallel/test_dist.py",
    "parallel/test_domains.py",
    "parallel/test_engine.py",
    "parallel/test_exchange.py",
    "parallel/test_layout_cost.py",
    "parallel/test_overlap.py",
    "parallel/test_parity.py",
    "serving/",
    "test_launch.py",
    "test_launch_shared.py",
    "train/test_bad_steps.py",
    "train/test_bench.py",
    "train/test_checkpoint.py",
    "train/test_commands.py",
    "train/test_dry_run.py",
    "train/test_front.py",
    "train/test_nodes.py",
    "train/test_hf_family_layouts.py",
    "train/test_hf_layouts.py",
    "train/test_hf_memory.py",
    "train/test_hf_miniatures.py",
    "train/test_resize.py",
    "train/test_stop.py",
    "train/test_training.py",
    "train/test_watch.py",
)

# The longest files, which come first, so that two processes that take a file each end at the same time.
LONGEST = (
    "train/test_training.py",
    "parallel/test_deepspeed.py",
    "parallel/test_parity.py",
    "faults/",
    "train/test_checkpoint.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the tests of serving need that no test can make for itself."""
    parser.addoption("--vllm", metavar="PYTHON", help="python of an environment with vLLM, for tests/serving")
    parser.addoption("--served-run", metavar="DIR", help="run that tests/serving serves; else they train tiny first")


def pytest_configure() -> None:
    """Lets Ctrl-C through to the commands under test where pytest itself was started in a shell's background.

    Such a process ignores SIGINT, and so would every process that it starts. Hypothesis measures no time: a busy
    machine is not a failure.
    """
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the quick tests, and skips those marked `gpu` on a machine without an NVIDIA GPU."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        if not place.startswith(LONG) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
    items.sort(key=_rank)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # here, since it takes seconds that a run without GPU tests need not spend

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _rank(item: pytest.Item) -> int:
    """The longest files first, in their order, then the other long ones; the quick ones fill up the end."""
    if item.get_closest_marker("quick"):
        return len(LONGEST) + 1
    place = item.path.relative_to(Path(__file__).parent).as_posix()
    return next((number for number, own in enumerate(LONGEST) if place.startswith(own)), len(LONGEST))
