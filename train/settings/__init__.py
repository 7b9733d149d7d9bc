"""What can be set: strict trees of settings, those of a run and those of each command."""
