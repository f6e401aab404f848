"""LOST: Li et al., "LOST: Low-rank and Sparse Pre-training for Large Language Models", arXiv 2508.02668, 2025."""

from __future__ import annotations

from experiments.tables.schema import LOW_RANK, SMALL, Arm, Claim, Table

CITATION = 'Li et al., "LOST: Low-rank and Sparse Pre-training for Large Language Models", arXiv 2508.02668'
SHARE = 0.4


def lost(**arguments: object) -> str:
    """LOST at the table's share of the dense parameters."""
    said = "".join(f", {name}={value!r}" for name, value in arguments.items())
    return f"fit(lost(density=0.05{said}), params={SHARE})"


PRETRAIN = Table(
    name="lost",
    title="A nonlinear low-rank branch beside whole input channels, and what each part brings",
    citation=f"{CITATION}; the ablation is the one its reviewers asked for",
    bases={"cpu": "bytes", "gpu": "bytes", "paper": "c4_60m"},
    arms=(
        Arm("lost", {"structure": lost()}, note="gamma 0.7, SiLU and 5% of the channels are our choices"),
        Arm("lost, random channels", {"structure": lost(channels="random")}, tuned_with="lost"),
        Arm("lost, no nonlinearity", {"structure": lost(activation="identity")}),
        Arm("lost, random factors", {"structure": lost(factors="random")}, tuned_with="lost"),
        Arm(
            "cola",
            {"structure": f"fit(bottleneck(dense(), dense()), params={SHARE})"},
            note="the nonlinearity alone (Liu et al. 2025)",
        ),
        Arm("sltrain", {"structure": f"fit(low_rank() + random_sparse(density=0.03), params={SHARE})"}),
    ),
    reference="lost",
    claims=(
        Claim("LOST beats SLTrain at equal parameters", "Table 1", "lost", "sltrain"),
        Claim("SLTrain beats low rank at equal parameters", "Table 1", "sltrain", LOW_RANK),
        Claim("LOST beats low rank at equal parameters", "Table 1", "lost", LOW_RANK),
        Claim("LOST beats a narrower dense model of its size", "our ablation", "lost", SMALL),
        Claim(
            "the channels of largest remainder beat random ones", "reviewers' ablation", "lost", "lost, random channels"
        ),
        Claim("the nonlinearity helps", "reviewers' ablation", "lost", "lost, no nonlinearity"),
        Claim("starting from the SVD helps", "reviewers' ablation", "lost", "lost, random factors"),
        Claim("the channels help beside the nonlinearity", "reviewers' ablation", "lost", "cola"),
    ),
    remarks={
        "cpu": (
            "Why arms of half the parameters pass dense: 450 steps measure how fast a model learns, and the few channels that are "
            "whole take several times dense's rate, by their fan-in of 6. Which channels they are does not matter here: from a "
            "random start no channel stands out.",
            "Why the nonlinearity does not help: at the rate that is best for both, the branch learns these 450 steps faster "
            "without it; alone (cola) it is level with low rank, too. The paper trains for thousands of times as many tokens. The "
            "structure itself is tested against its definition (`tests/structures/test_lost.py`).",
        )
    },
)

TABLES = (PRETRAIN,)
