"""mSENSE, SENSE with learned Monarch transforms: Dao et al., ICML 2022, Tables 4 and 5."""

from __future__ import annotations

from configs import mri
from experiments.tables.bases import SLICES
from experiments.tables.monarch import CITATION
from experiments.tables.schema import LOW_RANK, Arm, Changes, Claim, Table

COLUMNS = {"psnr_1": "pSNR, echo 1", "psnr_2": "pSNR, echo 2", "ssim_1": "SSIM, echo 1", "ssim_2": "SSIM, echo 2"}
ACCELERATIONS = {
    #    SENSE and mSENSE in the order of COLUMNS
    2.0: ((32.8, 35.4, 0.871, 0.865), (34.3, 36.6, 0.886, 0.882)),
    3.0: ((30.9, 33.5, 0.819, 0.795), (32.3, 34.6, 0.843, 0.820)),
    4.0: ((30.1, 32.8, 0.789, 0.753), (31.2, 33.5, 0.812, 0.767)),
}
SCANS = {
    #  U-Net and mSENSE, pSNR of echo 1
    1: (29.4, 33.8),
    2: (29.9, 34.0),
    3: (31.0, 33.9),
    5: (31.4, 33.9),
}
ZERO_FILLED, CG = "SENSE", "CG-SENSE"
MSENSE, UNET = "mSENSE", "U-Net"
SIDES = (("cpu", 64), ("gpu", 256))
READING = (
    "dense and low rank are mSENSE at 2x with such matrices for transforms, which start at the DFT and at its projection. SENSE "
    "is one step, what mSENSE starts from; CG-SENSE iterates, with its weight and iterations tuned on the training scans. Every "
    "seed has a scanner, training scans and test scans of its own."
)
WIDTH = {"cpu": 8, "gpu": 32}
"""Of the U-Net, by scale."""


def model(argument: str, scans: int) -> Changes:
    """What `configs/mri.py` has of a model, trained on so many scans."""
    config = mri.get_config(argument)
    own = {"model": config.model, "structure": config.structure, "optim.lr": config.optim.lr}
    return {
        **own,
        "mup.base_width": config.mup.base_width,
        "data.train": scans * SLICES,
        **(_wide("cpu") if argument == "unet" else {}),
    }


def _wide(scale: str) -> Changes:
    return {"model.width": WIDTH[scale], "mup.base_width": WIDTH[scale]}


AT = {"msense": {"gpu": {"structure": "monarch(blocks=16)"}}, "unet": {"gpu": _wide("gpu")}}
"""Further changes: slice rank 1 at side 256, and the U-Net's width there."""


def _by_acceleration() -> tuple[Arm, ...]:
    arms = []
    for acceleration, (sense, msense) in ACCELERATIONS.items():
        changes = {**model("msense", 5), "data.acceleration": acceleration}
        first, times = acceleration == next(iter(ACCELERATIONS)), f", {acceleration:g}x"
        arms += [
            Arm(
                MSENSE + times,
                changes,
                tuned_with="" if first else f"{MSENSE}, 2x",
                paper=dict(zip(COLUMNS, msense)),
                at=AT["msense"],
            ),
            Arm(
                ZERO_FILLED + times,
                changes,
                tuned_with=f"{MSENSE}, 2x",
                paper=dict(zip(COLUMNS, sense)),
                at=AT["msense"],
                reference="zero_filled",
            ),
            Arm(CG + times, changes, tuned_with=f"{MSENSE}, 2x", at=AT["msense"], reference="cg_sense"),
        ]
    return tuple(arms)


def _claims() -> tuple[Claim, ...]:
    claims = []
    for acceleration in ACCELERATIONS:
        times = f", {acceleration:g}x"
        for figure, metric in (("pSNR", "psnr_1"), ("SSIM", "ssim_1")):
            beats = f"at {acceleration:g}x mSENSE beats SENSE in {figure} of the first echo"
            claims.append(Claim(beats, "Table 4", MSENSE + times, ZERO_FILLED + times, metric=metric))
        beats = f"at {acceleration:g}x mSENSE beats tuned CG-SENSE in pSNR"
        claims.append(Claim(beats, "our ablation", MSENSE + times, CG + times))
    return tuple(claims)


RISING = Table(
    name="monarch_mri",
    title="mSENSE, a SENSE that learns its Fourier transforms as Monarch factors, at rising accelerations",
    citation=f"{CITATION}, Table 4. Its first acceleration is 2x; the others rise, and their values are not known to us",
    bases={"cpu": "scans", "gpu": "scans"},
    arms=_by_acceleration(),
    reference=f"{MSENSE}, 2x",
    columns=COLUMNS,
    claims=(
        *_claims(),
        Claim("at 2x Monarch transforms beat low-rank ones", "our ablation", f"{MSENSE}, 2x", LOW_RANK),
    ),
    remarks={
        scale: (f"{READING} Random ellipses of side {side} take the place of the paper's slices, {SLICES} to a scan.",)
        for scale, side in SIDES
    },
)


def _few() -> tuple[Arm, ...]:
    arms = []
    for scans, (unet, msense) in SCANS.items():
        for method, argument, figure in ((MSENSE, "msense", msense), (UNET, "unet", unet)):
            paper = {"psnr_1": figure}
            own, tuned = f"{method}, {scans}", f"{method}, 5"
            tuned = "" if own == tuned else tuned
            arms.append(Arm(own, model(argument, scans), tuned_with=tuned, paper=paper, at=AT[argument]))
    return tuple(arms)


FEW = Table(
    name="monarch_mri_few",
    title="mSENSE against a U-Net that learns from few scans",
    citation=f"{CITATION}, Table 5, at 2x, from four rising numbers of scans, whose values are not known to us",
    bases={"cpu": "scans", "gpu": "scans"},
    arms=_few(),
    reference=f"{MSENSE}, 5",
    columns={"psnr_1": COLUMNS["psnr_1"]},
    claims=tuple(
        Claim(f"from {scans} scans mSENSE beats the U-Net in {figure}", "Table 5", *names, metric=metric)
        for scans in SCANS
        for figure, metric in (("pSNR", "psnr_1"), ("SSIM", "ssim_1"))
        for names in [(f"{MSENSE}, {scans}", f"{UNET}, {scans}")]
    ),
    remarks={
        scale: ("The numbers behind the names are of training scans. See monarch_mri for the data.",) for scale in WIDTH
    },
)

TABLES = (RISING, FEW)
