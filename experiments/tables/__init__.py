"""Tables of papers, run at our scales: `python -m experiments.tables list | run NAME | show NAME | report`."""
