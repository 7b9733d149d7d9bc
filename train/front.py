"""The process that a user starts: it checks everything first, then starts the workers and waits for them.

On one machine it runs torchrun's agent itself (`train.nodes.agent`). Of a job on several there is one on each node:
they meet (`train.nodes.roster`), node 0 prepares the corpus, and each starts its node's workers. In an allocation of
Slurm's it starts those fronts with srun (`train.nodes.slurm`).
"""

import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import STOP, DataConfig
from data.dataset import Dataset
from data.secrets import hide
from parallel.topology import ParallelConfig
from train.job.starter import RESUMABLE
from train.nodes import place, slurm
from train.nodes.place import DRY_RUN, WORKER_VARIABLES, Nodes
from train.settings.checks import VARIABLE, check_environment
from train.settings.tree import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, which a mistake in the settings should not wait for
    from train.nodes.agent import Stop
    from train.nodes.logs import RankLogs

CPU_PROCESSES = 2
MOST_ON_A_CORE = 8  # processes for tests of a layout; more of them take the memory, and end in nothing
VERIFIED_BYTES = 2**31  # seconds of hashing; a larger corpus proves each shard when it is first opened
WORKER = "--worker"  # the first argument of processes that a front has started, whose checks are done
ENVIRONMENT = "launch.env"  # variables of NCCL, InfiniBand and the like, for every process
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun wants a worker to leave its exception


def world_size() -> int | None:
    """Processes of the whole job in a worker (of this front, or of the user's own torchrun); None in the front."""
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= WORKER_VARIABLES else None


def started_by_front() -> bool:
    """Whether this is a worker of a front, which has checked and set everything; not one of the user's own torchrun."""
    return world_size() is not None and sys.argv[1:2] == [WORKER]


def load_environment(folders: list[Path]) -> None:
    """Sets the variables of the `launch.env` of each folder (NAME=VALUE lines, # comments); the first one says which.

    Raises:
        ConfigError: a line that sets nothing.
    """
    is_first = {os.environ.get(name, "0") for name in ("RANK", "NODE_RANK", "SLURM_NODEID")} == {"0"}
    for file in [folder / ENVIRONMENT for folder in folders]:
        if not file.is_file():
            continue
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
        for name, equals, value in pairs:
            if not equals or not re.fullmatch(VARIABLE, name):
                raise ConfigError(
                    f"{file} has the line {name + equals + value!r}: write NAME=VALUE, or # before a comment"
                )
            os.environ[name] = value.strip("'\"")
        if is_first:
            print(f"{file} sets {', '.join(name for name, _, _ in pairs)}", file=sys.stderr)


def set_environment(given: tuple[str, ...]) -> None:
    """Sets a recipe's variables, `run.environment`; they go before those of `launch.env`.

    Raises:
        ConfigError: one that sets nothing.
    """
    check_environment(given)
    os.environ |= dict(text.split("=", 1) for text in given)


