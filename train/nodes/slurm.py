"""A job in a Slurm allocation: one front a node through srun, the warning signal, and the way back into the queue."""

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from train.job.starter import RESUMABLE
from train.nodes.place import Nodes, job_port

FRUITLESS = "fruitless_starts.txt"  # how often in a row a job was stopped before it had a newer checkpoint
TOO_OFTEN = 3
GPU_VARIABLES = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")


def gpus_per_node() -> int:
    """GPUs of each node of the allocation, 0 where none are asked for; a login node has none itself."""
    for name in GPU_VARIABLES:
        number = re.search(r"\d+$", os.environ.get(name, ""))
        if number:
            return int(number[0])
    return 0


def address_of_first(node_list: str) -> str:
    """Where the first node of a list (node[1-4]) is reached: the address that Slurm itself uses, or else its name."""
    names = _ask("scontrol", "show", "hostnames", node_list).split()
    first = names[0] if names else node_list.partition(",")[0]
    found = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "node", first))
    return found[1] if found and found[1] != "(null)" else first


def command_line(nodes: Nodes, command: list[str], per_node: int) -> tuple[list[str], dict[str, str]]:
    """What starts a front on each node, and the variables that it is given beside those that are there."""
    address = os.environ.get("MASTER_ADDR") or f"{address_of_first(os.environ['SLURM_JOB_NODELIST'])}:{job_port()}"
    given = {"NNODES": str(nodes.most), "MASTER_ADDR": address, "NPROC": str(per_node)}
    if nodes.most == 1:
        given = {"NNODES": "1", "NPROC": str(per_node)}
    # Every front sees all that the allocation has of its node, and ends by itself, once its workers have saved.
    asked = [f"--nodes={nodes.most}", f"--ntasks={nodes.most}", "--ntasks-per-node=1", "--cpu-bind=none"]
    asked += ["--kill-on-bad-exit=0", "--wait=0", "--export=ALL"]
    return ["srun", *asked, sys.executable, "-u", *command], given


def span(nodes: Nodes, command: list[str], per_node: int, run: Path | None) -> int:
    """Runs a command over the allocation; returns its exit code, after asking Slurm to start a stopped job again.

    Args:
        per_node: workers of each node.
        run: the run's directory, if it is one.
    """
    line, given = command_line(nodes, command, per_node)
    before = _last_step(run)
    received: list[int] = []
    # In a session of its own, since a second signal to srun kills its tasks: one is passed on, and they save.
    srun = subprocess.Popen(line, env=os.environ | given, start_new_session=True)

    def passes_on(number: int, frame: object) -> None:
        if not received:
            print(f"{signal.Signals(number).name}: saving and stopping", file=sys.stderr, flush=True)
        if not received or number == signal.SIGUSR2:
            with suppress(ProcessLookupError):
                srun.send_signal(signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGUSR1)
        if number != signal.SIGUSR2:
            received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, passes_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    code = srun.wait()
    if signal.SIGINT in received and code in (0, RESUMABLE):
        return 128 + signal.SIGINT
    if code == RESUMABLE and not set(received) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
        _requeue(run, _last_step(run) != before)
    return 1 if code < 0 or code > 128 else code


def _last_step(run: Path | None) -> str:
    """The name of the newest checkpoint of a run."""
    return max((path.name for path in run.glob("checkpoints/step_*[0-9]")), default="") if run else ""


def _requeue(run: Path | None, went_on: bool) -> None:
    """Puts a batch job that has stopped before its end back into the queue, unless it gets nowhere."""
    job = os.environ["SLURM_JOB_ID"]
    if os.environ.get("ENVIRONMENT") != "BATCH" or run is None:  # somebody in an allocation's shell
        return
    file = run / "logs" / FRUITLESS
    in_vain = 0 if went_on else 1 + (int(file.read_text()) if file.exists() else 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{in_vain}\n")
    if in_vain >= TOO_OFTEN:
        print(f"stopped {in_vain} times without a newer checkpoint: not queued again", file=sys.stderr, flush=True)
        return
    print(f"queueing job {job} again: it goes on from its last checkpoint", file=sys.stderr, flush=True)
    if answer := _ask("scontrol", "requeue", job, errors=True):
        print(f"Slurm refuses: {answer}; submit the same line again", file=sys.stderr, flush=True)


def exclude(hosts: list[str]) -> str:
    """Asks Slurm not to give this job those nodes again; what to say of it, nothing outside of Slurm."""
    if "SLURM_JOB_ID" not in os.environ:
        return ""
    job, names = os.environ["SLURM_JOB_ID"], ",".join(hosts)
    refused = _ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={names}", errors=True)
    return f"; leave it out with sbatch --exclude={names}" if refused else "; this job leaves it out from now on"


def shown(nodes: Nodes, command: list[str], per_node: int) -> str:
    """The line that would be run, for a shell."""
    line, given = command_line(nodes, command, per_node)
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in given.items()), shlex.join(line)])


def _ask(*command: str, errors: bool = False) -> str:
    """What a command of Slurm's says; nothing where it fails or is not there. ``errors``: what it complains of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error) if errors else ""
    if errors:
        return done.stderr.strip() if done.returncode else ""
    return done.stdout if done.returncode == 0 else ""
