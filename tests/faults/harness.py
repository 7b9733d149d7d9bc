"""Starts of a run whose processes can be killed in any way, and what is left of it afterwards.

A start is what the front and its workers are: a starter that holds the job's store and waits, and its children, which
train (`train.loop.run_training`) and end with it. All are forks of the server that `tests.dist` preloads, since a
campaign has hundreds of them; the front itself is tried by a few starts of the real command.
"""

import contextlib
import datetime
import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed import TCPStore

from parallel.checkpoint.stored import StoredTensors
from tests.dist import PRELOADED
from train import loop
from train.job.shelf import Shelf
from train.job.starter import end_with_starter, stop_while_starting
from train.settings.run import USER_ERRORS, Config

GRACE_S = 20.0  # for the others once a worker has failed
Injection = Callable[[int], None]  # what a worker does to itself before it trains, by its rank


@dataclass
class Start:
    """One start of a run, under way."""

    process: Any
    ranks: list[int]  # process ids
    log: Path

    def wait(self, seconds: float = 120) -> int:
        """Its exit code. Nothing of it may be left then."""
        self.process.join(seconds)
        hung = self.process.is_alive()
        if hung:
            self.process.kill()
            self.process.join()
        deadline = time.monotonic() + 5
        while (left := [pid for pid in self.ranks if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not hung, f"it did not end within {seconds} s:\n{self.log.read_text()[-3000:]}"
        assert not left, f"processes {left} outlived their starter"
        return self.process.exitcode


def alive(pid: int) -> bool:
    """Whether a process still runs; one that is dead and not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(config: Config, world: int, log: Path, inject: Injection | None = None) -> Start:
    """Starts a run; what its processes print goes to a file."""
    context = get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_starter, args=(config, world, str(log), inject, sender))
    process.start()
    sender.close()
    return Start(process, receiver.recv(), log)


def _starter(config: Config, world: int, log: str, inject: Injection | None, sender: Any) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {}
    for rank in range(world):
        pid = os.fork()
        if not pid:
            sender.close()
            _worker(config, rank, world, port, inject)
        ranks[pid] = rank
    sender.send(list(ranks))
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=60))
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in ranks])
    codes = _wait(ranks)
    del store
    os._exit(next((code for code in (2, 1, -9, 75, 130) if code in codes), max(codes)) % 256)


def _wait(ranks: dict[int, int]) -> list[int]:
    """The workers' exit codes; once one has failed the others have a while to end."""
    codes, deadline = [], float("inf")
    waiting = dict(ranks)
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in waiting:
            del waiting[pid]
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1] and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S
                for other in waiting:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > deadline:
            for other in waiting:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return codes


def _worker(config: Config, rank: int, world: int, port: int, inject: Injection | None) -> None:
    """What ``python -m train train`` is in a worker, without its imports."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    end_with_starter()
    stop_while_starting()
    code = 1
    try:
        record_tokens(config.run.path / f"tokens_{rank}.jsonl")
        if inject is not None:
            inject(rank)
        code = loop.run_training(config)
    except SystemExit as end:
        code = int(end.code or 0)
    except USER_ERRORS as mistake:
        print(f"error: {mistake}", flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def record_tokens(path: Path) -> None:
    """Notes what each step of this process reads, from now on."""
    real = loop.train_step

    def noting(job: Any, engine: Any, batches: Any, lr: float, tokens_before: int, *rest: Any) -> Any:
        digest = hashlib.sha256(b"".join(batch.tokens.numpy().tobytes() for batch in batches)).hexdigest()
        with path.open("a") as file:
            file.write(json.dumps([tokens_before, digest]) + "\n")
        return real(job, engine, batches, lr, tokens_before, *rest)

    loop.train_step = noting


def tokens(run: Path) -> dict[str, str]:
    """The tokens of each step as they were last read, by process and tokens read before it."""
    found = {}
    for path in run.glob("tokens_*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # torn off by a kill
                before, digest = json.loads(line)
                found[f"{path.name} {before}"] = digest
    return found


def contents(checkpoint: Path) -> dict[str, str]:
    """A hash of each tensor of a checkpoint, whatever files it lies in."""
    stored = StoredTensors(checkpoint)
    return {name: hashlib.sha256(bytes_of(stored.read(name))).hexdigest() for name in stored.shapes}


def bytes_of(x: torch.Tensor) -> bytes:
    """A tensor's bytes, of any type."""
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def losses(run: Path) -> list[dict[str, float]]:
    """What each logged step of a run says of its losses."""
    names = ("step", "loss", "lm_loss", "grad_norm", "heldout_lm_loss")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names if name in line} for line in lines]


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints of a run that are there whole."""
    return Shelf(run / "checkpoints").steps()
