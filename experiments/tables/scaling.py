"""Scaling of structures with compute: Qiu et al. 2024, "Compute Better Spent", and Potapczynski et al. 2024.

Every structure at several widths on regression of a random network, one pass over fresh data; the exponent of the error
against the FLOPs of a forward pass is fitted for every seed.
"""

from __future__ import annotations

import math

import numpy as np

from experiments.tables.bases import teacher
from experiments.tables.judge import interval
from experiments.tables.results import Results, cost_of
from experiments.tables.schema import DENSE, Arm, Claim, Table

CITATION = (
    'Qiu et al., "Compute Better Spent: Replacing Dense Layers with Structured Matrices", ICML 2024; the task is that of '
    'Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS '
    "2024"
)
HIDDEN = "layers_[1-9] -> "
"""The first layer has 8 inputs and stays dense."""
WIDTHS = {
    "dense": (64, 128, 512),
    "block tensor train": (144, 256, 576, 1024),
    "monarch": (144, 256, 576, 1024),
    "low rank": (144, 256, 576, 1024),
    "kronecker": (256, 576, 1024),
    "tensor train": (256, 576, 1024),
    "block tensor train, dense rate": (256, 576, 1024),
    "block tensor train, one rate": (256, 576, 1024),
    "block tensor train, weight norm": (256, 576, 1024),
}
UNAWARE = ("dense rate", "one rate")
"""dense rate: what muP gives a dense layer of the width, in inverse proportion to it. one rate: the same at every width."""
RATE = teacher().optim.lr
MIDDLE = {name: 256 for name in WIDTHS}
"""Width at which a structure's rate is tuned; the others take it over, as muP promises."""
PAPER = {
    "dense": (0.104, 0.126),
    "block tensor train": (0.119, 0.157),
    "monarch": (0.095, 0.127),
    "low rank": (0.095, 0.134),
    "kronecker": (0.037, 0.039),
    "tensor train": (0.050, 0.056),
}
"""Exponents of train error against FLOPs, CIFAR-10 and CIFAR-100, read off bar plots in the paper's repository to 0.003."""


def text_of(name: str, width: int) -> str:
    """The structure of a square layer; all but Monarch with about 2 width^1.5 multiply-adds, it with twice a quarter."""
    root = math.isqrt(width)
    btt = "block_tensor_train(rank=1, order='blocked')"
    return (
        HIDDEN
        + {
            "block tensor train": btt,
            "block tensor train, dense rate": btt,
            "block tensor train, one rate": btt,
            "block tensor train, weight norm": f"weight_norm({btt})",
            "monarch": "monarch(blocks=4, order='blocked')",
            "low rank": f"low_rank(rank={root})",
            "kronecker": "kronecker()",
            "tensor train": "tensor_train(rank=2)",
        }[name]
    )


def arms() -> tuple[Arm, ...]:
    """Every structure at every width."""
    found = []
    for name, widths in WIDTHS.items():
        for width in widths:
            changes = {"model.width": width} | ({} if name == "dense" else {"structure": text_of(name, width)})
            if name.endswith(UNAWARE):
                changes["mup.enabled"] = False
            if name.endswith("dense rate"):
                changes["optim.lr"] = RATE * MIDDLE[name] / width
            first = DENSE if name == "dense" or name.endswith(UNAWARE) else f"{name}, {MIDDLE[name]}"
            label = f"{name}, {width}"
            found.append(Arm(label, changes, tuned_with="" if label == first else first))
    return tuple(found)


def points(results: Results, name: str) -> list[tuple[int, list[float]]]:
    """(FLOPs of a forward pass, mse of every seed) of a structure's widths that all seeds ended."""
    labels = [f"{name}, {width}" for width in WIDTHS[name]] + [DENSE] * (name == "dense")
    lines = [results.line(label) for label in labels]
    seeds = results.plan.base.seeds
    found = [(cost_of(line.row.config).flops, line.figures("mse")) for line in lines]
    return sorted((flops, values) for flops, values in found if len(values) == seeds)


def exponents(found: list[tuple[int, list[float]]]) -> list[float]:
    """The b of mse = a FLOPs^-b by least squares in logarithms, of every seed."""
    logs = np.log([flops for flops, _ in found])
    return [-float(np.polyfit(logs, np.log(values), 1)[0]) for values in zip(*(values for _, values in found))]


def fits(results: Results) -> str:
    """Markdown: exponents with their 95% intervals, beside the paper's."""
    rows = []
    for name in WIDTHS:
        found = points(results, name)
        if len(found) < 3:
            continue
        own = exponents(found)
        low, high = interval(own)
        paper = [f"{v:.3f}" for v in PAPER[name]] if name in PAPER else ["", ""]
        rows.append(
            f"| {name} | {len(found)} | {np.mean(own):.3f} | {low:.3f} to {high:.3f} | {paper[0]} | {paper[1]} |"
        )
    if not rows:
        return "No structure has three widths yet, so no exponent is fitted."
    head = "| exponent of the error against FLOPs | widths | ours | 95% interval over seeds | paper: CIFAR-10 | paper: CIFAR-100 |"
    note = (
        "mse = a FLOPs^-b, fitted for every seed over the widths. The paper's are of training error on other tasks, read off "
        "bar plots: the order is what compares. At these sizes biases and the dense first and last layers are part of the FLOPs."
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows, "", note])


SCALING = Table(
    name="scaling",
    title="Error against compute over widths, for dense and structured hidden layers",
    citation=CITATION,
    bases={"cpu": "teacher"},
    arms=arms(),
    reference="block tensor train, 256",
    low_rank=HIDDEN + "fit(low_rank(), params={share})",
    claims=(
        Claim(
            "block tensor train beats dense of its FLOPs (1024 against 256)", "exponents of the repository's plots",
            "block tensor train, 1024", DENSE,
        ),
        Claim(
            "block tensor train beats low rank of its FLOPs", "exponents", "block tensor train, 1024", "low rank, 1024"
        ),
        Claim("block tensor train beats Kronecker of its FLOPs", "exponents", "block tensor train, 1024", "kronecker, 1024"),
        Claim(
            "block tensor train beats tensor train, which takes twice the FLOPs", "exponents",
            "block tensor train, 1024", "tensor train, 1024",
        ),
        Claim(
            "block tensor train beats a Monarch of more FLOPs (1024 against 576, 4 blocks)", "exponents",
            "block tensor train, 1024", "monarch, 576",
        ),
        Claim(
            "block tensor train needs larger rates than a dense layer of its width", "Figure 1c",
            "block tensor train, 1024", "block tensor train, dense rate, 1024",
        ),
        Claim(
            "rates by structure and width beat one rate for all widths", "our ablation",
            "block tensor train, 1024", "block tensor train, one rate, 1024",
        ),
        Claim(
            "weight normalisation costs an MLP nothing (within 0.002)", "our ablation; the paper needs it for GPT-2",
            "block tensor train, weight norm, 1024", "block tensor train, 1024", within=0.002,
        ),
    ),
    remarks={
        "cpu": (
            "Why one rate for all widths does better here: the rates by structure and width are tuned at width 256, and the best "
            "there gives the cores of the widest model about twice the best single rate; on this smooth target, with 500 steps, the "
            "lower one wins, and more so the wider the model. What the paper compares with is the rate of a dense layer of the same "
            "width. The exponents of Kronecker and tensor train are above the paper's, "
            "and above that of block tensor train: few widths, from far behind; at equal FLOPs both stay behind it at every width.",
        )
    },
    extra=fits,
)  # fmt: skip

TABLES = (SCALING,)
