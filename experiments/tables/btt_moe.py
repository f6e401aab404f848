"""BTT-MoE: Potapczynski et al. 2024, experts in every linear layer at the FLOPs of a few of them."""

from __future__ import annotations

from typing import Any

from experiments.tables.schema import DENSE, Arm, Claim, Table, by_scale

HIDDEN = "layers_[1-9] -> "
WIDTH = 576
EQUAL = 244
"""Width of the dense model with the FLOPs of 8 experts of which 2 are active."""
MOE = "btt moe, 8 experts"


def of(structure: str) -> dict[str, object]:
    """The changes of an arm of the common width."""
    return {"model.width": WIDTH, "structure": HIDDEN + structure}


BTT_MOE = Table(
    name="btt_moe",
    title="Experts in every layer, two active, against a block tensor train and dense of the same FLOPs",
    citation=(
        'Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices", '
        "NeurIPS 2024; its multipliers of compute are not known to us"
    ),
    bases={"cpu": "teacher"},
    arms=(
        Arm(MOE, of("btt_moe(experts=8)"), note="all experts are computed: steps cost four times the FLOPs shown"),
        Arm("btt moe, 4 experts", of("btt_moe(experts=4)"), tuned_with=MOE),
        Arm("btt moe, 16 experts", of("btt_moe(experts=16)"), tuned_with=MOE),
        Arm("btt moe, no balance", of("btt_moe(experts=8, balance=0.0)"), tuned_with=MOE),
        Arm("btt, rank 2", of("block_tensor_train(rank=2, order='blocked')"), note="the FLOPs but for the gate"),
        Arm(
            "btt, rank 8",
            of("block_tensor_train(rank=8, order='blocked')"),
            tuned_with="btt, rank 2",
            note="the parameters",
        ),
        Arm("dense, the same FLOPs", {"model.width": EQUAL}, tuned_with=DENSE),
    ),
    reference="btt, rank 2",
    low_rank=HIDDEN + "fit(low_rank(), params={share})",
    claims=(
        Claim("BTT-MoE beats dense of its FLOPs", "Figures 6 and 7", MOE, "dense, the same FLOPs"),
        Claim("BTT-MoE beats a block tensor train of its FLOPs", "Figure 6", MOE, "btt, rank 2"),
        Claim("more experts help", "Figure 6, 8 to 16", "btt moe, 16 experts", MOE),
        Claim("the balance term helps", "our ablation", MOE, "btt moe, no balance"),
    ),
    remarks={
        "cpu": (
            "Why the balance term costs, and BTT-MoE is behind what has its FLOPs: the term has a weight of 0.01, which suits a "
            "cross entropy of nats; here it is 0.021 beside an error of 0.05 (`auxiliary` and `mse` of the records). Without it "
            "the error is 0.040, below those of dense (0.042) and of the block tensor train (0.041) of the same FLOPs.",
            "Why more experts do not help: each of 16 sees half as many points as each of 8, and their balance costs as much. "
            "Product, gate and gradients meet a loop over experts (`tests/structures`).",
        )
    },
)

WIDTHS = {"cpu": (100, 4), "paper": (2048, 32)}
"""Width and heads of block tensor trains in a language model, by scale."""
NARROW = {"cpu": (64, 4), "paper": (512, 16)}
"""Of the dense model with the FLOPs of two experts."""


def sized(sizes: dict[str, tuple[int, int]], **changes: object) -> dict[str, Any]:
    """Fields of an arm whose width and heads depend on the scale."""
    fields = lambda scale: {"model.width": sizes[scale][0], "model.heads": sizes[scale][1]} | changes
    return by_scale(fields, tuple(sizes))


def normed(structure: str) -> dict[str, Any]:
    """Fields of an arm whose linear layers are all of this structure, with weight normalisation."""
    return sized(WIDTHS, structure=f"weight_norm({structure})")


LANGUAGE = Table(
    name="btt_moe_lm",
    title="Experts in every linear layer of a language model, with normalised weights",
    citation=BTT_MOE.citation,
    bases={"cpu": "bytes_short", "paper": "openwebtext_bytes"},
    arms=(
        Arm(
            MOE,
            **normed("btt_moe(experts=8)"),
            note="all experts are computed; the FLOPs shown are those of the two that act",
        ),
        Arm("btt moe, 4 experts", **normed("btt_moe(experts=4)"), tuned_with=MOE),
        Arm("btt moe, no balance", **normed("btt_moe(experts=8, balance=0.0)"), tuned_with=MOE),
        Arm(
            "btt, rank 2",
            **normed("block_tensor_train(rank=2, order='blocked')"),
            note="the FLOPs but for the gate; weights are normalised here and in the other block tensor trains",
        ),
        Arm(
            "btt, rank 8",
            **normed("block_tensor_train(rank=8, order='blocked')"),
            tuned_with="btt, rank 2",
            note="the parameters",
        ),
        Arm(
            "dense, the same FLOPs",
            **sized(NARROW),
            tuned_with=DENSE,
        ),
    ),
    reference="btt, rank 2",
    claims=(
        Claim("BTT-MoE beats dense of its FLOPs", "Figures 6 and 7", MOE, "dense, the same FLOPs"),
        Claim("BTT-MoE beats a block tensor train of its FLOPs", "Figure 6", MOE, "btt, rank 2"),
        Claim("more experts help", "Figure 6, by its trend", MOE, "btt moe, 4 experts"),
        Claim("the balance term helps", "our ablation", MOE, "btt moe, no balance"),
    ),
)

TABLES = (BTT_MOE, LANGUAGE)
