"""Kronecker factors in the MLPs of a language model: Edalati et al. 2022 (KnGPT2), by projection and further training."""

from __future__ import annotations

from experiments.tables.schema import DENSE, Arm, Claim, Table

MLP = "layers_.*/mlp/.* -> "
SHARE = 0.25
KRONECKER, MONARCH, LOW_RANK = (
    f"{MLP}fit({family}, params={SHARE})" for family in ("kronecker()", "monarch(order='blocked')", "low_rank()")
)
TERMS = (1, 8, 32)

KNGPT2 = Table(
    name="kronecker",
    title="Kronecker factors in the MLPs: from noise, and projected from dense",
    citation=(
        'Edalati et al., "Kronecker Decomposition for GPT Compression", ACL 2022 (WikiText-103, 83M and 124M parameters, as '
        "quoted in notes on the paper); of its distillation terms the arm that has them takes the outputs of the MLPs, with the "
        "logits in place of embeddings and attention maps; in the others the loss stays that of the data"
    ),
    bases={"cpu": "bytes", "gpu": "bytes", "paper": "wikitext103"},
    arms=(
        Arm("kronecker", {"structure": KRONECKER}, note=f"{SHARE:g} of the parameters of every MLP"),
        Arm("monarch", {"structure": MONARCH}),
        Arm("D2S, kronecker", {"switch": f"0.7: {KRONECKER}"}, tuned_with=DENSE, paper={"wikitext103": 20.5}),
        Arm(
            "D2S, kronecker, distilled",
            {"switch": f"0.7: {KRONECKER}", "method": "distill(weight=1.0, temperature=1.0, features=1.0)"},
            tuned_with=DENSE,
            note="after the switch it also learns from the dense model of just before it",
        ),
        Arm("D2S, monarch", {"switch": f"0.7: {MONARCH}"}, tuned_with=DENSE),
        Arm("D2S, low rank", {"switch": f"0.7: {LOW_RANK}"}, tuned_with=DENSE),
        *[
            Arm(f"projected, {terms} terms", {"switch": f"end: {MLP}kronecker(terms={terms})"}, tuned_with=DENSE)
            for terms in TERMS
        ],
    ),
    reference="kronecker",
    low_rank=MLP + "fit(low_rank(), params={share})",
    columns={"wikitext103": "WikiText-103 perplexity"},
    claims=(
        Claim("projected from dense it ends below Kronecker from noise", "the point of the paper", "D2S, kronecker", "kronecker"),
        Claim("more terms project closer", "Van Loan and Pitsianis 1993", "projected, 8 terms", "projected, 1 terms"),
        Claim("more terms project closer still", "Van Loan and Pitsianis 1993", "projected, 32 terms", "projected, 8 terms"),
        Claim("further training heals the projection", "the paper's recipe", "D2S, kronecker", "projected, 8 terms"),
        Claim("distillation beats the data's loss alone", "the paper's recipe", "D2S, kronecker, distilled", "D2S, kronecker"),
        Claim(
            "from noise Kronecker is behind Monarch of its size", "exponents of error against FLOPs, Qiu et al. 2024",
            "monarch", "kronecker",
        ),
        Claim("after a projection low rank heals no better", "our ablation", "D2S, kronecker", "D2S, low rank"),
    ),
    remarks={
        "cpu": (
            "Why 8 terms end worse than one: the matrices do come nearer, the worst of them is off by 0.99 with one term, 0.93 "
            "with 8 and 0.77 with 32 (relative Frobenius errors, `switches` of the records), but bits do not follow. With one "
            "term next to nothing of an MLP is left, and the model does without it; with 8 what it adds is no longer small and "
            "still nearly all wrong.",
            "Why low rank heals better: at equal size it is nearer to these MLPs (0.73 against 0.77).",
            "Why Kronecker from noise is ahead of Monarch: a sum of 32 terms at a quarter of the parameters learns these 450 steps "
            "nearly as fast as dense, at more FLOPs than Monarch of its size; the comparison of exponents is at equal FLOPs, as in "
            "scaling.",
        )
    },
)  # fmt: skip

TABLES = (KNGPT2,)
