"""Two hosts on this machine: network namespaces joined by a cable that can be cut. Needs root and iproute2."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


def why_not() -> str:
    """Why there can be no such hosts here; nothing if there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "hosts of our own need root and iproute2"
    made = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", f"try{os.getpid()}"], check=True)
    return ""


class Hosts:
    """The namespaces and the cable between them."""

    def __init__(self, number: int) -> None:
        self.names = tuple(f"host{number}{letter}" for letter in "ab")
        self.addresses = ("10.213.7.1", "10.213.7.2")

    def command(self, host: int, *command: str) -> list[str]:
        """A command line that runs on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def make(self) -> None:
        """Makes both, connected."""
        for name in self.names:
            _run("ip", "netns", "add", name)
        first, second = self.names
        _run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")

    def cut(self) -> None:
        """Cuts the cable: packets vanish, and no connection is closed."""
        _run("ip", "-n", self.names[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Joins it again."""
        _run("ip", "-n", self.names[1], "link", "set", "eth0", "up")

    def remove(self) -> None:
        """Removes both."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts for as long as they are needed."""
    hosts = Hosts(os.getpid())
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
