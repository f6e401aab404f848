"""The field `switch`: which sites get other structures in the middle of a run, and when."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from structmat.structures import Rules, StructureError
from structmat.surgery import reassign
from structmat.training.errors import ConfigError
from structmat.training.methods import hook, method_of
from structmat.training.task import Task, Teacher

_STAGE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+|end)\s*:(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Switch:
    """After `step` steps the sites that `rules` match get the structures of these; the others keep theirs.

    At the last step that is a projection of what was trained: nothing trains after it.
    """

    step: int
    rules: Rules

    def __str__(self) -> str:
        return f"{self.step}: {self.rules}"


def switches(config: Any) -> list[Switch]:
    """The stages of `config.switch`, ascending: `when: rules; when: rules`.

    `when` is a fraction of the run below 1, a number of whole steps or `end`; `rules` are written as in
    `config.structure`.

    Raises:
      ConfigError: malformed, not ascending, outside of 1 .. steps, or an invalid structure or regular expression.
    """
    found: list[Switch] = []
    for when, text in _split(config.switch):
        step = _step(when, config.steps)
        if step != int(step):
            raise _wrong(config, f"{when} must be a fraction below 1, whole steps or 'end'", f"{round(step)} is")
        if not 1 <= step <= config.steps:
            raise _wrong(
                config,
                f"{when} is step {int(step)} of steps={config.steps}, and must be within it",
                "'end' is its last",
            )
        if found and step <= found[-1].step:
            raise _wrong(
                config, f"{when} is step {int(step)}, and must come after step {found[-1].step} of the one before"
            )
        try:
            found.append(Switch(int(step), Rules.of(text)))
        except StructureError as error:
            raise _wrong(config, str(error)) from None
    if config.switch.strip() and not found:
        raise _wrong(config, "must read 'when: rules'", "'0.9: dense()' is")
    return found


def switched(task: Task, switch: Switch) -> Task:
    """The task with the structures of after the switch.

    Raises:
      StructureError: a rule matches nothing, a structure does not fit a site, or no site changes.
    """
    after = task.with_model(reassign(task.model, switch.rules, *task.example))
    if all(site.bound == task.table[path].bound for path, site in after.table.items()):
        raise StructureError(f"{switch.rules} changes no site: all that it matches are that already")
    return after


def passed(config: Any, task: Task, switch: Switch) -> Task:
    """`switched`, as a run goes on with it: under a method with a teacher that is the model before the first switch, until the
    end of the run.

    Raises:
      StructureError: as `switched`. ConfigError: the method does not fit the model.
    """
    lesson = hook(config, "teacher", task.table) if switch.step < config.steps else None
    if lesson is None:
        return switched(dataclasses.replace(task, teacher=None) if task.teacher else task, switch)
    return switched(dataclasses.replace(task, teacher=task.teacher or Teacher(task.model, lesson)), switch)


def refuse_rule(config: Any, rule: Any) -> None:
    """Refuse a Rule or method in a run with a switch before its end: their state has the shapes that the switch changes.
    Refuse a method with a teacher in a run without one, in which it would never act.

    Raises:
      ConfigError: names both.
    """
    method, midway = method_of(config), any(switch.step < config.steps for switch in switches(config))
    if method is not None and method.has_teacher:
        if not midway:
            raise ConfigError(
                "method",
                config.method,
                "learns from the model as it was before a switch in the middle of the run, and "
                f"config.switch = {config.switch!r} has none",
                "config.switch = '0.7: layers_.*/mlp/.* -> kronecker(terms=8)' has one",
            )
        return
    if (method is not None or rule is not None) and midway:
        shown = config.method or repr(rule)
        raise _wrong(
            config,
            f"cannot go with the rule {shown}, whose state belongs to the sites as they are",
            f"{'end: ' + str(switches(config)[-1].rules)!r} is",
        )


def stages(config: Any, task: Task) -> list[tuple[int, Task]]:
    """(steps before it, task) of every stage of a run, `task` being that of the first.

    Raises:
      ConfigError: as `switches` and `passed`.
    """
    found = [(0, task)]
    for switch in switches(config):
        try:
            found.append((switch.step, passed(config, found[-1][1], switch)))
        except StructureError as error:
            raise _wrong(config, str(error)) from None
        if switch.step < config.steps and not found[-1][1].trains:
            raise _wrong(
                config, f"leaves the model nothing to train after step {switch.step}", f"'end: {switch.rules}' is"
            )
    return found


def ended(config: Any, task: Task) -> Task:
    """The task of what a run leaves behind: that of its last stage, `task` being that of its first step.

    Raises:
      ConfigError: as `switches` and `switched`.
    """
    return stages(config, task)[-1][1]


def _step(when: str, steps: int) -> float:
    if when == "end":
        return steps
    return round(float(when) * steps) if float(when) < 1 else float(when)


def _split(text: str) -> list[tuple[str, str]]:
    """(when, rules) of every stage: parts between semicolons, those without `when` being further rules."""
    found: list[tuple[str, str]] = []
    for part in re.split(r"[;\n]", text):
        match = _STAGE.fullmatch(part)
        if match:
            found.append((match[1], match[2]))
        elif found and part.strip():
            found[-1] = (found[-1][0], f"{found[-1][1]};{part}")
        elif part.strip():
            return []
    return found


def _wrong(config: Any, rule: str, hint: str = "") -> ConfigError:
    return ConfigError("switch", config.switch, rule, hint)
