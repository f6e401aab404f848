"""The one place where parameters change shape during a run: sites get new structures, everything else keeps its bits.

new = reassign(model, "layers_.*/mlp/.* -> dense()", *example)        # the same model with other structures
before, after = sites(model, *example), sites(new, *example)
template = jax.eval_shape(new.init, key, *example)                    # unboxed; with shardings on a mesh
variables, changes = restructure(before, after, variables, template)
opt_state = carry_optimizer(opt_state, opt_template, moments, changed_params(after, changes))

On one device and without an optimiser, all in one: `new, variables, changes = restructured(model, rules, variables, *example)`.
"""

from structmat.surgery.layers import by_layer, rebuild
from structmat.surgery.optimizer import carry_optimizer
from structmat.surgery.restructure import Change, changed_params, reassign, restructure, restructured
from structmat.surgery.slicing import sliced, widths_of, widths_within, with_widths

__all__ = [
    "Change",
    "by_layer",
    "carry_optimizer",
    "changed_params",
    "reassign",
    "rebuild",
    "restructure",
    "restructured",
    "sliced",
    "widths_of",
    "widths_within",
    "with_widths",
]
