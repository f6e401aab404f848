"""Partial isometries in a classifier: Song et al. 2023, "Householder Projector"."""

from __future__ import annotations

from experiments.tables.schema import DENSE, Arm, Claim, Table

DIGITS = Table(
    name="householder",
    title="Hidden layers whose singular values are all 1, against free ones of the same rank",
    citation=(
        'Song et al., "Householder Projector for Unsupervised Latent Semantics Discovery", ICCV 2023. The paper puts the '
        "projector into generators of images and reports quality unchanged and directions disentangled; neither is measured "
        "here: these arms ask what orthogonality costs a classifier"
    ),
    bases={"cpu": "digits"},
    arms=(
        Arm("householder, 32", {"structure": "householder(reflections=32)"}),
        Arm("householder, 8", {"structure": "householder(reflections=8)"}, tuned_with="householder, 32"),
        Arm("low rank, 32", {"structure": "low_rank(rank=32)"}),
        Arm("low rank, 8", {"structure": "low_rank(rank=8)"}, tuned_with="low rank, 32"),
        Arm(
            "D2S, householder, 32",
            {"switch": "0.5: householder(reflections=32)"},
            tuned_with=DENSE,
            note="a trained dense layer becomes the nearest partial isometry, as when the paper starts from a released model",
        ),
    ),
    reference="householder, 32",
    remarks={
        "cpu": (
            "What the start from dense brings: the nearest partial isometry keeps the directions of a trained weight and sets its "
            "32 largest singular values to 1 and the others to 0, so most of the function is lost (relative error of the worst "
            "layer 0.85 in every run, in the records); training for the other half of the steps makes up for all but 0.045 nats. "
            "The paper fine-tunes generators with their own loss, which is another question.",
        )
    },
    claims=(
        Claim(
            "32 orthogonal directions cost at most 0.05 nats against 32 free ones",
            "the paper's unchanged quality, by analogy",
            "householder, 32",
            "low rank, 32",
            within=0.05,
        ),
        Claim(
            "32 directions are better than 8", "our ablation: too few must degrade", "householder, 32", "householder, 8"
        ),
        Claim(
            "started from a dense layer it ends no worse (within 0.05 nats) than from noise",
            "the paper's use",
            "D2S, householder, 32",
            "householder, 32",
            within=0.05,
        ),
        Claim(
            "32 orthogonal directions cost at most 0.05 nats against dense",
            "by analogy",
            "householder, 32",
            DENSE,
            within=0.05,
        ),
    ),
)

TABLES = (DIGITS,)
