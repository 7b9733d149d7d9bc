"""A vLLM server of its own Python environment, started on an exported model and asked over HTTP."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAME = "tessera"
START_SECONDS = 600
# The CPU build's memory for keys and values in GB; nothing is sent anywhere.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str

    def ask(self, path: str, **body) -> dict:
        """The answer to a request."""
        request = urllib.request.Request(
            self.url + path, json.dumps({"model": NAME, **body}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def prompt_logprobs(self, tokens: list[int]) -> list[float]:
        """Log-probability of each token but the first, given those before it."""
        answer = self.ask("/v1/completions", prompt=tokens, max_tokens=1, temperature=0, prompt_logprobs=0)
        (choice,) = answer["choices"]
        each = choice["prompt_logprobs"][1:]
        return [each[i][str(token)]["logprob"] for i, token in enumerate(tokens[1:])]

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest continuation, ``count`` tokens of it."""
        answer = self.ask(
            "/v1/completions",
            prompt=tokens,
            max_tokens=count,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        return answer["choices"][0]["token_ids"]

    def drafts(self) -> dict[str, float]:
        """Counters of speculative decoding: drafts, and how many of them had their 1st, 2nd, ... token accepted."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found = {}
        for name, labels, value in re.findall(r"^vllm:spec_decode_num_(\w+)_total\{(.*)\} (\S+)$", text, re.MULTILINE):
            position = re.search(r'position="(\d+)"', labels)
            found[name if position is None else f"{name}/{position[1]}"] = float(value)
        return found


@contextmanager
def serve(python: Path, model: Path, log: Path, length: int = 256, drafts: int = 0) -> Iterator[Server]:
    """A server in bfloat16, the only type in which vLLM computes Gated DeltaNet on a CPU.

    Args:
        python: of an environment that has vLLM. drafts: tokens that the MTP layer drafts at once; 0: none.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Prefix caching is off: with drafts it needs a Triton kernel, which the CPU build lacks.
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", NAME, "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(length), "--max-num-seqs", "8", "--enforce-eager", "--no-enable-prefix-caching"),
    ]
    if drafts:
        command += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)
    server = Server(f"http://127.0.0.1:{port}")
    try:
        _wait(server, process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(server.url + "/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"vLLM did not come up: {log.read_text()[-3000:]}")
