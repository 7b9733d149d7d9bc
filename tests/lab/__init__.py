"""The lab: what the parts of the architecture do, measured small and with several seeds. ``python -m tests.lab``."""
