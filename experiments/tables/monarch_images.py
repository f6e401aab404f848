"""Monarch in classifiers of images: Dao et al. 2022, Table 1, vision transformers and mixers."""

from __future__ import annotations

from experiments.tables.monarch import CITATION, MONARCH
from experiments.tables.schema import DENSE, LOW_RANK, SMALL, Arm, Claim, Table

MLPS = "layers_.*/mlp/.* -> "
"""The sites of mixers that are Monarch: with the MLPs across patches left dense their parameters are the paper's."""
COLUMNS = {
    "small": "{}-S, ImageNet accuracy, %",
    "small_params": "{}-S, M parameters",
    "base": "{}-B, ImageNet accuracy, %",
    "base_params": "{}-B, M parameters",
}


VIT = (
    "Why Monarch is behind low rank and the narrower dense model: a third of dense's parameters is enough for these digits, so "
    "being small costs nothing, and what counts is how fast 900 steps train; Monarch bears half of the rate that is best for "
    "the others. With all linear layers Monarch we count 20.5 and 33.5 million parameters for ViT-S and ViT-B, the paper 19.6 "
    "and 33.0; of the mixers, where the MLPs across channels alone are Monarch, as in the configs published with the paper, the "
    "counts agree (`accounting.md`)."
)
MIXER = (
    "Why Monarch is behind the narrower dense model: that one loses nothing to dense on these digits, and Monarch trains at a quarter "
    "of their rate, which its trials chose. These have one seed and 359 images, of which a point of accuracy is four."
)


def table(
    name: str,
    model: str,
    sites: str,
    base: str,
    monarch: tuple[float, ...],
    dense: tuple[float, ...],
    remarks: tuple[str, ...] = (),
) -> Table:
    """Monarch against dense at these sites.

    Args:
      model: as the paper abbreviates it. monarch, dense: the paper's figures, by `COLUMNS`.
      remarks: under the table at cpu scale.
    """
    figures = lambda values: dict(zip(COLUMNS, values, strict=True))
    arms = (
        Arm("monarch", {"structure": sites + MONARCH}, paper=figures(monarch), note="4 blocks, as in the paper"),
        Arm("monarch, 2 blocks", {"structure": sites + MONARCH.replace("4", "2")}, tuned_with="monarch"),
    )
    return Table(
        name=name,
        title=f"Monarch in place of the linear layers of a classifier of images, {model}",
        citation=f"{CITATION}, Table 1",
        bases={"cpu": f"digits_{base}", "paper": f"imagenet_{base}"},
        arms=arms,
        reference="monarch",
        low_rank=sites + "fit(low_rank(), params={share})",
        columns={key: heading.format(model) for key, heading in COLUMNS.items()},
        baselines_paper={DENSE: figures(dense)},
        remarks={"cpu": remarks},
        claims=(
            Claim(
                "Monarch is at most a point behind dense", "Table 1, 0.3 points at most", "monarch", DENSE, within=0.01
            ),
            Claim("Monarch beats low rank of its size", "our ablation", "monarch", LOW_RANK),
            Claim("Monarch beats a narrower dense model of its size", "our ablation", "monarch", SMALL),
        ),
    )


TABLES = (
    table("monarch_vit", "ViT", "", "vit", (79.1, 19.6, 78.9, 33.0), (79.4, 48.8, 78.5, 86.6), (VIT,)),
    table("monarch_mixer", "Mixer", MLPS, "mixer", (73.7, 7.0, 77.8, 20.9), (74.0, 18.5, 77.7, 59.9), (MIXER,)),
)
