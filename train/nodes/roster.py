"""The fronts of a job on several nodes: they meet at a store that node 0 holds, and notice when one is gone.

Node 0 says who takes part in each *attempt* (one start of all workers). With a fixed number of nodes there is one
attempt, and a lost node ends the job on all the others; with NNODES=1:4 those that are left, or have come, start
another one from the last checkpoint.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from train.job.starter import RESUMABLE
from train.nodes.place import Nodes, host_name

BEAT_S = 1.0
LOST_S = 30.0  # without a sign of life
JOIN_S = 600.0  # until node 0, or enough others, must be there
MORE_S = 20.0  # how long further nodes are waited for once there are enough
CONNECT_S = 5.0
LEAVE_S = 30.0
LAST_S = 10.0


class NodeLost(Exception):
    """A node is not there, or not any more; the message names it."""


@dataclass(frozen=True)
class Attempt:
    """One start of all workers.

    Attributes:
        number: counts attempts.
        members: numbers of the nodes that take part, in order.
        time: names the logs, the same on all.
    """

    number: int
    members: tuple[int, ...]
    time: str


class Roster:
    """This node's front among the others.

    Args:
        interrupt: ends this node's workers at once; called from another thread.
    Attributes:
        lost: what to tell the user of a node that is gone, once one is.
        gone: hosts that node 0 has seen no sign of life of.
    """

    def __init__(self, nodes: Nodes, interrupt: Callable[[], None], lost_s: float = LOST_S) -> None:
        self.nodes, self._interrupt, self._lost_s = nodes, interrupt, lost_s
        self.lost, self._attempt, self._ended = "", -1, False
        self.gone: list[str] = []
        self._heard = time.monotonic()
        self._beats: dict[int, tuple[str, float]] = {}
        self._store, self._line = self._connect(), self._connect()
        self._store.set(f"node/{nodes.rank}", host_name())
        if nodes.rank == 0:
            self._store.set("lost", "")
            self._store.set("attempt", "-1")
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def _connect(self) -> TCPStore:
        """A connection of its own: a store's calls wait for each other."""
        deadline, nodes = time.monotonic() + JOIN_S, self.nodes
        while True:
            try:
                store = TCPStore(
                    nodes.address,
                    nodes.port,
                    is_master=nodes.rank == 0,
                    timeout=timedelta(seconds=CONNECT_S),  # short: a signal is heard in between
                    wait_for_workers=False,
                    multi_tenant=True,
                )
                break
            except (RuntimeError, ValueError) as error:
                where = f"MASTER_ADDR={nodes.address}:{nodes.port}"
                if nodes.rank == 0:
                    raise NodeLost(f"node 0 ({host_name()}) cannot listen at {where}: {error}") from error
                if time.monotonic() > deadline:
                    raise NodeLost(f"node {nodes.rank} ({host_name()}) finds no node 0 at {where}") from error
        store.set_timeout(timedelta(seconds=self._lost_s))
        return store

    def name(self, node: int) -> str:
        """A node as messages call it."""
        known = self._line.check([f"node/{node}"])
        return f"node {node} ({self._line.get(f'node/{node}').decode()})" if known else f"node {node}"

    def together(self, prepare: Callable[[], object]) -> None:
        """Runs ``prepare`` on node 0, while the others wait for it.

        Raises:
            NodeLost: elsewhere, where it failed on node 0. What ``prepare`` raises, on node 0.
        """
        if self.nodes.rank == 0:
            try:
                prepare()
            except BaseException as error:
                self._store.set("prepared", f"node 0 ended: {error}")
                self._wait_until(lambda: self._left() >= len(self._present()) - 1, LEAVE_S)
                raise
            self._store.set("prepared", "")
            return
        self._wait_until(lambda: self._store.check(["prepared"]))
        if failure := self._store.get("prepared").decode():
            self._store.add("left", 1)
            raise NodeLost(failure)

    def next_attempt(self) -> Attempt:
        """The next attempt that this node takes part in; on node 0, decides on it.

        Raises:
            NodeLost: too few nodes have come, or one is gone.
        """
        if self.nodes.rank == 0 and self._decided() <= self._attempt:
            self._decide(self._gather())
        while True:
            self._wait_until(lambda: self._decided() > self._attempt)
            self._attempt = self._decided()
            value = json.loads(self._store.get(f"members/{self._attempt}"))
            if self.nodes.rank in value["members"]:
                return Attempt(self._attempt, tuple(value["members"]), value["time"])

    def end(self, attempt: Attempt, code: int, text: str) -> tuple[int, str]:
        """Tells how this node's workers have ended; returns the exit code and the words of the one that ended first.

        Waits for the other nodes, of which one may be the reason, or gone.
        """
        if self.lost:
            return RESUMABLE, self.lost
        key = f"end/{attempt.number}"
        first = json.loads(self._store.compare_set(key, "", json.dumps([self.nodes.rank, code, text])))
        self._store.set(f"{key}/{self.nodes.rank}", str(code))
        patience = self._lost_s + 5 if code else LEAVE_S
        others = [node for node in attempt.members if node != self.nodes.rank]
        self._wait_until(
            lambda: self.again or self._store.check([f"{key}/{node}" for node in others]), patience, may_fail=False
        )
        node, code, text = first
        if code in (0, RESUMABLE) or node == self.nodes.rank:
            return code, text
        return code, f"{self.name(node)} ended first: {text.splitlines()[-1] if text else f'exit code {code}'}"

    @property
    def again(self) -> bool:
        """Whether there is to be another attempt: node 0 has decided on it."""
        return not self.lost and self._decided() > self._attempt

    def leave(self) -> None:
        """Says goodbye; node 0, which holds the store, is the last to go."""
        if self.lost:
            self._ended = True
            return
        self._store.add("left", 1)
        if self.nodes.rank == 0:
            self._wait_until(lambda: self._left() >= len(self._present()), LEAVE_S, may_fail=False)
        self._ended = True

    def _decided(self) -> int:
        return int(self._store.get("attempt"))

    def _left(self) -> int:
        return self._store.add("left", 0)

    def _present(self) -> list[int]:
        """Nodes that have come and are not lost."""
        came = [node for node in range(self.nodes.most) if self._line.check([f"node/{node}"])]
        return [node for node in came if not self._line.check([f"gone/{node}"])]

    def _gather(self) -> list[int]:
        """Nodes for the first attempt: all, or enough and those that come soon after."""
        self._wait_until(lambda: len(self._present()) >= self.nodes.least, JOIN_S, may_fail=False)
        if len(self._present()) < self.nodes.least:
            missing = ", ".join(str(node) for node in range(self.nodes.most) if node not in self._present())
            raise NodeLost(f"node 0 ({host_name()}) has waited {JOIN_S:.0f} s for node {missing}")
        self._wait_until(lambda: len(self._present()) == self.nodes.most, MORE_S, may_fail=False)
        return self._present()

    def _decide(self, members: list[int]) -> None:
        number = int(self._line.get("attempt")) + 1
        self._line.set(f"members/{number}", json.dumps({"members": members, "time": time.strftime("%Y%m%d-%H%M%S")}))
        self._line.set("attempt", str(number))

    def _wait_until(self, done: Callable[[], bool], seconds: float = float("inf"), may_fail: bool = True) -> None:
        """Looks often, so that signals are heard. ``may_fail``: a lost node is an error."""
        deadline = time.monotonic() + seconds
        while not self.lost and time.monotonic() < deadline:
            if done():
                return
            time.sleep(0.1)
        if self.lost and may_fail:
            raise NodeLost(self.lost)

    def _beat(self) -> None:
        """A thread: gives a sign of life, looks for those of others, and hears what node 0 has decided."""
        line, rank, number = self._connect(), self.nodes.rank, 0
        while not self._ended:
            try:
                number += 1
                line.set(f"beat/{rank}", str(number))
                decided, lost = int(line.get("attempt")), line.get("lost").decode()
                self._heard = time.monotonic()
                if rank == 0:
                    self._look(line)
            except RuntimeError:  # the watch will say so, if it lasts
                time.sleep(BEAT_S)
                continue
            if lost:
                self._lose(lost)
            elif decided > self._attempt >= 0:
                self._interrupt()
            time.sleep(BEAT_S)

    def _watch(self) -> None:
        """A thread: a call to a store that has vanished may never return."""
        while not self._ended and not self.lost:
            time.sleep(BEAT_S)
            if time.monotonic() - self._heard > self._lost_s and self.nodes.rank:
                self._lose(
                    f"node {self.nodes.rank} ({host_name()}) has heard nothing of node 0 at {self.nodes.address}:"
                    f"{self.nodes.port} for {self._lost_s:.0f} s: it is gone, or the network between them is"
                )
                self._end_at_last()

    def _end_at_last(self) -> None:
        """Ends this front where its first thread waits for an answer of the store for ever."""
        deadline = time.monotonic() + LAST_S
        while not self._ended and time.monotonic() < deadline:
            time.sleep(0.1)
        if not self._ended:
            print(f"error: {self.lost}", file=sys.stderr, flush=True)
            os._exit(RESUMABLE)

    def _look(self, line: TCPStore) -> None:
        """Node 0 looks at the signs of life of the others."""
        now = time.monotonic()
        for node in range(1, self.nodes.most):
            if not line.check([f"beat/{node}"]):
                continue
            sign = line.get(f"beat/{node}").decode()
            before, since = self._beats.get(node, ("", now))
            self._beats[node] = (sign, now if sign != before else since)
            if now - self._beats[node][1] > self._lost_s and not line.check([f"gone/{node}"]):
                self._gone(line, node)

    def _gone(self, line: TCPStore, node: int) -> None:
        line.set(f"gone/{node}", "")
        self.gone.append(line.get(f"node/{node}").decode())
        words = f"{line.get(f'node/{node}').decode()}) has given no sign of life for {self._lost_s:.0f} s"
        words = f"node {node} ({words}: it is gone, or the network between it and node 0 ({host_name()}) is"
        left = self._present()
        if len(left) >= self.nodes.least:
            print(f"{words}; going on with {len(left)} of at most {self.nodes.most} nodes", flush=True)
            self._decide(left)
            self._interrupt()
        else:
            line.set("lost", words)
            self._lose(words)

    def _lose(self, words: str) -> None:
        if not self.lost:
            self.lost = words
            self._interrupt()
