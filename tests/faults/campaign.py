"""The campaign: runs that meet one fault after the other and must end as the undisturbed run did, bit for bit."""

import contextlib
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.harness import Injection, checkpoints, contents, losses, start, tokens
from tests.faults.injections import Fails, InSave, InStep, Poison, StaleDirectory
from tests.faults.runs import STEPS, campaign_config
from train.job.heartbeat import last_beat
from train.job.shelf import BROKEN, Shelf, why_broken
from train.settings.run import Config

ATTEMPTS = 8  # of a run, each with one fault; the last is left alone
FAULTS_A_RUN = 3
TOKENS = 8 * 32  # of a step
# Where a save can be hit: preparing, writing (in the process that writes), finalizing, renaming, deleting.
PHASES = {
    "prepare": "train.job.shelf.Shelf.prepare",
    "write": "parallel.checkpoint.writer.write_files",
    "finalize": "train.job.checkpoint.write_state",
    "rename": "train.job.shelf.Shelf.publish",
    "delete": "train.job.shelf.Shelf.delete",
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in a start of a run.

    Attributes:
        inject: what a worker does to itself. kill: whom the outside kills, at a random moment: front, rank or all.
        flip: a bit of the newest checkpoint is flipped before the start.
        late: it needs checkpoints to be there.
        ends: it ends the start, if it hits it.
    """

    name: str
    inject: Injection | None = None
    kill: str = ""
    flip: bool = False
    late: bool = False
    ends: bool = True


NONE = Fault("none")
# The third save, after step 9, has waited for the second one: two are whole.
PRELUDE = Fault("prelude", InStep(0, 10, "killed"))


@dataclass
class Reference:
    """The undisturbed run of some number of processes."""

    config: Config
    world: int
    seconds: float
    losses: dict[float, dict[str, float]]
    tokens: dict[str, str]
    contents: dict[int, dict[str, str]]


@dataclass
class Table:
    """What was tried, what the run survived, and what it lost."""

    tried: Counter = field(default_factory=Counter)
    lost: dict[str, list[str]] = field(default_factory=dict)

    def add(self, names: list[str], failure: str = "") -> None:
        """Notes the faults of a run; all of them are blamed where it failed."""
        self.tried.update(names)
        for name in names if failure else ():
            self.lost.setdefault(name, []).append(failure)

    def text(self) -> str:
        """The table, and what was lost."""
        width = max(map(len, self.tried), default=5)
        rows = [f"{'fault':{width}}  tried  survived  lost"]
        for name in sorted(self.tried):
            lost = len(self.lost.get(name, ()))
            rows.append(f"{name:{width}}  {self.tried[name]:5}  {self.tried[name] - lost:8}  {lost:4}")
        total, lost = self.tried.total(), sum(map(len, self.lost.values()))
        rows.append(f"{'all':{width}}  {total:5}  {total - lost:8}  {lost:4}")
        return "\n".join([*rows, *(f"LOST {name}: {why}" for name, all_ in self.lost.items() for why in all_)])


def make_reference(
    root: Path, corpus: Path, world: int, name: str = "reference", inject: Injection | None = None
) -> Reference:
    """Trains the run that the others are compared with; it keeps every checkpoint."""
    config = campaign_config(root, f"{name}_{world}", corpus, run={"keep": 0})
    code = start(config, world, config.run.path / "log", inject).wait()
    assert code == 0, (config.run.path / "log").read_text()[-3000:]
    run = config.run.path
    found = {step: contents(Shelf(config.run.checkpoints).path(step)) for step in checkpoints(run)}
    seconds = last_beat(run)["seconds"]["wall"]  # without the imports of the first start
    return Reference(config, world, seconds, by_step(run), tokens(run), found)


def by_step(run: Path) -> dict[float, dict[str, float]]:
    """The logged losses of a run by step."""
    return {line["step"]: line for line in losses(run)}


def run_through(reference: Reference, root: Path, corpus: Path, name: str, faults: list[Fault], seed: int) -> str:
    """Trains runs through one fault after the other, then to their end; what was lost, or nothing.

    A fault that came too late to hit anything is tried again in another run.
    """
    rng, left = random.Random(seed), list(faults)
    for number in range(ATTEMPTS):
        config = campaign_config(root, f"{name}_{number}", corpus, run={"keep": 2})
        try:
            failure, left = one_run(reference, config, left, rng)
        except AssertionError as error:
            failure = str(error)
        if failure or not left:
            return failure
    return f"{[fault.name for fault in left]} hit nothing in {ATTEMPTS} runs"


def one_run(reference: Reference, config: Config, faults: list[Fault], rng: random.Random) -> tuple[str, list[Fault]]:
    """One run to its end through as many of the faults as hit it; what was lost, and the faults that are left."""
    log = config.run.path / "log"
    queue = [fault for fault in faults for fault in ((PRELUDE, fault) if fault.late else (fault,))]
    for fault in [*queue, *[NONE] * 3]:
        code = attempt(reference, config, fault, rng, log)
        if failure := unsound(reference, config):
            return failure, []
        if code == 2:
            return f"exit code 2: {log.read_text()[-500:]}", []
        if code == 0:
            later = [] if fault is NONE else queue[queue.index(fault) + (not fault.ends) :]
            return difference(reference, config), [fault for fault in later if fault is not PRELUDE]
    return f"it did not end: {log.read_text()[-1500:]}", []


def attempt(reference: Reference, config: Config, fault: Fault, rng: random.Random, log: Path) -> int:
    """One start of the run with a fault; its exit code."""
    if fault.flip:
        flip_newest(config, rng)
    started = start(config, reference.world, log, fault.inject)
    if fault.kill:
        started.process.join(rng.uniform(0.1, 1.0) * reference.seconds)
        if started.process.is_alive():
            victims = {"front": [started.process.pid], "rank": [rng.choice(started.ranks)]}
            victims["all"] = [started.process.pid, *started.ranks]
            for pid in victims[fault.kill]:
                kill(pid)
    return started.wait()


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def flip_newest(config: Config, rng: random.Random) -> None:
    """Flips a bit somewhere in the newest checkpoint."""
    steps = checkpoints(config.run.path)
    if steps:
        directory = Shelf(config.run.checkpoints).path(steps[-1])
        flip(rng.choice(sorted(path for path in directory.iterdir() if path.stat().st_size)), rng)


def flip(path: Path, rng: random.Random) -> None:
    """Flips a bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def unsound(reference: Reference, config: Config) -> str:
    """What is wrong with the checkpoints that a start left: each that counts as whole must hold the true numbers."""
    shelf = Shelf(config.run.checkpoints)
    for step in checkpoints(config.run.path):
        if not why_broken(shelf.path(step), deep=True) and contents(shelf.path(step)) != reference.contents[step]:
            return f"the checkpoint of step {step} is taken for whole and holds other numbers"
    return ""


def difference(reference: Reference, config: Config) -> str:
    """How a finished run differs from the undisturbed one."""
    run = config.run.path
    if (
        checkpoints(run)[-1] != STEPS
        or contents(Shelf(config.run.checkpoints).path(STEPS)) != reference.contents[STEPS]
    ):
        return "the final weights, moments or counts are others"
    # A start that was killed between a save and the line of its step leaves that line out.
    logged = by_step(run)
    for step, line in logged.items():
        if line != reference.losses[step]:
            return f"step {step} has other losses: {line}, not {reference.losses[step]}"
    if tokens(run) != reference.tokens:
        return "other tokens were read"
    return ""


def random_kills(number: int, world: int, rng: random.Random) -> list[Fault]:
    """Kills of the front, of a rank and of all at random moments, and inside every phase of a save."""
    kinds: list[Callable[[], Fault]] = [
        lambda: Fault("kill -9 of the front", kill="front"),
        lambda: Fault("kill -9 of a rank", kill="rank"),
        lambda: Fault("kill -9 of all", kill="all"),
        *[_in_phase(phase, where, world, rng) for phase, where in PHASES.items()],
    ]
    return [kinds[index % len(kinds)]() for index in range(number)]


def _in_phase(phase: str, where: str, world: int, rng: random.Random) -> Callable[[], Fault]:
    def make() -> Fault:
        rank = rng.randrange(world) if phase == "write" else 0
        hit = InSave(rank, where, rng.choice((1, 2)), rng.random() < 0.5)
        return Fault(f"kill -9 in a save: {phase}", hit, ends=phase != "write")

    return make


def other_faults(world: int) -> list[Fault]:
    """Each of the other faults once."""
    writes = "parallel.checkpoint.writer._write_file"
    return [
        Fault("SIGSTOP of a rank", InStep(world - 1, 2, "stopped")),
        Fault("a rank hangs", InStep(0, 2, "stuck")),
        Fault("a rank ends as out of memory does", InStep(1, 2, "oom")),
        Fault("no room for a save", Fails(0, PHASES["prepare"], "ENOSPC"), ends=False),
        Fault("disk full while writing", Fails(1, writes, "ENOSPC"), ends=False),
        Fault("read-only directory", Fails(0, PHASES["prepare"], "EROFS"), ends=False),
        Fault("flipped bit in a checkpoint", flip=True, late=True, ends=False),
        Fault("stale directory on one rank", StaleDirectory(1), late=True, ends=False),
    ]


def flips(reference: Reference, root: Path, number: int, seed: int) -> list[str]:
    """Bits flipped all over a checkpoint, every kind of file in turn: the files whose damage was not seen."""
    rng, unseen = random.Random(seed), []
    source = Shelf(reference.config.run.checkpoints).path(STEPS)
    copy = root / f"flips_{reference.world}"
    shutil.copytree(source, copy)
    kinds = sorted(path.name for path in copy.iterdir() if path.stat().st_size)
    for index in range(number):
        path = copy / kinds[index % len(kinds)]
        flip(path, rng)
        if not why_broken(copy, deep=True):
            unseen.append(path.name)
        shutil.copy(source / path.name, path)
    return unseen


def poisoned(world: int) -> dict[str, Injection]:
    """Steps that are not finite, which are skipped."""
    return {
        f"NaN in a {passes} pass": Poison(world - 1, (4 * TOKENS,), passes, times=10**6)
        for passes in ("forward", "backward")
    }


def set_aside(config: Config) -> list[str]:
    """Names of the checkpoints that were found damaged."""
    return sorted(path.name for path in config.run.checkpoints.glob(f"*{BROKEN}"))
