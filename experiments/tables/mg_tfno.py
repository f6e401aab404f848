"""MG-TFNO: Kossaifi et al., "Multi-Grid Tensorized Fourier Neural Operator for High-Resolution PDEs", TMLR 2024."""

from __future__ import annotations

from experiments.tables.schema import DENSE, SMALL, Arm, Claim, Table

FORMATS = {"Tucker": "tucker()", "CP": "cp()", "tensor train": "tensor_train()"}
FEW = {"cpu": 40, "gpu": 100}
"""Samples, by scale."""
READING = (
    "Every format is a low-rank one, so there is no other low-rank row. Compression is of the spectral weights; the rest of "
    "the model stays, as parameters show."
)
MORE = (("Tucker", 50), ("Tucker", 150), ("CP", 150))
"""Further compressions."""


def weights(fmt: str, times: int) -> dict[str, str]:
    """The spectral weights in a format, with a fraction of their entries."""
    return {"structure": f"layers_.*/spectral -> fit({FORMATS[fmt]}, params={1 / times:.4g})"}


def few(name: str) -> str:
    """The name of an arm that trains on few samples."""
    return f"{name}, few samples"


TEN = tuple(Arm(f"{fmt}, 10x", weights(fmt, 10)) for fmt in FORMATS)
SMALLER = tuple(Arm(f"{fmt}, {times}x", weights(fmt, times), tuned_with=f"{fmt}, 10x") for fmt, times in MORE)
FEWER = tuple(
    Arm(
        few(arm.name),
        {**arm.changes, "data.train": FEW["cpu"]},
        tuned_with=arm.tuned_with or arm.name,
        at={"gpu": {"data.train": FEW["gpu"]}},
    )
    for arm in (Arm(DENSE, {"structure": "dense()"}), *TEN, SMALLER[1])
)
CUT = {"model.levels": 1, "model.margin": 0.125}
PATCHES = (
    Arm(
        "dense, patches",
        CUT,
        tuned_with=DENSE,
        note="four patches, each with a margin of an eighth of the side and a coarse view around it",
    ),
    Arm("Tucker, 10x, patches", {**weights("Tucker", 10), **CUT}, tuned_with="Tucker, 10x"),
)

COMPRESSION = Table(
    name="mg_tfno",
    title="Spectral weights of a Fourier neural operator in tensor formats, on many and on few samples",
    citation=(
        'Kossaifi et al., "Multi-Grid Tensorized Fourier Neural Operator for High-Resolution PDEs", TMLR 2024: less than half '
        "the error at over 150x compression on turbulent flow (abstract); its tables are not known to us"
    ),
    bases={"cpu": "flow", "gpu": "rough_flow"},
    arms=(*TEN, *SMALLER, *PATCHES, *FEWER),
    reference="Tucker, 10x",
    low_rank="",
    claims=(
        *(
            Claim(
                f"{fmt} with a tenth of the weights is at most 0.021 behind dense",
                "our bar",
                f"{fmt}, 10x",
                DENSE,
                within=0.021,
            )
            for fmt in FORMATS
        ),
        *(
            Claim(
                f"{fmt} with a tenth of the weights beats dense on few samples",
                "the paper's regularisation by low rank",
                few(f"{fmt}, 10x"),
                few(DENSE),
            )
            for fmt in FORMATS
        ),
        Claim("150x compression has a lower error than dense", "abstract", "Tucker, 150x", DENSE),
        Claim(
            "150x compression has a lower error than dense on few samples",
            "abstract, where samples are few",
            few("Tucker, 150x"),
            few(DENSE),
        ),
        Claim("Tucker beats a narrower dense operator of its size", "our ablation", "Tucker, 10x", SMALL),
        Claim(
            "patches cost a Tucker operator at most 0.021",
            "abstract: no loss with patches",
            "Tucker, 10x, patches",
            "Tucker, 10x",
            within=0.021,
        ),
    ),
    remarks={
        "cpu": (
            f"{READING} Few samples are {FEW['cpu']} of 240.",
            "Why 150x compression does not beat dense: of so small an operator (width 20, 12 modes) it leaves ranks 4, 4, 2, 1, and "
            "240 samples are enough for dense; on few samples it is level with it.",
        ),
        "gpu": (f"{READING} Few samples are {FEW['gpu']} of 1000. Viscosity 1e-4, from time 10 to 30 at 64 x 64.",),
    },
)

TABLES = (COMPRESSION,)
