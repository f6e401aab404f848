"""R8: the same config run again, in another process, gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.torture.children import results
from experiments.torture.figures import Trial, figure
from experiments.torture.runs import Tiny, bits, examples, run

SUM = "low_rank(rank=4) + random_sparse(density=0.1)"


def train_all(report: Callable[[Any], None], tinies: Sequence[Tiny], folder: Path) -> None:
    """Reports (index, digest of state and metrics) of every run."""
    for n, tiny in enumerate(tinies):
        run(lambda step: None, tiny, folder / str(n))
        report((n, bits(folder / str(n))))


@figure("R8", "every family trained three times, each in another process: equal to the bit", least=25)
def reruns(trial: Trial, structures: Sequence[str] | None = None, times: int = 3, steps: int = 20) -> None:
    """Each of `structures` (default: every family's example, a sum, and one with a rule), `times` times."""
    texts = [*examples(), SUM] if structures is None else structures
    tinies = [Tiny(text, steps=steps, every=steps) for text in texts] + [Tiny(rule=True, steps=steps, every=steps)]
    found = [
        dict(results(train_all, tinies, trial.folder / str(n), log=trial.folder / f"{n}.log")) for n in range(times)
    ]
    for n, tiny in enumerate(tinies):
        digests = {each[n] for each in found}
        trial.check(tiny.structure + " with a rule" * tiny.rule, len(digests) == 1, f"{len(digests)} different results")
    trial.notes |= {"runs": times * len(tinies), "steps each": steps}
