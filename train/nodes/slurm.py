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
from train.nodes import failed
from train.nodes.place import Nodes, in_step, job_port, use_interface_to
from train.settings.tree import ConfigError

FRUITLESS = "fruitless_starts.txt"  # how often in a row a job was stopped before it had a newer checkpoint
TOO_OFTEN = 3
AFTER_FIRST_S = 660  # for the other fronts to end, once one has: a minute more than stopping workers are given to save
GPU_VARIABLES = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")
STARTED_ON = "nodes_of_start.txt"  # a job and its nodes, as long as it runs: what is left of it was ended with a node
GONE = re.compile(r"\bState=\S*(DOWN|FAIL|NOT_RESPONDING|\*)")


def gpus_per_node() -> int:
    """GPUs of each node of the allocation, 0 where none are asked for; a login node has none itself."""
    for name in GPU_VARIABLES:
        number = re.search(r"\d+$", os.environ.get(name, ""))
        if number:
            return int(number[0])
    return 0


def job_id() -> str:
    """This job, as Slurm's commands take it: of an array's last job SLURM_JOB_ID is the number of the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def address_of_first(node_list: str) -> str:
    """Where the first node of a list (node[1-4]) is reached: the address that Slurm itself uses, or else its name."""
    names = _hosts(node_list)
    first = names[0] if names else node_list.partition(",")[0]
    found = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "node", first))
    return found[1] if found and found[1] != "(null)" else first


def adopt_slurm_task() -> None:
    """Makes a task of `srun -n` the worker of the same number, as torchrun would have."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if not in_step() or tasks == 1 or os.environ.keys() & {"NNODES", "RANK"}:
        return
    per_node = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": per_node[0] if per_node else "1",
    }
    address, _, port = os.environ.get("MASTER_ADDR", "").partition(":")
    os.environ["MASTER_ADDR"] = address or address_of_first(os.environ["SLURM_STEP_NODELIST"])
    port = port or os.environ.get("MASTER_PORT", "") or str(job_port() + 1 + int(os.environ["SLURM_STEP_ID"]) % 100)
    os.environ["MASTER_PORT"] = port
    use_interface_to(os.environ["MASTER_ADDR"])


def command_line(nodes: Nodes, command: list[str], per_node: int) -> tuple[list[str], dict[str, str]]:
    """What starts a front on each node, and the variables that it is given beside those that are there."""
    address = os.environ.get("MASTER_ADDR") or f"{address_of_first(os.environ['SLURM_JOB_NODELIST'])}:{job_port()}"
    given = {"NNODES": str(nodes.most), "MASTER_ADDR": address, "NPROC": str(per_node)}
    if nodes.most == 1:
        given = {"NNODES": "1", "NPROC": str(per_node)}
    # Every front sees all that the allocation has of its node, and ends by itself, once its workers have saved.
    asked = [f"--nodes={nodes.most}", f"--ntasks={nodes.most}", "--ntasks-per-node=1", "--cpu-bind=none"]
    # A front that was lost with its node, which Slurm has not noticed, is not waited for longer than a save may take.
    asked += ["--kill-on-bad-exit=0", f"--wait={AFTER_FIRST_S}", "--export=ALL"]
    return ["srun", *asked, sys.executable, "-u", *command], given


def span(nodes: Nodes, command: list[str], per_node: int, run: Path | None) -> int:
    """Runs a command over the allocation; returns its exit code, after asking Slurm to start a stopped job again.

    Args:
        per_node: workers of each node.
        run: the run's directory, if it is one.
    """
    if run and set(_note_start(run)) & set(failed.too_often(run)) and _requeue(run, went_on=False):
        return RESUMABLE
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
    if run:
        (run / "logs" / STARTED_ON).unlink(missing_ok=True)
    if signal.SIGINT in received and code in (0, RESUMABLE):
        return 128 + signal.SIGINT
    if code == RESUMABLE and not set(received) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
        _requeue(run, _last_step(run) != before)
    return 1 if code < 0 or code > 128 else code


def _last_step(run: Path | None) -> str:
    """The name of the newest checkpoint of a run."""
    return max((path.name for path in run.glob("checkpoints/step_*[0-9]")), default="") if run else ""


