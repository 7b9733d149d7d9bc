"""Runs a function in several processes joined as torchrun would join them, and brings back what they return."""

import contextlib
import datetime
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

GRACE_SECONDS = 2
# Importing megatron-core takes seconds of a core: one server imports it, and every rank is a fork of that server.
PRELOADED = "tests.preload"


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback or what became of it."""


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store lives in the parent, as torchrun's agent's does: no rank has to win a free port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _child(environment: dict[str, str], call: bytes, pipe: connection.Connection) -> None:
    os.setsid()  # a process group of its own, so that what it starts ends with it
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        answer = (True, function(*args))
    except BaseException:  # SystemExit too: whatever ended the function is the parent's to report
        answer = (False, traceback.format_exc())
    # Plain pickle: torch's own would pass tensors as file descriptors, which die with this process.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    sys.stdout.flush()
    # Gloo's threads and groups need no orderly end here, and a rank that failed must not wait for the others.
    os._exit(0)


def _answer(rank: int, process, pipe: connection.Connection) -> tuple[bool, object]:
    try:
        succeeded, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(5)
        return False, f"rank {rank} died, exit code {process.exitcode}"
    return succeeded, value if succeeded else f"rank {rank} raised:\n{value}"


def _collect(processes: list, pipes: list, seconds: float) -> list:
    """What each rank returned; a failure is told together with those that follow on its heels."""
    results, failures, waiting = [None] * len(pipes), [], dict(enumerate(pipes))
    deadline = time.monotonic() + seconds
    while waiting:
        ready = connection.wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            succeeded, results[rank] = _answer(rank, processes[rank], waiting.pop(rank))
            if not succeeded:
                failures.append(results[rank])
                # Its peers often fail because of it, and may be heard first.
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RankError("\n".join(failures))
    if waiting:
        raise RankError(f"ranks {sorted(waiting)} of {len(pipes)} did not end within {seconds:g} s")
    return results


def _end(process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, or has not come to its own group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def run_ranks(function: Callable, world: int, *args, timeout: float = 120, gpus: bool = False) -> list:
    """Calls a module-level function in ``world`` fresh processes and returns their results in order of rank.

    Each process has torchrun's environment variables and one thread; the function joins the process group itself
    (``parallel.groups.start``) if it needs one. The processes are forked from one that has imported our packages and
    done nothing else: no thread, no process group and no random number is shared.

    Args:
        function, args: pickled to the processes, as what the function returns is pickled back.
        timeout: seconds until all processes are killed.
        gpus: start processes from nothing, since imports alone touch a GPU, which a fork must not have.
    Raises:
        RankError: a rank raised (its traceback is the message), died or outlasted the timeout.
    """
    context = get_context("spawn" if gpus else "forkserver")
    if not gpus:
        context.set_forkserver_preload([PRELOADED])
    patience = datetime.timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    processes, pipes, call = [], [], pickle.dumps((function, args))
    try:
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (_environment(rank, world, store.port), call, sender)
            processes.append(context.Process(target=_child, args=arguments))
            # OpenMP reads its variable when the server imports torch, before the child sets anything.
            with patch.dict(os.environ, OMP_NUM_THREADS="1"):
                processes[-1].start()
            sender.close()
            pipes.append(receiver)
        return _collect(processes, pipes, timeout)
    finally:
        for process in processes:
            _end(process)
