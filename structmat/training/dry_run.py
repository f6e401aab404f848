"""What a run would be, printed; it stops before data is read."""

from __future__ import annotations

from ml_collections import ConfigDict
from rich.console import Console

from structmat.parallel import make_mesh, on_mesh
from structmat.training import overview
from structmat.training.build import compile_step, optimizer_for, step_for
from structmat.training.config import validate
from structmat.training.methods import method_of, rule_for, without_method
from structmat.training.rule import Rule
from structmat.training.state import plan_state
from structmat.training.switch import refuse_rule, stages


def dry_run(config: ConfigDict, console: Console, rule: Rule | None = None) -> None:
    """Print what `train` would train: sites, sharding, optimiser bytes, FLOPs, memory of the compiled step; of each stage.

    Raises:
      ConfigError: the config is not valid.
    """
    first = validate(config)
    rule = rule_for(config, first.table, rule)
    refuse_rule(config, rule)
    mesh = make_mesh(config.mesh.to_dict())
    with on_mesh(mesh):
        for taken, task in stages(config, first):
            if config.switch:
                console.print(
                    f"from step {taken + 1} of {config.steps}" if taken < config.steps else "after the last step",
                    style="bold",
                )
            if taken == config.steps:
                config, rule = without_method(config), None
            tx, schedule = optimizer_for(config, task)
            template = plan_state(task, tx, rule, mesh)
            overview.show_sites(task, template, console)
            if taken == config.steps:
                return
            console.print(f"method: {method_of(config) or 'none'}")
            compiled = compile_step(task, step_for(config, task, tx, rule, schedule), template, mesh)
            overview.show_cost(task, template, compiled, mesh, console)
