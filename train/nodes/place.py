"""Which part of a job this process is to start: from NNODES, NODE_RANK and MASTER_ADDR, or from Slurm's variables.

A *front* is the process that a user starts on a node; it starts the node's workers. Under Slurm:

    in an allocation (sbatch, salloc)   the front starts one front a node with srun, and they start the workers
    in a step of several tasks (srun)   each task is a worker itself
    NNODES is set                       as by hand, whatever Slurm says
"""

import os
import re
import socket
from dataclasses import dataclass

import psutil

from train.settings.tree import ConfigError

WORKER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}  # what torchrun gives to each process that it starts
DRY_RUN = "--dry-run"  # shows what would be started
DEFAULT_PORT = 29400
JOB_PORTS = 20000  # jobs of Slurm that share a host take ports from here on, by their number
SPECIAL_STEPS = 0xFFFFFFF0  # Slurm's numbers of batch scripts and interactive shells, which are no steps of tasks


@dataclass(frozen=True)
class Nodes:
    """The machines of a job.

    Attributes:
        least, most: how many it may run on.
        rank: the number of this one.
        address, port: of node 0, where the fronts meet.
        slurm: whether srun is to start a front on each.
    """

    least: int = 1
    most: int = 1
    rank: int = 0
    address: str = "localhost"
    port: int = DEFAULT_PORT
    slurm: bool = False


def here() -> Nodes:
    """Where this front stands.

    Raises:
        ConfigError: NNODES, NODE_RANK or MASTER_ADDR that cannot be meant.
    """
    if "NNODES" in os.environ:
        return _by_hand()
    if "SLURM_JOB_ID" in os.environ and not in_step():
        most = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        return Nodes(most, most, 0, slurm=True)
    return Nodes()


def in_step() -> bool:
    """Whether srun has started this process."""
    return int(os.environ.get("SLURM_STEP_ID", SPECIAL_STEPS)) < SPECIAL_STEPS


def _by_hand() -> Nodes:
    text = os.environ["NNODES"]
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError(
            f"NNODES={text} is not a number of nodes: use NNODES=2, or NNODES=1:4 for as many as there are"
        )
    if most == 1:
        return Nodes()
    rank = os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", ""))
    if not rank.isdecimal() or int(rank) >= most:
        raise ConfigError(
            f"NODE_RANK={rank} is not one of NNODES={text} nodes: give each its own, from 0 to {most - 1}"
        )
    address, _, port = os.environ.get("MASTER_ADDR", "").partition(":")
    port = port or os.environ.get("MASTER_PORT", str(DEFAULT_PORT))
    if not address:
        raise ConfigError(
            f"NNODES={text} but MASTER_ADDR is not set: name node 0 to all, MASTER_ADDR=host or host:port"
        )
    if not port.isdecimal() or not 0 < int(port) < 2**16 - 200:
        raise ConfigError(f"MASTER_ADDR={address}:{port} has no port that can be used: choose one below 65000")
    return Nodes(least, most, int(rank), address, int(port))


def host_name() -> str:
    """This machine, as its users know it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_address(towards: str) -> tuple[str, str]:
    """This machine's address, and the network interface that has it, by which another one is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 1))  # sends nothing
        except OSError:
            return "127.0.0.1", ""
        address = str(probe.getsockname()[0])
    names = [name for name, all_of in psutil.net_if_addrs().items() if address in [one.address for one in all_of]]
    return address, names[0] if names else ""


def job_port() -> int:
    """The first of the ports of a job of Slurm."""
    return JOB_PORTS + int(os.environ["SLURM_JOB_ID"]) % 200 * 200


def use_interface_to(master: str) -> str:
    """Lets gloo listen where node 0 is reached from, unless told otherwise; a host's name often is its loopback."""
    address, interface = own_address(master)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


def use_interface(nodes: Nodes) -> str:
    """Lets gloo listen where node 0 is reached from, unless told otherwise; returns this machine's address there."""
    return use_interface_to(nodes.address)
