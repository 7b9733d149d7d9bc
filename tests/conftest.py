"""What all tests share: GPU tests skip, with their reason, where there is no GPU."""

import signal

import hypothesis
import pytest


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` on a machine without an NVIDIA GPU."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # here, since it takes seconds that a run without GPU tests need not spend

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
