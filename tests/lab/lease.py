"""Many runs of the lab at once on one machine, for as long as it is lent.

A small model's steps wait for the host that launches them, so several processes share a GPU. Runs start in the order of
`tests.lab.arms.ORDER`; none starts that would not end in time, and whatever has ended is kept.
"""

import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from tests.lab import kept
from tests.lab.arms import ARMS, BASE, ORDER, SEEDS, run_name

PACE_STEPS = 80
RESERVE_S = 10.0  # of a lease, for what comes after its runs
START_S = 30.0  # of a run, beside its steps: imports, the first steps' compilations, measuring at the end
SHARE = 0.8  # of a lease's steps that the first group of arms is given
FEWEST, MOST, ROUND = 300, 2400, 50  # steps of a run


@dataclass
class Lease:
    """What is done with a machine.

    Attributes:
        slots: runs at once. deadline: `time.monotonic` at which all must have ended. bundle: an archive of what is
            kept, written anew after each run; None: none.
    """

    kept: Path
    scratch: Path
    slots: int
    deadline: float
    overrides: tuple[str, ...] = ()
    bundle: Path | None = None
    durations: dict[str, list[float]] = field(default_factory=dict)

    def start(self, arm: str, seed: int, *overrides: str, check: bool = False) -> subprocess.Popen:
        """Starts one run in a session of its own; what it prints goes into its file of the scratch directory."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, "-m", "tests.lab.one", f"--arm={arm}", f"--seed={seed}", f"--kept={self.kept}"]
        line += [f"--scratch={self.scratch}", *["--check"] * check, *self.overrides, *overrides]
        with (self.scratch / f"{run_name(arm, seed)}.txt").open("wb") as log:
            return subprocess.Popen(
                line, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
            )

    def left(self) -> float:
        """Seconds of the lease."""
        return self.deadline - time.monotonic()

    def expected(self, arm: str) -> float:
        """Seconds that a run of an arm will take, judged by those that have ended; 0 before any has."""
        own = self.durations.get(arm)
        if own:
            return max(own)
        each = [(seconds - START_S) / ARMS[name].cost for name, found in self.durations.items() for seconds in found]
        return START_S + ARMS[arm].cost * max(0.0, median(each)) if each else 0.0

    def train(self, wanted: list[tuple[str, int]], *overrides: str, check: bool = False) -> list[str]:
        """Trains what is wanted and not kept yet; the names of the runs that failed or found no time."""
        waiting = [pair for pair in wanted if not (self.kept / f"{run_name(*pair)}{kept.ENDING}").exists()]
        running: dict[tuple[str, int], tuple[subprocess.Popen, float]] = {}
        missed = []
        while (waiting or running) and self.left() > 0:
            while waiting and len(running) < self.slots:
                pair = waiting.pop(0)
                if self.expected(pair[0]) > self.left():
                    missed.append(f"{run_name(*pair)}: no time")
                else:
                    running[pair] = self.start(*pair, *overrides, check=check), time.monotonic()
            for pair in [pair for pair, (process, _) in running.items() if process.poll() is not None]:
                process, began = running.pop(pair)
                missed += self.ended(pair, process.returncode, time.monotonic() - began)
            time.sleep(0.2)
        for pair, (process, _) in running.items():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            missed.append(f"{run_name(*pair)}: stopped by the end of the lease")
        return missed + [f"{run_name(*pair)}: no time" for pair in waiting]

    def ended(self, pair: tuple[str, int], code: int, seconds: float) -> list[str]:
        """Notes the end of a run; a line for one that failed."""
        name = run_name(*pair)
        print(f"{name}: {seconds:.0f} s, exit code {code}; {self.left():.0f} s left", flush=True)
        if code:
            print(*(self.scratch / f"{name}.txt").read_text(errors="replace").splitlines()[-12:], sep="\n", flush=True)
            return [f"{name}: exit code {code}"]
        self.durations.setdefault(pair[0], []).append(seconds)
        if self.bundle:
            write_bundle(self.kept, self.bundle)
        return []


def write_bundle(folder: Path, bundle: Path) -> None:
    """One archive of all kept runs, whole or not at all."""
    draft = bundle.with_name(f".{bundle.name}.draft")
    with tarfile.open(draft, "w") as archive:
        for path in sorted(folder.glob(f"*{kept.ENDING}")):
            archive.add(path, path.name)
    os.replace(draft, bundle)


def step_seconds(lines: list[dict[str, Any]]) -> float:
    """Seconds of a step in the second half of a run, from the tokens and the speed of its logged lines."""
    late = [line for line in lines if line["step"] > lines[-1]["step"] / 2]
    tokens = lines[-1]["tokens"] / lines[-1]["step"]
    return median(tokens / line["tokens_per_second"] for line in late)


def pace(lease: Lease) -> float:
    """Steps a second that the machine does with all slots at work, of the base; what is trained for it is not kept."""
    own = Lease(lease.scratch / "pace", lease.scratch / "pace" / "runs", lease.slots, lease.deadline, lease.overrides)
    failed = own.train([(BASE, 100 + slot) for slot in range(lease.slots)], f"run.steps={PACE_STEPS}")
    found = [step_seconds(run["metrics"]) for run in kept.read_all(own.kept).values()]
    if not found:
        raise RuntimeError(f"no run came to its end: {failed}")
    print(f"pace: {len(found)} runs at once, {median(found) * 1000:.0f} ms a step of each", flush=True)
    return len(found) / median(found)


def steps_for(rate: float, seconds: float, slots: int) -> int:
    """Steps of a run with which the first group of arms takes its share of a lease, at ``rate`` steps a second."""
    first = [ARMS[arm].cost for arm in ORDER[0] for _ in SEEDS]
    waves = -(-len(first) // slots)
    # Some start while others train: only the first and half of the later starts keep the machine waiting.
    steps = rate * max(0.0, seconds * SHARE - (1 + waves) / 2 * START_S) / sum(first)
    return min(MOST, max(FEWEST, round(steps / ROUND) * ROUND))


def order(groups: tuple[tuple[str, ...], ...] = ORDER) -> list[tuple[str, int]]:
    """All runs in the order of a lease: group by group, seed by seed, the longest first so that few end alone."""
    longest = [sorted(group, key=lambda arm: -ARMS[arm].cost) for group in groups]
    return [(arm, seed) for group in longest for seed, arm in product(SEEDS, group)]
