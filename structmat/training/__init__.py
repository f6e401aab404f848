"""State, step, loop, checkpoints, metrics, progress and the Record of a run."""
