"""Shape text -> dims: "M (H d)" is the shape [M, H*d].

Axes are separated by spaces. An axis is a number, a symbol, or an expression of them with + - * /:
"M 2*F d/2". Brackets join axes into one: "(H d)" is one axis of size H*d.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from lark import Lark, Transformer, v_args
from lark.exceptions import UnexpectedInput

from coda.errors import DimError
from coda.ir.dims import Dim, Shape, product

_EXAMPLE = 'write axes with spaces between them, as in "M D", "M 2*F", "M (H d)" or "M d/2"'
Axes = tuple[tuple[Dim, ...], ...]


@v_args(inline=True)
class _Dims(Transformer[Any, Any]):
    def number(self, token: str) -> Dim:
        return Dim.of(int(token))

    def symbol(self, token: str) -> Dim:
        return Dim.of(str(token))

    def add(self, a: Dim, b: Dim) -> Dim:
        return a + b

    def sub(self, a: Dim, b: Dim) -> Dim:
        return a - b

    def mul(self, a: Dim, b: Dim) -> Dim:
        return a * b

    def div(self, a: Dim, b: Dim) -> Dim:
        return a // b

    def group(self, *dims: Dim) -> tuple[Dim, ...]:
        return dims

    def shape(self, *axes: Dim | tuple[Dim, ...]) -> Axes:
        return tuple(a if isinstance(a, tuple) else (a,) for a in axes)

    def rearrangement(self, left: Axes, right: Axes) -> tuple[Axes, Axes]:
        return left, right


@cache
def _parser(start: str) -> Lark:
    grammar = (Path(__file__).parent / "shapes.lark").read_text()
    return Lark(grammar, parser="lalr", start=start, transformer=_Dims())


def _parse(text: str, start: str) -> Any:
    try:
        return _parser(start).parse(text)
    except UnexpectedInput as e:
        at = max(0, (e.column or 1) - 1)
        raise DimError(
            f'the shape "{text}" cannot be read',
            found=f'"{text[at : at + 8] or "the end"}" at column {at + 1}',
            help=_EXAMPLE,
        ) from None


def parse_shape(text: str) -> Shape:
    """The dims of a shape text. Raises DimError if it cannot be parsed."""
    return tuple(product(axis) for axis in _parse(text, "shape"))


def parse_rearrangement(text: str) -> tuple[Axes, Axes]:
    """Both sides of "M (H d) -> M H d", each axis as its factors: ((M,), (H, d)) on the left.

    A text without "->" is the right side; the left one is then (). Raises DimError.
    """
    if "->" not in text:
        axes = _parse(text, "shape")
        return (), axes
    return _parse(text, "rearrangement")
