"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of a few virtual nodes, from Debian's packages.

``python -m tests.cluster.slurm DIRECTORY [NODES]`` starts one and prints how to use it, until Ctrl-C or SIGTERM. It
needs root on Debian, where it installs what is missing. Nothing outside the directory is written but those packages.
What is special here:

- all nodes are this host, so each slurmd has a port of its own and is told which node it is (-N);
- a node that is set down comes back by itself, as its slurmd answers (ReturnToService);
- their names resolve to nothing: NodeAddr says where they are;
- a job that was queued again waits for its credential to expire (120 s by default, 5 here).
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("node1", "node2")  # unless others are asked for
PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MinJobAge=3600
"""


def why_not() -> str:
    """Why no Slurm can be started here; nothing if it can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    if shutil.which("apt-get") is None and _missing():
        return f"a Slurm of our own needs {', '.join(_missing())}, or Debian's apt-get to install them"
    return ""


def _missing() -> list[str]:
    return [package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None]


def install() -> None:
    """Installs Slurm, if need be. Raises CalledProcessError where Debian's mirror is out of reach."""
    if missing := _missing():
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
        subprocess.run(["apt-get", "-q", "update"], **quiet)
        subprocess.run(["apt-get", "-qy", "install", "--no-install-recommends", *missing], **quiet)


class Slurm:
    """A cluster of a few nodes, all of whose files lie in one directory."""

    def __init__(self, directory: Path, cpus: int = 4, nodes: tuple[str, ...] = NODES) -> None:
        self.directory, self.nodes = directory, nodes
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}
        self.environment["PATH"] = f"{self.environment['PATH']}:/usr/sbin"
        self._daemons: list[subprocess.Popen] = []
        self._slurmds: dict[str, subprocess.Popen] = {}
        self._cpus = cpus

    def start(self) -> None:
        """Starts the daemons and waits for the nodes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        (self.directory / "state").mkdir()
        self._configure()
        key = self.directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.directory / name}" for option, name in files.items()]
        # --force, since munged distrusts directories that others may write to, as /tmp.
        self._spawn("munged", "--foreground", "--force", f"--log-file={self.directory / 'munge.log'}", *options)
        self._until(lambda: (self.directory / "munge.socket").exists(), 20)
        configuration = self.environment["SLURM_CONF"]
        self._spawn("slurmctld", "-D", "-c", "-f", configuration)
        for node in self.nodes:
            (self.directory / f"spool-{node}").mkdir()
            self.switch_on(node)
        self._until(lambda: self._ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(self.nodes), 60)

    def switch_on(self, node: str) -> None:
        """Starts a node."""
        self._slurmds[node] = self._spawn("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])

    def switch_off(self, node: str) -> None:
        """Ends a node with all that runs on it, at once."""
        self._slurmds[node].kill()
        self._slurmds[node].wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") != node:
                    continue
                steps = [parent for parent in process.parents() if parent.name().startswith("slurmstepd")]
                for one in (*steps, process):
                    one.kill()

    def _configure(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1] // 10 * 10
        host = socket.gethostname().partition(".")[0]
        lines = [CONFIGURATION.format(host=host, port=port, directory=self.directory)]
        for number, node in enumerate(self.nodes, start=1):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} CPUs={self._cpus} "
                f"Boards=1 SocketsPerBoard=1 CoresPerSocket={self._cpus} ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
            )
        lines.append(f"PartitionName=all Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP")
        (self.directory / "slurm.conf").write_text("\n".join(lines) + "\n")
        # v1 touches no cgroup as long as neither processes nor tasks are tracked with them.
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen:
        path = shutil.which(program, path=PATH)
        with (self.directory / f"{program}.out").open("ab") as log:
            command = [path or program, *arguments]
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        return self._daemons[-1]

    def stop(self) -> None:
        """Cancels all jobs and ends the daemons."""
        if jobs := self._ask("squeue", "-h", "-o", "%A").split():
            self._ask("scancel", "--full", *jobs)
            self._until(lambda: not self._ask("squeue", "-h", "-t", "R,CG", "-o", "%A"), 60, must=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, **options: object) -> str:
        """Standard output of a command that must succeed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Submits a batch job; its number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, states: tuple[str, ...], seconds: float) -> dict[str, str]:
        """Waits for a job to come into one of the states."""
        self._until(lambda: self.job(number)["JobState"] in states, seconds, what=lambda: str(self.job(number)))
        return self.job(number)

    def wait_for_node(self, node: str, state: str, seconds: float) -> None:
        """Waits for a node to come into a state, as idle or down."""
        self._until(lambda: self._ask("sinfo", "-h", "-n", node, "-o", "%t").startswith(state), seconds)

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def _until(
        self, done: Callable[[], bool], seconds: float, must: bool = True, what: Callable[[], str] = lambda: ""
    ) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                assert not must, f"not within {seconds:.0f} s: {what()}\n{self._logs()}"
                return
            time.sleep(0.3)

    def _logs(self) -> str:
        files = sorted(self.directory.glob("*.out"))
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    install()
    for stop in (signal.SIGINT, signal.SIGTERM):  # also in the background of a script, where the first is ignored
        signal.signal(stop, signal.default_int_handler)
    number = int(sys.argv[2]) if len(sys.argv) > 2 else len(NODES)
    cluster = Slurm(Path(sys.argv[1]).resolve(), nodes=tuple(f"node{node}" for node in range(1, number + 1)))
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        cluster.stop()
