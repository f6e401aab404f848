"""What a run survives, measured: one small file per figure, see `experiments.torture.figures` for how to add one."""
