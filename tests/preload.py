"""What every rank of a distributed test needs, imported once in the server that the ranks are forked from."""

from parallel.quiet import quiet_upstream

quiet_upstream()  # before megatron-core is imported

import train.loop  # noqa: E402, F401
