"""Time, state, and what the user sees: commands, the loop, metrics, checkpoints."""