def in_batch() -> bool:
    """Whether this is a batch job's script, and not somebody in an allocation's shell."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("ENVIRONMENT") == "BATCH"


def nodes_wanted(nodes: Nodes, processes: int, world: int | None) -> int:
    """The nodes that a batch job of one node needs for a recipe of ``world`` processes; 0 where it needs no others.

    Who gives sbatch no number of nodes gets one, and sbatch cannot look into a recipe.

    Args:
        processes: that this node would start.
    Raises:
        ConfigError: a node without GPUs, of which a recipe would take many.
    """
    if not (nodes.slurm and nodes.most == 1 and in_batch()) or not world or world <= processes or world % processes:
        return 0
    if "NPROC" not in os.environ and not gpus_per_node() and not _has_gpus():
        raise ConfigError(
            f"parallel.world={world} but the node of this job has no GPU: ask Slurm for them, as in sbatch "
            "--gpus-per-node=8 launch.sh ..., or set NPROC to run on the CPUs of more nodes"
        )
    return world // processes


def _has_gpus() -> bool:
    import torch

    return torch.cuda.device_count() > 0


def grow(wanted: int, world: int, dry: bool) -> int:
    """Queues this batch job again, under its number and with all its options, on so many nodes; returns an exit code.

    Args:
        dry: only says so.
    """
    job = job_id()
    why = f"parallel.world={world} needs {wanted} nodes, and job {job} has one"
    if dry:
        print(f"{why}: scontrol requeue {job} && scontrol update JobId={job} {' '.join(_on(wanted))}")
        return 0
    print(f"{why}: queueing it again on {wanted} (sbatch -N {wanted} waits once only)", file=sys.stderr, flush=True)
    refused = _queue_again(_on(wanted), f"submit the same line with sbatch -N {wanted}")
    if refused == "update":
        _ask("scancel", job)  # it would start on one node again
    return 2 if refused else RESUMABLE


def _on(nodes: int) -> list[str]:
    return [f"NumNodes={nodes}", f"NumTasks={nodes}"]


def _queue_again(changes: list[str], advice: str) -> str:
    """Puts this job back into the queue, with other options; says what Slurm refuses: requeue, update or nothing.

    A job can be changed only while it waits; Slurm's TERM comes at once, but the time until KILL is enough.
    """
    job = job_id()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the commands inherit
    commands = [["requeue", job], *([["update", f"JobId={job}", *changes]] if changes else [])]
    for command in commands:
        if answer := _ask("scontrol", *command, errors=True):
            print(f"Slurm refuses: {answer}; {advice}", file=sys.stderr, flush=True)
            return command[0]
    return ""


def _requeue(run: Path | None, went_on: bool) -> bool:
    """Puts a batch job that has stopped before its end back into the queue, unless it gets nowhere.

    It is not to get the nodes again that have failed too often. Returns whether it is queued.
    """
    if not in_batch() or run is None:
        return False
    file = run / "logs" / FRUITLESS
    in_vain = 0 if went_on else 1 + (int(file.read_text()) if file.exists() else 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{in_vain}\n")
    if in_vain >= TOO_OFTEN:
        print(f"stopped {in_vain} times without a newer checkpoint: not queued again", file=sys.stderr, flush=True)
        return False
    job, bad = job_id(), failed.too_often(run)
    without = f", without {', '.join(bad)}" if bad else ""
    print(f"queueing job {job} again{without}: it goes on from its last checkpoint", file=sys.stderr, flush=True)
    names = ",".join(sorted({*_excluded(), *bad})) if bad else ""
    advice = "submit the same line again" + f" with sbatch --exclude={names}" * bool(bad)
    return _queue_again([f"ExcNodeList={names}"] * bool(bad), advice) != "requeue"


def _excluded() -> list[str]:
    """Nodes that this job is not to get already (sbatch --exclude)."""
    found = re.search(r"\bExcNodeList=(\S+)", _ask("scontrol", "show", "job", job_id()))
    return _hosts(found[1]) if found and found[1] != "(null)" else []


def _hosts(node_list: str) -> list[str]:
    return _ask("scontrol", "show", "hostnames", node_list).split()


def _note_start(run: Path) -> list[str]:
    """Notes this start's nodes, and those of the last one that went down and took it with them; returns the former.

    Slurm kills and queues again a job whose node goes down, and does not say which one it was.
    """
    file, job = run / "logs" / STARTED_ON, job_id()
    before = file.read_text(encoding="utf-8").split() if file.exists() else []
    for host in before[1:] if before[:1] == [job] else []:
        is_new = not failed.noted_since(run, host, file.stat().st_mtime)
        if is_new and GONE.search(_ask("scontrol", "show", "node", host)):
            print(f"{host} went down under this job", file=sys.stderr, flush=True)
            if words := failed.note(run, host):
                print(words, file=sys.stderr, flush=True)
    hosts = _hosts(os.environ["SLURM_JOB_NODELIST"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(" ".join([job, *hosts]) + "\n", encoding="utf-8")
    return hosts


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
