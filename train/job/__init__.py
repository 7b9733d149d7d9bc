"""One run in one process: its directory, what it is built of, its checkpoints."""
