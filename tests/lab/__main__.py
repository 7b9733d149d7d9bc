"""The lab: comparisons of arms with several seeds, in a lease of one machine, and the page of what came out.

    python -m tests.lab.corpus                             the corpus, once
    python -m tests.lab list                               comparisons and arms
    python -m tests.lab run [a b ...] [--slots 12] [--seconds 540] [--steps 1200 | --steps auto]
    python -m tests.lab page                               tests/lab/RESULTS.md and its plots from the kept runs
    python -m tests.lab unpack DIR                         kept runs as run directories, for ./launch.sh report

`run` trains what is not kept yet of the comparisons that it names, of all by default, and may be given again: all runs
that are kept are equally long. With ``--steps auto`` it first measures how fast the machine is and chooses how long.
``--miniature`` is for a machine without a GPU: every arm in little, for three steps. A lease of a whole GPU, of which
one file comes back:

    python -m tests.lab run --check --slots 14 --seconds 560 --steps auto --bundle runs/lab.tar
"""

import argparse
import sys
import time
from pathlib import Path

from tests.lab import kept
from tests.lab.arms import ARMS, COMPARISONS, MINIATURE, STEPS
from tests.lab.lease import RESERVE_S, Lease, order, pace, steps_for
from tests.lab.page import PAGE, write_page
from train.watch import metrics

MINIATURE_STEPS, CHECKED_STEPS = 3, 30  # the first evaluations and packed batches compile kernels too


def list_all() -> None:
    """Prints comparisons and arms."""
    for letter, comparison in COMPARISONS.items():
        print(f"{letter}  {comparison.title}. {comparison.question}")
        for base, arm in comparison.pairs:
            differs = " ".join((*ARMS[arm].overrides, *ARMS[arm].seams)) or "the recipe"
            print(f"     {arm} against {base}: {differs}")


def number_of_steps(asked: argparse.Namespace, lease: Lease) -> int:
    """How long the runs are: as long as those that are kept, or as asked, or as the machine is fast.

    Raises:
        ValueError: those that are kept are of another length than what is asked for.
    """
    lengths = {run["metrics"][-1][metrics.STEP] for run in kept.read_all(asked.kept).values()}
    asked_for = {int(asked.steps)} if asked.steps.isdecimal() else set()
    if len(lengths | asked_for) > 1:
        raise ValueError(f"--steps {asked.steps} beside kept runs of {sorted(lengths)} steps: choose another --kept")
    if lengths or asked_for:
        return max(lengths | asked_for)
    if asked.steps == "auto":
        return steps_for(pace(lease), lease.left(), asked.slots)
    return MINIATURE_STEPS if asked.miniature else STEPS


def run(asked: argparse.Namespace) -> int:
    """Trains what the command line names."""
    named = {arm for letter in asked.comparisons or COMPARISONS for arm in COMPARISONS[letter].arms}
    wanted = [(arm, seed) for arm, seed in order() if arm in named and seed in asked.seeds]
    overrides = (*(MINIATURE if asked.miniature else ()), *asked.set)
    deadline = time.monotonic() + asked.seconds - RESERVE_S
    lease = Lease(asked.kept, asked.scratch, asked.slots, deadline, overrides, asked.bundle)
    if asked.check:
        checked = Lease(asked.scratch / "check", asked.scratch / "check" / "runs", 1, deadline, overrides)
        steps = MINIATURE_STEPS if asked.miniature else CHECKED_STEPS
        failed = checked.train([("1 step", 99)], f"run.steps={steps}", "optim.warmup_steps=1", check=True)
        if failed:
            print("\n".join(failed), file=sys.stderr)
            return 1
    steps = number_of_steps(asked, lease)
    print(f"{len(wanted)} runs of {steps} steps; {lease.left():.0f} s left", flush=True)
    missed = lease.train(wanted, f"run.steps={steps}")
    print("\n".join(["all done"] if not missed else ["not done:", *missed]), flush=True)
    return 0


def main() -> int:
    """One of the commands above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    runs = commands.add_parser("run")
    runs.add_argument("comparisons", nargs="*", metavar="LETTER", help=f"of {', '.join(COMPARISONS)}; all by default")
    runs.add_argument("--slots", type=int, default=1, help="runs at once")
    runs.add_argument("--seconds", type=float, default=1e9, help="after which all is over")
    runs.add_argument("--steps", default="", help=f"of each run, or auto; {STEPS} by default")
    runs.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    runs.add_argument("--scratch", type=Path, default=Path("runs/lab"), help="directory for what is not kept")
    runs.add_argument("--bundle", type=Path, help="archive of what is kept, written anew after each run")
    runs.add_argument("--check", action="store_true", help="first a short run that compares kernels with their twins")
    runs.add_argument("--miniature", action="store_true", help="every arm in little")
    runs.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs")
    page = commands.add_parser("page")
    page.add_argument("--output", type=Path, default=PAGE)
    unpack = commands.add_parser("unpack")
    unpack.add_argument("output", type=Path)
    for command in (runs, page, unpack):
        command.add_argument("--kept", type=Path, default=kept.KEPT, help="directory of kept runs")
    asked = parser.parse_args()
    if asked.command == "run" and (unknown := sorted(set(asked.comparisons) - set(COMPARISONS))):
        parser.error(f"no comparison {unknown[0]}: {', '.join(COMPARISONS)}")
    try:
        if asked.command == "run":
            return run(asked)
        if asked.command == "list":
            list_all()
        elif asked.command == "page":
            write_page(kept.read_all(asked.kept), asked.output)
        else:
            print("\n".join(map(str, kept.unpack(asked.kept, asked.output))))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
