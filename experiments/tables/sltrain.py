"""SLTrain: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", 2024."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.tables.schema import DENSE, LOW_RANK, SMALL, Arm, Claim, Table, by_scale

CITATION = 'Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", NeurIPS 2024'
WIDTHS = {"cpu": 128, "gpu": 768, "paper": 512}
"""Of the models, by scale; ranks are a quarter of it."""


def low_rank(scale: str) -> str:
    """At the paper's own scale with its initialisation and alpha / rank = 0.25."""
    rank = WIDTHS[scale] // 4
    return f"scaled(low_rank(rank={rank}, init='paper'), s=0.25)" if scale == "paper" else f"low_rank(rank={rank})"


def sparse(scale: str, density: float = 0.03) -> str:
    """The fixed support."""
    return f"random_sparse(density={density}{', init=' + repr('paper') if scale == 'paper' else ''})"


def sltrain(scale: str, density: float = 0.03) -> str:
    """Both."""
    return f"{low_rank(scale)} + {sparse(scale, density)}"


def of(structure: Callable[[str], str], **changes: Any) -> dict[str, Any]:
    """Fields of an arm whose structure depends on the scale."""
    return by_scale(lambda scale: {"structure": structure(scale)} | changes)


PRETRAIN = Table(
    name="sltrain",
    title="Low rank plus a fixed random sparse matrix, trained from scratch",
    citation=f"{CITATION}, Table 2 (its full-rank 60M entry, as quoted in the issues of the paper's repository)",
    bases={"cpu": "bytes", "gpu": "bytes", "paper": "c4_60m"},
    arms=(
        Arm("sltrain", **of(sltrain), note="rank d/4 and 3% of the entries, as for 60M"),
        Arm(
            "sltrain, rebuilt",
            **of(lambda scale: f"rebuilt({sltrain(scale)})"),
            tuned_with="sltrain",
            note="the matrix is formed for each product and not kept, as the paper's code does",
        ),
        Arm("low rank, the same rank", **of(low_rank), tuned_with=LOW_RANK),
        Arm("sparse, the same entries", **of(sparse)),
        Arm(
            "sltrain, 8-bit moments",
            **of(sltrain, **{"optim.name": "adamw_8bit"}),
            tuned_with="sltrain",
            note="the option the paper takes at 7B",
        ),
        Arm("sltrain, 6%", **of(lambda scale: sltrain(scale, 0.06)), tuned_with="sltrain"),
    ),
    reference="sltrain",
    columns={"c4": "LLaMA 60M, C4 perplexity"},
    baselines_paper={DENSE: {"c4": 34.06}},
    claims=(
        Claim("the sparse part makes up for what low rank lacks", "Table 2", "sltrain", "low rank, the same rank"),
        Claim("SLTrain beats low rank of its size", "our ablation", "sltrain", LOW_RANK),
        Claim("SLTrain beats a narrower dense model of its size", "our ablation", "sltrain", SMALL),
        Claim(
            "low rank and sparse together beat sparse alone",
            "the paper's motivation",
            "sltrain",
            "sparse, the same entries",
        ),
        Claim("more entries are better", "Table 7", "sltrain, 6%", "sltrain"),
        Claim(
            "8-bit moments cost at most 0.01 bits",
            "Figure 3, by its use",
            "sltrain, 8-bit moments",
            "sltrain",
            within=0.01,
        ),
        Claim("SLTrain is at most 0.05 bits behind dense", "Table 2", "sltrain", DENSE, within=0.05),
    ),
    remarks={
        "cpu": (
            "The product, the support and the backward pass that rebuilds meet their "
            "dense equals (`tests/structures`), and the parameters of its models the paper's (`accounting.md`).",
        )
    },
)

TABLES = (PRETRAIN,)
