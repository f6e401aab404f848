"""Monarch: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022."""

from __future__ import annotations

from experiments.tables.schema import DENSE, LOW_RANK, SMALL, Arm, Claim, Table

CITATION = 'Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022'
MONARCH = "monarch(blocks=4, order='blocked')"
COLUMNS = {
    "small": "GPT-2 small, WikiText-103 perplexity",
    "small_params": "GPT-2 small, M parameters",
    "medium": "GPT-2 medium, perplexity",
    "medium_params": "GPT-2 medium, M parameters",
}

E2E = Table(
    name="monarch",
    title="Monarch in place of every linear layer of a language model",
    citation=f"{CITATION}, Table 2",
    bases={"cpu": "bytes", "gpu": "bytes"},
    arms=(
        Arm(
            "monarch",
            {"structure": MONARCH},
            paper={"small": 20.7, "small_params": 72, "medium": 20.3, "medium_params": 165},
            note="4 blocks, the paper's number",
        ),
    ),
    reference="monarch",
    columns=COLUMNS,
    baselines_paper={DENSE: {"small": 20.6, "small_params": 124, "medium": 20.9, "medium_params": 355}},
    claims=(
        Claim("Monarch is as good as dense, to 0.05 bits", "Table 2", "monarch", DENSE, within=0.05),
        Claim("Monarch beats low rank at equal parameters", "Section 5, as our ablation", "monarch", LOW_RANK),
        Claim("Monarch beats a narrower dense model of its size", "as our ablation", "monarch", SMALL),
    ),
)

TABLES = (E2E,)
