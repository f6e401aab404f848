"""Block tensor train: Qiu et al., "Compute Better Spent: Replacing Dense Layers with Structured Matrices", ICML 2024."""

from __future__ import annotations

from experiments.tables.schema import DENSE, LOW_RANK, Arm, Claim, Table

CITATION = 'Qiu et al., "Compute Better Spent: Replacing Dense Layers with Structured Matrices", ICML 2024'
STRUCTURES = {
    "block tensor train": "fit(block_tensor_train(order='blocked'), params=0.2)",
    "monarch": "monarch(blocks=8, order='blocked')",
    "kronecker": "fit(kronecker(), params=0.2)",
    "tensor train": "fit(tensor_train(), params=0.2)",
}
NAIVE = {"mup.enabled": False}
NORMED = "block tensor train, weight norm"


WIDE = {"model.width": 1024, "model.heads": 16}
"""The narrowest of the paper's GPT-2 of block tensor trains, which have rank 4 in all layers, the head among them; the heads
are ours."""


def at(name: str) -> dict[str, dict[str, object]]:
    """What differs at the paper's scale."""
    if "block tensor train" not in name:
        return {}
    structure = "block_tensor_train(rank=4, order='blocked')"
    structure = f"weight_norm({structure})" if name == NORMED else structure
    return {"paper": {"structure": f"layers_.*|head -> {structure}", **WIDE}}


def arms() -> tuple[Arm, ...]:
    """Every structure with its own rates, and with the rate that is best for dense."""
    aware = [Arm(name, {"structure": text}, at=at(name)) for name, text in STRUCTURES.items()]
    naive = [
        Arm(f"{name}, dense rate", {"structure": text} | NAIVE, tuned_with=DENSE, at=at(name))
        for name, text in STRUCTURES.items()
    ]
    normed = {"structure": f"weight_norm({STRUCTURES['block tensor train']})"}
    return (*aware, *naive, Arm(NORMED, normed, at=at(NORMED)))


RATES = Table(
    name="structure_rates",
    title="Structure-aware learning rates against the rate of the dense model",
    citation=f"{CITATION}, Figure 1c",
    bases={"cpu": "bytes", "gpu": "bytes", "paper": "openwebtext_small"},
    arms=arms(),
    reference="block tensor train",
    claims=(
        *[
            Claim(
                f"{name} trains better at its own rates than at the dense one", "Figure 1c", name, f"{name}, dense rate"
            )
            for name in STRUCTURES
        ],
        Claim(
            "block tensor train needs weight normalisation at its own rates",
            "the paper's GPT-2",
            NORMED,
            "block tensor train",
        ),
        Claim(
            "block tensor train with it trains better at its own rates than without it at the dense one",
            "Figure 1c, with what the paper's GPT-2 has",
            NORMED,
            "block tensor train, dense rate",
        ),
        Claim(
            "block tensor train beats low rank of its size",
            "exponents of error against FLOPs in the repository of the paper",
            "block tensor train",
            LOW_RANK,
        ),
        Claim(
            "block tensor train beats tensor train",
            "exponents of error against FLOPs in the repository of the paper",
            "block tensor train",
            "tensor train",
        ),
        Claim(
            "block tensor train beats Kronecker",
            "exponents of error against FLOPs in the repository of the paper",
            "block tensor train",
            "kronecker",
        ),
    ),
    remarks={
        "cpu": (
            "Why Monarch is worse at its own rates: it is a product of two factors whose rates the multipliers raise and nothing "
            "normalises, and every multiple of them that was tried ends above one rate for all. Block tensor train is such a "
            "product too, level with one rate for all; normalised weights, which the paper needs for GPT-2, let it bear eight "
            "times the rate and gain 0.3 bits.",
            "Why block tensor train is behind Kronecker and tensor train: rows are of equal parameters, at which these two take "
            "seven times its FLOPs; the paper compares at equal FLOPs, as table scaling does.",
        )
    },
)

TABLES = (RATES,)
