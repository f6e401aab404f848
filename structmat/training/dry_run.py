"""What a run would be, printed; it stops before data is read."""

from __future__ import annotations

from ml_collections import ConfigDict
from rich.console import Console

from structmat.parallel import make_mesh, on_mesh
from structmat.training import overview
from structmat.training.build import compile_step, optimizer_for
from structmat.training.config import validate
from structmat.training.methods import method_of, rule_for
from structmat.training.rule import Rule
from structmat.training.state import plan_state
from structmat.training.step import make_step
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
                console.print(f"from step {taken + 1} of {config.steps}", style="bold")
            tx, schedule = optimizer_for(config, task)
            template = plan_state(task, tx, rule, mesh)
            overview.show_sites(task, template, console)
            console.print(f"method: {method_of(config) or 'none'}")
            compiled = compile_step(task, make_step(task, tx, rule, schedule, config.seed), template, mesh)
            overview.show_cost(task, template, compiled, mesh, console)
