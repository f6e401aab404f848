"""SET and RigL: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020."""

from __future__ import annotations

from experiments.tables.schema import DENSE, SMALL, Arm, Claim, Table

CITATION = 'Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020'
SPARSE = "masked(dense(), unstructured(density=0.05, rescale=True), rule='plain')"

DIGITS = Table(
    name="rigl",
    title="Sparse networks with a fixed support, a random walk of it (SET), and one led by gradients (RigL)",
    citation=f"{CITATION}; figures of ResNet-50 at 95% sparsity (ERK, five times the steps) from the README of its code",
    bases={"cpu": "digits"},
    arms=(
        Arm(
            "static",
            {"structure": SPARSE},
            note="5% of the entries, whose weights start 1/sqrt(density) larger; zeros are simulated: stored and multiplied",
        ),
        Arm("SET", {"structure": SPARSE, "method": "set(every=25)"}, tuned_with="static"),
        Arm("RigL", {"structure": SPARSE, "method": "rigl(every=25)"}, tuned_with="static", paper={"resnet": 74.63}),
        Arm(
            "static, not rescaled",
            {"structure": "masked(dense(), unstructured(density=0.05), rule='plain')"},
            tuned_with="static",
        ),
    ),
    reference="static",
    share=0.05,
    columns={"resnet": "ResNet-50, ImageNet top-1, %"},
    baselines_paper={DENSE: {"resnet": 76.8}},
    remarks={
        "cpu": (
            "Why little is decided: at width 256 these digits are nearly solved with 5% of the entries, whatever their "
            "support, so there is no gap for a moving one to close. At width 64 and 4% (`tests/sparse`, held-out accuracy) "
            "the orderings are those of the paper.",
        )
    },
    claims=(
        Claim("RigL beats SET", "the paper's comparison", "RigL", "SET"),
        Claim("SET beats a fixed random support", "the paper's comparison", "SET", "static"),
        Claim("RigL beats a smaller dense network", "the paper's comparison", "RigL", SMALL),
        Claim(
            "a fixed support is better when its weights start larger", "our ablation", "static", "static, not rescaled"
        ),
    ),
)

TABLES = (DIGITS,)
