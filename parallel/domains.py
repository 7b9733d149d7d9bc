"""Who exchanges experts' rows with whom, where the holders of a layer's experts lie in several NVLink domains.

The ranks of a job lie domain by domain, and the holders of a layer's experts lie next to one another (`LINKS` of
`train.plan.step_time` has the order), so that those of a domain are consecutive.
"""

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.collectives import gather_numbers
from parallel.topology import Topology, TopologyError


@dataclass(frozen=True)
class ExpertDomains:
    """The NVLink domains of the holders of a layer's experts, as one of them sees them.

    Attributes:
        number_P: the domain of each holder, in order of rank. own: this process's.
        inside: the holders in its domain. across: the holder at its own place of each domain. None: rows travel in one
            step, between all holders.
    """

    number_P: tuple[int, ...]
    own: int
    inside: dist.ProcessGroup | None = None
    across: dist.ProcessGroup | None = None

    def leaving(self, rows: list[int]) -> int:
        """Rows that go to other domains, of those for each rank that a token's row is sent to first."""
        numbers = self.number_P if self.inside is None else self.number_P[:: self.inside.size()]
        return sum(size for size, number in zip(rows, numbers, strict=True) if number != self.own)


def require_alike(topology: Topology, device: torch.device) -> None:
    """Raises TopologyError, on every process, where launchers say different things: they would wait for each other."""
    found = sorted(set(gather_numbers(topology.nvlink_domain, device)))
    if len(found) > 1:
        raise TopologyError(
            f"the machines of this job start {' and '.join(map(str, found))} processes each: start as many on all "
            f"(NPROC), or set parallel.nvlink_domain, to 1 if nothing else fits"
        )


def expert_domains(topology: Topology, timeout: datetime.timedelta) -> ExpertDomains:
    """Starts the groups of a layout whose experts spread evenly over several domains; all processes call it alike."""
    holders, size, domains = topology.expert_owners, topology.nvlink_domain, topology.expert_domains
    rank = dist.get_rank()
    first = rank - rank % holders
    numbers, own = tuple(other // size for other in range(first, first + holders)), rank // size
    if domains == 1:
        return ExpertDomains(numbers, own)
    insides = [list(range(begin, begin + size)) for begin in range(0, topology.world, size)]
    places = [begin + place for begin in range(0, topology.world, holders) for place in range(size)]
    acrosses = [list(range(place, place + holders, size)) for place in places]
    inside, across = (dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0] for ranks in (insides, acrosses))
    return ExpertDomains(numbers, own, inside, across)
