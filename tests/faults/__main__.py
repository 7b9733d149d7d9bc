"""``python -m tests.faults [--kills 50] [--processes 2 4] [--seed 0]``: the campaign, and its table at the end."""

import argparse
import random
import signal
import sys
import tempfile
import time
from itertools import batched
from pathlib import Path

from tests.faults.campaign import (
    FAULTS_A_RUN,
    Fault,
    Table,
    flips,
    make_reference,
    other_faults,
    poisoned,
    random_kills,
    run_through,
)
from tests.faults.disks import spoilt_disks, why_not
from tests.faults.runs import make_corpus

FLIPS = 100


def campaign(table: Table, kills: int, processes: list[int], seed: int, root: Path) -> None:
    """Runs with so many kills and every other fault, on each number of processes; notes what became of them."""
    corpus = make_corpus(root)
    for world in processes:
        rng = random.Random(f"{seed} {world}")
        reference = make_reference(root, corpus, world)
        print(f"{world} processes: the undisturbed run took {reference.seconds:.1f} s", flush=True)
        unseen = flips(reference, root, FLIPS // len(processes), seed + world)
        for index in range(FLIPS // len(processes)):
            table.add(["bit flip, seen before it is read"], unseen[index] if index < len(unseen) else "")
        faults = [*random_kills(kills // len(processes), world, rng), *other_faults(world)]
        rng.shuffle(faults)
        for number, chosen in enumerate(batched(faults, FAULTS_A_RUN)):
            begin, names = time.monotonic(), [fault.name for fault in chosen]
            failure = run_through(reference, root, corpus, f"run_{world}_{number}", list(chosen), seed + number)
            table.add(names, failure)
            seconds = time.monotonic() - begin
            print(f"  {'LOST' if failure else 'survived'} {', '.join(names)} ({seconds:.1f} s)", flush=True)
        for name, failure in spoilt_disks(reference, root, corpus).items() if not why_not(root) else ():
            table.add([name], failure)
            print(f"  {'LOST' if failure else 'survived'} {name}", flush=True)
        for number, (name, poison) in enumerate(poisoned(world).items()):
            skipped = make_reference(root, corpus, world, f"poisoned_{number}", poison)
            kill = Fault("kill -9 of all", poison, kill="all")
            again = Fault(name, poison, ends=False)
            failure = run_through(skipped, root, corpus, f"nan_{world}_{number}", [kill, again], seed)
            table.add([name, kill.name], failure)


def main() -> int:
    """The exit code: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the table of what was tried until then
    table = Table()
    try:
        with tempfile.TemporaryDirectory(prefix="faults_") as root:
            if reason := why_not(Path(root)):
                print(f"not tried: {reason}", flush=True)
            campaign(table, arguments.kills, arguments.processes, arguments.seed, Path(root))
    finally:
        print(table.text(), flush=True)
    return 1 if table.lost else 0


if __name__ == "__main__":
    sys.exit(main())
