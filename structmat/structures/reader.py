"""From text to what it names: a Python expression tree read against a table of names; nothing is evaluated."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from structmat.structures.errors import StructureError, suggest
from structmat.structures.named import Named

MAX_LENGTH = 10_000
MAX_DEPTH = 200


@dataclasses.dataclass
class Reader:
    """Reads `name(argument=value, ...)`; faults are StructureErrors that show the text with the place marked.

    Attributes:
      text: what is read, on one line.
      names: what can be named.
    """

    text: str
    names: Mapping[str, type[Named]]
    kind: ClassVar[str]
    """What the text stands for, as messages call it."""
    example: ClassVar[str]

    @classmethod
    def read(cls, text: Any, names: Mapping[str, type[Named]]) -> Any:
        """What `text` stands for.

        Raises:
          StructureError: no text, unknown name or argument (with a suggestion), wrong type, syntax error, trailing text.
        """
        if not isinstance(text, str) or not text.strip():
            raise StructureError(f"a {cls.kind} must be text such as {cls.example!r}, got {text!r}")
        text = " ".join(text.split())
        if len(text) > MAX_LENGTH:
            raise StructureError(f"a {cls.kind} of {len(text)} characters is too long; at most {MAX_LENGTH}")
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            offset = getattr(error, "offset", None) or 1
            message = f"not a {cls.kind}: {getattr(error, 'msg', error)}"
            raise StructureError(_mark(text, offset - 1, message)) from None
        level, depth = [tree], 0
        while level := [child for node in level for child in ast.iter_child_nodes(node)]:
            if (depth := depth + 1) > MAX_DEPTH:
                raise StructureError(f"a {cls.kind} nested more than {MAX_DEPTH} deep is too deep: {text[:60]}...")
        return cls(text, names).whole(tree.body)

    def whole(self, node: ast.expr) -> Named:
        """A name, alone or with arguments."""
        if isinstance(node, ast.Name):
            return self.call(node, node.id, [], [])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.call(node, node.func.id, node.args, node.keywords)
        self.fail(node, f"expected a {self.kind} such as {self.example}")

    def fail(self, node: ast.AST, message: str) -> NoReturn:
        """Raise the message with the place of `node` marked."""
        column = len(self.text.encode()[: node.col_offset].decode(errors="ignore"))
        raise StructureError(_mark(self.text, column, message))

    def call(self, node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Named:
        """The object of a name and its arguments."""
        if name not in self.names:
            self.fail(node, f"unknown {self.kind} {name!r}" + suggest(name, self.names))
        cls = self.names[name]
        fields = {f.name: f for f in cls.text_fields()}
        positional = [f for f in fields.values() if not f.kw_only]
        if len(args) > len(positional):
            self.fail(args[len(positional)], f"{name} takes {len(positional)} positional arguments, got {len(args)}")
        values = {f.name: self.value(a) for f, a in zip(positional, args)}
        for keyword in keywords:
            if keyword.arg is None:
                self.fail(keyword, f"{name}: arguments are written out as name=value, ** is not read")
            if keyword.arg not in fields:
                self.fail(keyword, f"{name} has no argument {keyword.arg!r}" + suggest(keyword.arg, fields))
            if keyword.arg in values:
                self.fail(keyword, f"{name}: {keyword.arg} is given twice")
            values[keyword.arg] = self.value(keyword.value)
        required = (f.name for f in positional if f.default is dataclasses.MISSING)
        if missing := [n for n in required if n not in values]:
            self.fail(node, f"{name} needs {missing[0]}")
        try:
            return cls(**values)
        except StructureError as error:
            self.fail(node, str(error))

    def value(self, node: ast.expr) -> Any:
        """An argument: a constant, a tuple of them, or something named."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return (
                -node.operand.value if isinstance(node.operand.value, int | float) else self.fail(node, "not a number")
            )
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.value(e) for e in node.elts)
        return self.whole(node)


def _mark(text: str, column: int, message: str) -> str:
    start = max(0, column - 60)
    return f"{message}\n  {text[start : start + 100]}\n  {' ' * (column - start)}^"
