"""The text form: `parse("low_rank(rank=8) + random_sparse(density=0.03)")`; `str` of a structure parses back.

Text is read as a Python expression tree and built from the registry; nothing is evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any, NoReturn

from structmat.structures.algebra import Product, Sum
from structmat.structures.elementwise import Elementwise
from structmat.structures.errors import StructureError, suggest
from structmat.structures.recipe import Structure
from structmat.structures.registry import CONSTRUCTORS

OPERATORS = {ast.Add: Sum.of, ast.MatMult: Product, ast.Mult: Elementwise}
MAX_LENGTH = 10_000
MAX_DEPTH = 200


def parse(text: str | Structure) -> Structure:
    """Build the structure a text names; a Structure is returned as it is.

    Raises:
      StructureError: unknown name or argument (with a suggestion), wrong type, syntax error or trailing text; the
        message shows the text with the place marked.
    """
    if isinstance(text, Structure):
        return text
    if not isinstance(text, str) or not text.strip():
        raise StructureError(f"a structure must be text such as 'monarch(blocks=4)', got {text!r}")
    text = " ".join(text.split())
    if len(text) > MAX_LENGTH:
        raise StructureError(f"a structure of {len(text)} characters is too long; at most {MAX_LENGTH}")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        offset = getattr(error, "offset", None) or 1
        raise StructureError(_mark(text, offset - 1, f"not a structure: {getattr(error, 'msg', error)}")) from None
    level, depth = [tree], 0
    while level := [child for node in level for child in ast.iter_child_nodes(node)]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise StructureError(f"a structure nested more than {MAX_DEPTH} deep is too deep: {text[:60]}...")
    return _Builder(text).structure(tree.body)


def _mark(text: str, column: int, message: str) -> str:
    start = max(0, column - 60)
    return f"{message}\n  {text[start : start + 100]}\n  {' ' * (column - start)}^"


@dataclasses.dataclass
class _Builder:
    text: str

    def fail(self, node: ast.AST, message: str) -> NoReturn:
        column = len(self.text.encode()[: node.col_offset].decode(errors="ignore"))
        raise StructureError(_mark(self.text, column, message))

    def structure(self, node: ast.expr) -> Structure:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            self.refuse_number(node)
            return OPERATORS[type(node.op)](self.structure(node.left), self.structure(node.right))
        if isinstance(node, ast.Name):
            return self.call(node, node.id, [], [])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.call(node, node.func.id, node.args, node.keywords)
        self.fail(node, "expected a structure such as low_rank(rank=8), combined with +, @ or *")

    def refuse_number(self, node: ast.BinOp) -> None:
        """Answer 0.5 * dense() with the constructor that scales."""
        if not isinstance(node.op, ast.Mult):
            return
        for number, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(number, ast.Constant) and type(number.value) in (int, float):
                scaled = f"scaled({ast.unparse(other)}, s={number.value})"
                self.fail(number, f"* multiplies two structures entry by entry; write {scaled}")

    def call(self, node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Structure:
        if name not in CONSTRUCTORS:
            self.fail(node, f"unknown structure {name!r}" + suggest(name, CONSTRUCTORS))
        cls = CONSTRUCTORS[name]
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
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return (
                -node.operand.value if isinstance(node.operand.value, int | float) else self.fail(node, "not a number")
            )
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.value(e) for e in node.elts)
        return self.structure(node)
