"""A worker and the process that started it: it ends with that process, and the run's time counts from its start."""

import ctypes
import os
import signal
import sys
import threading
import time

import psutil

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
WATCH_S = 1.0
RESUMABLE = 75  # EX_TEMPFAIL of <sysexits.h>: the same command goes on from here
SAVING = signal.SIGUSR2  # save, and go on


def end_with_starter() -> None:
    """Makes this process end when its starter does, whatever ends that: nobody could stop or resume it any more.

    Linux kills it at once. Elsewhere, and where the starter's id alone changes hands, a thread looks every second.
    To be called before anything slow is imported.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_watch, args=(os.getppid(),), name="starter", daemon=True).start()


def _watch(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGKILL)


def starter_began() -> float:
    """When the process that started this one began, in seconds since 1970: before imports, corpora and loading."""
    return float(psutil.Process(os.getppid()).create_time())


def stop_while_starting() -> None:
    """Until there is something to save, a request to stop ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(RESUMABLE))
    signal.signal(SAVING, signal.SIG_IGN)
    # Its starter has held these two back, so that none ended a process that did not know them yet.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, SAVING})
