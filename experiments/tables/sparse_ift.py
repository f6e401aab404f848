"""Sparse-IFT: Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency"."""

from __future__ import annotations

from experiments.sparse_ift import Member, changes
from experiments.tables.schema import DENSE, Arm, Claim, Table

CITATION = (
    'Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency", ICML 2024, '
    "arXiv 2303.11525"
)
METHODS = {"static": "", "SET": "set", "RigL": "rigl"}
EVERY = {"cpu": 25, "paper": 100}
"""Steps between moves of masks."""
SPARSITIES = (0.5, 0.75, 0.9)
MIDDLE = 0.75
DENSE_WIDE = "dense of the wide width"


def named(member: str, sparsity: float, how: str) -> str:
    """Of an arm."""
    return f"{member} {sparsity:.0%}, {how}"


def arm(member: Member, sparsity: float, how: str, note: str = "", **paper: float) -> Arm:
    """A member whose masks stay or move; one rate for the three."""
    method = lambda scale: {"method": f"{METHODS[how]}(every={EVERY[scale]})"} if METHODS[how] else {}
    of = lambda base: changes(base, member, sparsity) | method("cpu")
    tuned_with = "" if how == "RigL" else named(member, sparsity, "RigL")
    return Arm(named(member, sparsity, how), of, tuned_with, paper, note, at={"paper": method("paper")})


WIDE = tuple(
    arm("wide", sparsity, how, **({"resnet": 74.4} if (sparsity, how) == (0.9, "RigL") else {}))
    for sparsity in SPARSITIES
    for how in METHODS
)
OTHERS = tuple(
    arm(member, MIDDLE, "RigL", note)
    for member, note in (
        ("parallel", "branches are not normalised, as they are in the paper"),
        ("factorised", "no normalisation between the factors, and the decay is of each factor"),
        ("doped", ""),
    )
)
MOVED, WALKED, STATIC = (named("wide", MIDDLE, how) for how in ("RigL", "SET", "static"))

DIGITS = Table(
    name="sparse_ift",
    title="Larger sparse layers with the FLOPs of the dense ones",
    citation=f"{CITATION}; accuracies of ResNet-18 from its abstract and reviews",
    bases={"cpu": "digits", "paper": "imagenet_resnet18"},
    arms=(
        *WIDE,
        *OTHERS,
        Arm(
            DENSE_WIDE,
            lambda base: {"model.width": changes(base, "wide", MIDDLE)["model.width"]},
            note=f"what the wide model at {MIDDLE:.0%} is with all its weights: about four times the FLOPs",
        ),
    ),
    reference=MOVED,
    share=1.0,
    low_rank={
        "cpu": "fit(low_rank(), params={share})",
        "paper": "layers_.*/conv./conv -> fit(low_rank(), params={share})",
    },
    columns={"resnet": "ResNet-18, ImageNet top-1, %"},
    baselines_paper={DENSE: {"resnet": 70.9}},
    claims=(
        Claim(
            "Sparse Wide with RigL at 90% beats dense at its FLOPs", "the abstract", named("wide", 0.9, "RigL"), DENSE
        ),
        Claim("Sparse Wide with RigL at 75% beats dense at its FLOPs", "the abstract, at 90%", MOVED, DENSE),
        Claim(
            "more sparsity is better at equal FLOPs",
            "the paper's trend",
            named("wide", 0.9, "RigL"),
            named("wide", 0.5, "RigL"),
        ),
        Claim("RigL beats SET", "the paper's comparison of masks", MOVED, WALKED),
        Claim("SET beats fixed masks", "the paper's comparison of masks", WALKED, STATIC),
        *(
            Claim(
                f"Sparse Wide beats Sparse {a.name.split()[0].capitalize()}",
                "the paper's comparison of members",
                MOVED,
                a.name,
            )
            for a in OTHERS
        ),
    ),
    remarks={
        "cpu": (
            "Sparse Wide is a wider network trained with RigL, no more: the arms named so are that baseline as well.",
            "FLOPs are those of the non-zeros, equal to dense's within 2%; parameters are stored with their zeros. Masks are "
            "simulated: products run dense, so no arm is faster for its zeros, and the larger layers make every step slower. "
            "First and last layers: the input does not widen, so its layer is denser; the head stays dense and widens, which "
            "the densities of the other layers make up for.",
        )
    },
)

TABLES = (DIGITS,)
