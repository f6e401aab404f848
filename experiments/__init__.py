"""Commands that run from a clone: training, comparison, tables of papers, benchmarks, launchers."""
