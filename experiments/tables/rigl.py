"""SET and RigL: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020."""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from experiments.tables.schema import DENSE, SMALL, Arm, Changes, Claim, Table
from structmat.sparse.density import rules_text
from structmat.training.config import validate

CITATION = 'Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020'
DENSITY = 0.05
LONGER = 5
"""Times the steps of the dense model, of the paper's figure."""


def sparse(method: str = "", rescale: bool = True) -> Callable[[ConfigDict], Changes]:
    """Fields of an arm: the same density in every linear layer; of a ResNet by ERK in all but its first convolution, for
    LONGER, with masks moved every 100 steps as in the authors' code, which stretches their end alone."""

    def fields(base: ConfigDict) -> Changes:
        if base.model.name != "resnet_v1":
            text = f"masked(dense(), unstructured(density={DENSITY}{', rescale=True' * rescale}), rule='plain')"
            return {"structure": text} | ({"method": f"{method}(every=25)"} if method else {})
        sites = {path: site for path, site in validate(base, devices=1).table.items() if path != "stem/conv"}
        text = rules_text(sites, DENSITY, kinds=("conv", "head"), rescale=rescale)
        own = {"method": f"{method}(every=100, drop=0.3, until=0.78125)"} if method else {}
        return {"structure": text, "steps": LONGER * base.steps} | own

    return fields


DIGITS = Table(
    name="rigl",
    title="Sparse networks with a fixed support, a random walk of it (SET), and one led by gradients (RigL)",
    citation=f"{CITATION}; figures of ResNet-50 at 95% sparsity (ERK, five times the steps) from the README of its code",
    bases={"cpu": "digits", "paper": "imagenet_resnet50"},
    arms=(
        Arm(
            "static",
            sparse(),
            note="5% of the entries, whose weights start 1/sqrt(density) larger; zeros are simulated: stored and multiplied",
        ),
        Arm("SET", sparse("set"), tuned_with="static"),
        Arm("RigL", sparse("rigl"), tuned_with="static", paper={"resnet": 74.63}),
        Arm(
            "static, not rescaled",
            sparse(rescale=False),
            tuned_with="static",
        ),
    ),
    reference="static",
    share=DENSITY,
    low_rank={
        "cpu": "fit(low_rank(), params={share})",
        "paper": "head|layers_.*/conv -> fit(low_rank(), params={share})",
    },
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
