"""TRP: Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 1812.02402 and 2004.14566."""

from __future__ import annotations

from collections.abc import Callable

from experiments.tables.schema import DENSE, LOW_RANK, Arm, Changes, Claim, Table, by_scale

CITATION = 'Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 1812.02402 and 2004.14566'
CONVOLUTIONS = {
    "cpu": "layers_.*/conv. -> fit(low_rank(), params={share})",
    "paper": "layers_.*/conv./conv -> fit(low_rank(), params={share})",
}
KEPT = {"cpu": 0.3, "paper": 0.37}
"""Share of their parameters that convolutions end with: 0.10 of the 0.27 million of ResNet-20 is the paper's."""
LAYERS = "fit(low_rank(), params={share})"
POST_HOC, NUCLEAR, TRUNCATED, BOTH = "SVD at the end", "Nu", "TRP", "TRP + Nu"


def arms(
    factored: Callable[[str], str], only: str, paper: dict[str, float], scales: tuple[str, ...] = ("cpu",)
) -> tuple[Arm, ...]:
    """What trains the dense weights that are projected at the end, to the same structures in every arm.

    Args:
      factored: scale -> the rules of the projection. only: the sites TRP acts on, a regular expression.
    """
    end = lambda scale: {"switch": f"end: {factored(scale)}"}

    def trained(arguments: str) -> dict[str, object]:
        def fields(scale: str) -> Changes:
            return {"method": f"trp(every=5, {arguments}, only={only!r})", **end(scale)}

        return by_scale(fields, scales)

    plain = "plain training, projected after its last step and not trained again"
    return (
        Arm(POST_HOC, **by_scale(end, scales), tuned_with=DENSE, note=plain),
        Arm(NUCLEAR, **trained("energy=1.0, nuclear=0.0003"), note="the sub-gradient of the nuclear norm alone"),
        Arm(TRUNCATED, **trained("energy=0.9, nuclear=0.0"), note="the truncation alone"),
        Arm(BOTH, **trained("energy=0.9, nuclear=0.0003"), paper=paper),
    )


ORDER = (
    Claim(
        "the truncation and the nuclear norm together beat the truncation alone",
        "the paper's comparison",
        BOTH,
        TRUNCATED,
    ),
    Claim("the truncation beats the nuclear norm alone", "the paper's comparison", TRUNCATED, NUCLEAR),
    Claim("the nuclear norm beats an SVD of plain weights", "the paper's comparison", NUCLEAR, POST_HOC),
    Claim("TRP + Nu beats low rank trained from the start", "our ablation", BOTH, LOW_RANK),
)

RESNET = Table(
    name="trp",
    title="Convolutions that train near low rank, factored after the last step",
    citation=f"{CITATION}; figures of ResNet-20 on CIFAR-10, scheme channel, from the README of its code",
    bases={"cpu": "digits_resnet", "paper": "cifar10_resnet20"},
    arms=arms(
        lambda scale: CONVOLUTIONS[scale].format(share=KEPT[scale]),
        "layers_.*",
        {"resnet": 90.50, "params": 0.10, "flops": 2.17},
        ("cpu", "paper"),
    ),
    reference=BOTH,
    columns={
        "resnet": "ResNet-20, CIFAR-10 accuracy, %",
        "params": "million parameters",
        "flops": "fewer FLOPs, times",
    },
    baselines_paper={DENSE: {"resnet": 91.74, "params": 0.27}},
    low_rank=CONVOLUTIONS,
    claims=(
        *ORDER,
        Claim(
            "TRP + Nu ends at most 1.5 points behind dense",
            "the README, 2.17 times fewer FLOPs",
            BOTH,
            DENSE,
            within=0.015,
        ),
    ),
    remarks={
        "cpu": (
            "Every arm ends in the same structures, sized by parameters: the authors choose the ranks of their models by a "
            "threshold on singular values and those of the baselines by energy, which compares models of other sizes. The "
            "first convolution, those of 1 x 1 and the head stay dense, as in the paper.",
        )
    },
)

OWN = "TRP + Nu, its own ranks"
FOUND = "layers_0 -> low_rank(rank=7); layers_[12] -> low_rank(rank=6)"
"""The ranks that hold 90% of the energy after training, in every seed of the arms with TRP (`method_report` of their
records: 6 or 7, and 5 or 6)."""

MLP = Table(
    name="trp_mlp",
    title="Linear layers that train near low rank, factored after the last step",
    citation=CITATION,
    bases={"cpu": "digits"},
    arms=(
        *arms(lambda scale: LAYERS.format(share=0.1), ".*", {}),
        Arm(
            OWN,
            {"method": "trp(every=5, energy=0.9, nuclear=0.0003)", "switch": f"end: {FOUND}"},
            tuned_with=BOTH,
            note="cut to the ranks the training found instead of the same share of every layer",
        ),
        Arm("low rank, these ranks", {"structure": FOUND}, tuned_with=LOW_RANK),
    ),
    reference=BOTH,
    low_rank=LAYERS,
    claims=(
        *ORDER,
        Claim("at its own ranks TRP + Nu loses nothing to a larger one", "the paper's point", OWN, BOTH),
        Claim("TRP + Nu beats low rank trained at the ranks it found", "our ablation", OWN, "low rank, these ranks"),
        Claim("TRP + Nu at its own ranks beats low rank of the common share", "our ablation", OWN, LOW_RANK),
    ),
    remarks={
        "cpu": (
            "What the common share costs TRP + Nu: it gives every layer a tenth of its own parameters, ranks 5, 12 and 12, while "
            "the truncation has left 6 or 7 in the first and 5 or 6 in the others (`method_report` of the records); the cut of "
            "the first layer is what is lost (relative error 0.36 to 0.49), and the others have room they do not use. The last "
            "three claims are about the ranks that were found.",
        )
    },
)

TABLES = (RESNET, MLP)
