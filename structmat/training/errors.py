"""What a user can get wrong about a run."""

from typing import Any


class ConfigError(ValueError):
    """A config field is not valid; the text names field, value, rule and a valid choice."""

    def __init__(self, field: str, value: Any, rule: str, hint: str = ""):
        super().__init__(f"config.{field} = {value!r}: {rule}" + (f"; {hint}" if hint else ""))
        self.field, self.value = field, value


class RunError(RuntimeError):
    """A run cannot start, go on or finish in its workdir; the text says what to do."""


class Interrupted(RunError):
    """SIGTERM came; the state is saved and the same command goes on from there."""