def num_processes(needed: int | None = None) -> int:
    """Processes to start on all nodes; of each: NPROC, or else its share of ``needed``, or else one a GPU, or else 2.

    Raises:
        ConfigError: NPROC is not a positive number, or NNODES and what belongs to it cannot be meant.
    """
    nodes, asked = place.here(), os.environ.get("NPROC")
    if asked is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise ConfigError(f"NPROC={asked} is not a number of processes: use 1 or more, or unset it")
        return nodes.most * int(asked)
    if needed is not None:
        return nodes.most * max(1, needed // nodes.most)
    if nodes.slurm and slurm.gpus_per_node():
        return nodes.most * slurm.gpus_per_node()
    import torch

    return nodes.most * (torch.cuda.device_count() or CPU_PROCESSES)


def layout_size(parallel: ParallelConfig) -> int:
    """The fewest processes that a layout can run on."""
    expert = parallel.expert if isinstance(parallel.expert, int) else 1
    return parallel.pipeline * math.lcm(parallel.tensor * parallel.context, expert * parallel.expert_tensor)


def ensure_corpus(data: DataConfig) -> Dataset:
    """Makes the embedded corpus unless it is cached, counts what must be, and proves corpora before the workers start.

    Where damaged parts are to be left out they are found when they are opened.

    Raises:
        CorpusError: a file that is not as prepare left it, or a source that does not fill one sample.
    """
    dataset = Dataset(data)
    for corpus in dataset.corpora:
        if corpus.num_bytes <= VERIFIED_BYTES and data.on_corrupt == STOP:
            corpus.verify()
    dataset.check()
    return dataset


def report_mistake(error: Exception) -> None:
    """Tells the user of a mistake in one line; a worker leaves that to its front, or to the first worker."""
    if ERROR_FILE in os.environ and not _is_alone():
        record_failure(error)
    elif os.environ.get("RANK", "0") == "0" or not _is_alone():
        print(f"error: {hide(str(error))}", file=sys.stderr)


def record_failure(error: Exception) -> None:
    """Leaves a worker's exception where its starter looks for it."""
    if ERROR_FILE in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def launch(command: str, arguments: list[str], processes: int, prepare: Callable[[], object], run: Path | None) -> int:
    """Runs a command in workers; returns its exit code.

    Args:
        processes: on all nodes.
        prepare: what comes before any worker, done by one front alone.
        run: the directory of a run, which gets the logs; else they are not kept.
    Raises:
        ConfigError: more processes than GPUs. What ``prepare`` raises.
    """
    nodes, per_node = place.here(), processes // place.here().most
    front, workers = ["-m", "train", command, *arguments], ["-m", "train", WORKER, command, *arguments]
    if DRY_RUN in arguments:
        print(hide(_shown(nodes, [argument for argument in front if argument != DRY_RUN], per_node)))
        return 0
    if not nodes.slurm:
        return start(workers, per_node, nodes, prepare, run)
    prepare()
    return slurm.span(nodes, front, per_node, run)


def _shown(nodes: Nodes, command: list[str], per_node: int) -> str:
    """What `--dry-run` prints."""
    if nodes.slurm:
        return slurm.shown(nodes, command, per_node)
    line = shlex.join([sys.executable, "-u", *command])
    if nodes.most == 1:
        return f"{per_node} processes on this machine: {line}"
    number = str(nodes.most) if nodes.least == nodes.most else f"{nodes.least} to {nodes.most}"
    where = f"node {nodes.rank} of {number}, which meet at {nodes.address}:{nodes.port}"
    return f"{per_node} processes on this machine, {where}: {line}"


def start(command: list[str], per_node: int, nodes: Nodes, prepare: Callable[[], object], run: Path | None) -> int:
    """Runs ``python COMMAND`` in workers of this machine, as its part of a job; returns their exit code.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop the workers in order: they get one SIGTERM and ten minutes; a second Ctrl-C
    kills them at once. The code is then 130 after Ctrl-C, else 75, or 1 if a worker failed. SIGUSR2 reaches the
    workers. A node that is lost ends the others with 75, since the run goes on from its last checkpoint.

    Raises:
        ConfigError: more processes than GPUs. What ``prepare`` raises.
    """
    _require_gpus(per_node)
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException

    from train.nodes import agent

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // per_node)))
    with tempfile.TemporaryDirectory(prefix="train_") as scratch, agent.stopping(saves=run is not None) as stop:
        started = Started(command, per_node, run, Path(scratch), stop)
        try:
            code, words = _on_nodes(nodes, started, prepare) if nodes.most > 1 else _alone(started, prepare)
        except SignalException:  # while there were no workers
            return stop.code
    if words:
        *before, last = words.splitlines()
        print(hide("\n".join([*before, f"error: {last}"])), file=sys.stderr)
    return code


def prepare_among_workers(prepare: Callable[[], object]) -> AbstractContextManager[object]:
    """In a worker that the user's own torchrun or srun has started: the first one prepares, the others wait for it.

    The context holds what they meet at until their process group has started. Workers of a front have it behind them.

    Raises:
        SystemExit: in the others, where preparing failed. What ``prepare`` raises, in the first.
    """
    if not _is_alone():
        return nullcontext()
    from train.nodes.meeting import meeting

    return meeting(prepare)


def _is_alone() -> bool:
    """Whether this is a worker that no front has started."""
    return world_size() is not None and not started_by_front()


@dataclass(frozen=True)
class Started:
    """What a front starts on its node.

    Attributes:
        command: Python's arguments.
        processes: of this node.
        run: the run's directory, if it is one.
        scratch: a directory for as long as this front lives.
    """

    command: list[str]
    processes: int
    run: Path | None
    scratch: Path
    stop: "Stop"

    def say(self, nodes: int = 1) -> None:
        """Tells the user that the workers start."""
        where = f" on each of {nodes} nodes" if nodes > 1 else ""
        text = f"starting {self.processes} process{'es' * (self.processes > 1)}{where}"
        print(text, file=sys.stderr, flush=True)

    def logs(self, when: str) -> "RankLogs":
        """Where the workers of a start write."""
        from train.nodes.logs import RankLogs

        errors = self.scratch / when
        errors.mkdir(exist_ok=True)
        return RankLogs(self.run / "logs" / when if self.run else errors, errors)


def _alone(started: Started, prepare: Callable[[], object]) -> tuple[int, str]:
    from train.nodes import agent

    prepare()
    started.say()
    logs = started.logs(time.strftime("%Y%m%d-%H%M%S"))
    return agent.run(started.command, started.processes, logs, started.stop)


def _on_nodes(nodes: Nodes, started: Started, prepare: Callable[[], object]) -> tuple[int, str]:
    """This node's part of a job on several, until an attempt comes to its end."""
    from train.nodes import agent
    from train.nodes.roster import NodeLost, Roster

    interface = place.use_interface(nodes)
    try:
        roster = Roster(nodes, agent.kill_workers)
        try:
            roster.together(prepare)
            while True:
                attempt = roster.next_attempt()
                started.say(len(attempt.members))
                logs = started.logs(attempt.time)
                code, words = agent.run_attempt(
                    started.command, started.processes, logs, started.stop, nodes, interface, attempt
                )
                code, words = roster.end(attempt, code, words)
                _note_failed(started.run, roster.gone)
                if roster.lost:
                    return RESUMABLE, roster.lost
                if not roster.again or started.stop.signal:
                    return code, words
        finally:
            roster.leave()
    except NodeLost as error:
        return RESUMABLE, str(error)


def _note_failed(run: Path | None, hosts: list[str]) -> None:
    """Notes the hosts that were lost since the last time, and names those that have failed too often."""
    from train.nodes.failed import note

    while hosts:
        host = hosts.pop()
        if run and (words := note(run, host)):
            print(words, file=sys.stderr)


def _require_gpus(per_node: int) -> None:
    import torch

    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if 0 < gpus < per_node:
        raise ConfigError(
            f"{per_node} processes are asked for, one a GPU, but this machine has {gpus}: set NPROC={gpus} or less, "
            "take more machines (sbatch -N, NNODES), or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on its CPU"
        )
    if not gpus and per_node > MOST_ON_A_CORE * cores:
        raise ConfigError(
            f"{per_node} processes are asked for, but this machine has no GPU and {cores} cores: set NPROC="
            f"{MOST_ON_A_CORE * cores} or less, or take more machines (sbatch -N, NNODES)"
        )
