"""The text form: `parse("low_rank(rank=8) + random_sparse(density=0.03)")`; `str` of a structure parses back."""

from __future__ import annotations

import ast
from typing import ClassVar

from structmat.structures.algebra import Product, Sum
from structmat.structures.elementwise import Elementwise
from structmat.structures.reader import Reader
from structmat.structures.recipe import Structure
from structmat.structures.registry import CONSTRUCTORS

OPERATORS = {ast.Add: Sum.of, ast.MatMult: Product, ast.Mult: Elementwise}


def parse(text: str | Structure) -> Structure:
    """Build the structure a text names; a Structure is returned as it is.

    Examples:
      >>> parse("low_rank(8) + random_sparse(density=0.03)").short()
      'low_rank(rank=8) + random_sparse(density=0.03)'
      >>> parse("fit(monarch(), params=0.3)").bind(64, 64).structure.short()
      'monarch(blocks=8)'

    Raises:
      StructureError: unknown name or argument (with a suggestion), wrong type, syntax error or trailing text; the
        message shows the text with the place marked.
    """
    return text if isinstance(text, Structure) else _Reader.read(text, CONSTRUCTORS)


class _Reader(Reader):
    """Names, and operators between them."""

    kind: ClassVar[str] = "structure"
    example: ClassVar[str] = "monarch(blocks=4)"

    def whole(self, node: ast.expr) -> Structure:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            self.refuse_number(node)
            return OPERATORS[type(node.op)](self.whole(node.left), self.whole(node.right))
        if isinstance(node, ast.Name) or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            return super().whole(node)
        self.fail(node, "expected a structure such as low_rank(rank=8), combined with +, @ or *")

    def refuse_number(self, node: ast.BinOp) -> None:
        """Answer 0.5 * dense() with the constructor that scales."""
        if not isinstance(node.op, ast.Mult):
            return
        for number, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(number, ast.Constant) and type(number.value) in (int, float):
                scaled = f"scaled({ast.unparse(other)}, s={number.value})"
                self.fail(number, f"* multiplies two structures entry by entry; write {scaled}")
