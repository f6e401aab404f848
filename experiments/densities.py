"""Print a value of `config.structure` under which the whole model has one density, and each layer its own.

python -m experiments.densities --config=configs/digits.py --density=0.05 --how=erk
"""

from __future__ import annotations

from experiments import cli
from experiments.own_flags import OwnFlags
from structmat.nn.sites import KINDS as SITE_KINDS
from structmat.sparse import density, rules_text
from structmat.training.config import validate

flags = OwnFlags()
DENSITY = flags.DEFINE_float(
    "density", None, "Part of the weights to keep, of all sites that are made sparse together."
)
HOW = flags.DEFINE_enum("how", "erk", density.HOW, "erk: small and narrow sites are denser; uniform: all alike.")
KINDS = flags.DEFINE_multi_enum("kind", ["linear"], SITE_KINDS, "Kinds of sites to make sparse; repeat.")
RESCALE = flags.DEFINE_bool("rescale", False, "Start the weights 1/sqrt(density) larger.")


def main() -> None:
    """Print the rules for the config of the flags."""
    if cli.CONFIG.value is None:
        cli.fail("--config is needed, such as --config=configs/digits.py")
    if DENSITY.value is None:
        cli.fail("--density is needed, such as --density=0.05")
    config = cli.CONFIG.value.copy_and_resolve_references()
    config.method = ""  # which may need the masks that are about to be named
    print(rules_text(validate(config).table, DENSITY.value, HOW.value, tuple(KINDS.value), RESCALE.value))


if __name__ == "__main__":
    cli.run(main, flags)
