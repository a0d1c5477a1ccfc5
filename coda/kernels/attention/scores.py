"""A function of scores -> the text of a function of one score, which flash-attention calls.

A node of the function is read at the position (b, h, i, j) of one score. Arithmetic becomes an
expression, a view another position, an iota a position itself, and a gather an element of its table
at positions that are computed. Floats and conditions are float32, whole numbers have their own
type.

    where(ids[b, i] = ids[b, j], s + slopes[h] · (j - i), -inf)

    def score(s, b, h, i, j, t):
        v0 = element(t[0], b, i)
        v1 = element(t[0], b, j)
        v2 = eq(v0, v1)
        v3 = element(t[1], h)
        v4 = j - i
        v5 = real(v4)
        v6 = v3 * v5
        v7 = s + v6
        v8 = where(v2, v7, float("-inf"))
        return v8
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from coda.ir.dims import ONE, Dim
from coda.ir.graph import (
    Cast,
    Const,
    Expand,
    Gather,
    Input,
    Iota,
    Map,
    Node,
    Permute,
    Reshape,
    Size,
    Slice,
)
from coda.ir.scalars import PRODUCT, SCALARS, SUM
from coda.ir.types import DType, bf16, bool_, f16, f32, i32, i64
from coda.ir.views import is_squeeze
from coda.kernels.lines import Lines
from coda.lowering.placement.values import Refused
from coda.lowering.program.epilogue import Call, Expr, Literal, Load, Position, calls

AXES = ("b", "h", "i", "j")
ELEMENT, REAL, CONDITION = "element", "real", "condition"
WHOLE = {i32: "whole32", i64: "whole64"}
LOADED = (bf16, f16, f32, i32, i64, bool_)
ZERO = Literal(0.0)

Index = tuple[Expr, ...]


@dataclass(frozen=True)
class ScoreFunction:
    """A function of one score.

    Attributes:
        text: a Python module that defines `score`, of the score (of a derivative: the cotangent
            and the score), its position b, h, i, j, and a tuple: the captured tensors, then
            `numbers`.
        numbers: sizes that only a call knows, which are arguments of it.
        flops: of one score.
    """

    text: str
    numbers: tuple[Dim, ...]
    flops: int


def score_function(
    root: Node,
    arguments: Sequence[Node],
    values: Sequence[str] = ("s",),
    numbers: Sequence[Dim] = (),
) -> ScoreFunction:
    """The function of a node over its arguments: the score, then captured tensors.

    Args:
        root: [B, H, S, T], or of axes that broadcast to it.
        arguments: the inputs that stand for the score, and for each captured tensor.
        values: names of the arguments that come before the captured tensors; of a derivative they
            are the cotangent and the score.
        numbers: sizes that it takes first, whether it reads them or not.

    Raises:
        Refused: for a node that is no function of positions and elements, with the reason.
    """
    inputs = tuple(x for x in arguments if isinstance(x, Input))
    reader = _AtPositions(inputs[: len(values)], list(numbers))
    expr = reader.at(root, aligned(tuple(map(Position, AXES)), root))
    captured = inputs[len(values) :]
    given = [*(x.name for x in captured), *map(_numbered, range(len(reader.numbers)))]
    names: dict[Expr, str] = {Load(name): f"t[{k}]" for k, name in enumerate(given)}
    names |= {Load(x.name): name for x, name in zip(inputs, values, strict=False)}
    names |= {Position(a): a for a in AXES}
    lines = _ScoreLines(names.__getitem__)
    (value,) = lines.assign([expr])
    text = [
        f"from coda.kernels.attention.device import {', '.join(sorted(_OWN & lines.imported))}",
        f"from coda.kernels.device_math import {', '.join(sorted(lines.imported - _OWN))}",
    ]
    text = [line for line in text if not line.endswith("import ")]
    head = f"def score({', '.join(values)}, b, h, i, j, t):"
    text += ["", "", head, *(f"    {x}" for x in lines.lines)]
    flops = sum(SCALARS[c.fn].flops if c.fn in SCALARS else 1 for c in calls([expr]))
    return ScoreFunction("\n".join([*text, f"    return {value}"]), tuple(reader.numbers), flops)


def aligned(index: Index, node: Node) -> Index:
    """The position of a node's element in one of more axes, to which the node broadcasts."""
    last = index[len(index) - node.rank :]
    return tuple(ZERO if d == ONE else i for i, d in zip(last, node.shape, strict=True))


_OWN = {ELEMENT, REAL, CONDITION, *WHOLE.values()}


@dataclass
class _ScoreLines(Lines):
    """Lines that also load elements, and convert between whole numbers and floats."""

    def call(self, call: Call) -> str:
        if call.fn not in _OWN:
            return super().call(call)
        self.imported.add(call.fn)
        return f"{call.fn}({', '.join(map(self.name, call.args))})"


@dataclass
class _AtPositions:
    """Nodes at positions -> expressions.

    Attributes:
        values: the arguments of the function that are numbers of the score itself.
        numbers: the sizes that are read.
        known: the expressions so far.
    """

    values: tuple[Input, ...]
    numbers: list[Dim] = field(default_factory=list[Dim])
    known: dict[tuple[Node, Index], Expr] = field(default_factory=dict[tuple[Node, Index], Expr])

    def at(self, node: Node, index: Index) -> Expr:
        """The element of a node at a position. Raises Refused."""
        key = node, index
        if key not in self.known:
            self.known[key] = self.read(node, index)
        return self.known[key]

    def read(self, node: Node, index: Index) -> Expr:
        match node:
            case Const(value=value, element=element):
                return (
                    Call(WHOLE[element], (Literal(value),)) if element in WHOLE else Literal(value)
                )
            case Size(dim=dim, element=element):
                return self.number(dim, element)
            case Input():
                return self.loaded(node, index)
            case Map(fn=fn, args=args):
                return Call(fn, tuple(self.at(a, aligned(index, a)) for a in args))
            case Cast(arg=arg, to=to):
                return converted(self.at(arg, index), arg.dtype, to)
            case Iota(element=element):
                return converted(index[0], i32, element)
            case Gather(table=table, indices=indices):
                lead = node.rank - table.rank + len(indices)
                rows = tuple(self.at(i, aligned(index[:lead], i)) for i in indices)
                return self.at(table, rows + index[lead:])
            case _:
                return self.at(node.operands[0], tuple(self.moved(node, index)))

    def moved(self, node: Node, index: Index) -> Iterator[Expr]:
        """The position in a view's operand. Raises Refused."""
        match node:
            case Permute(order=order):
                yield from (index[order.index(a)] for a in range(node.rank))
            case Expand(arg=arg):
                yield from aligned(index, arg)
            case Slice(axis=axis, start=start, step=step):
                for a, one in enumerate(index, -node.rank):
                    if a != axis:
                        yield one
                        continue
                    if step != 1:
                        one = Call(PRODUCT, (one, Call(WHOLE[i32], (Literal(float(step)),))))
                    yield Call(SUM, (one, self.number(start, i32))) if start != Dim.of(0) else one
            case Reshape(arg=arg) if is_squeeze(node):
                whole = iter([i for i, d in zip(index, node.shape, strict=True) if d != ONE])
                yield from (ZERO if d == ONE else next(whole) for d in arg.shape)
            case _:
                raise Refused(f"scores read a `{type(node).__name__.lower()}` of positions")

    def number(self, dim: Dim, element: DType) -> Expr:
        """A size: a literal if it is one, otherwise an argument of the call."""
        if dim.constant is not None:
            value = Call(WHOLE[i32], (Literal(float(dim.constant)),))
        else:
            if dim not in self.numbers:
                self.numbers.append(dim)
            value = Load(_numbered(self.numbers.index(dim)))
        return converted(value, i32, element)

    def loaded(self, node: Input, index: Index) -> Expr:
        """The score, or an element of a captured tensor. Raises Refused."""
        if node in self.values:
            return Load(node.name)
        if node.dtype not in LOADED:
            raise Refused(f"scores read elements of {node.dtype}")
        return Call(ELEMENT, (Load(node.name), *(index or (ZERO,))))


def _numbered(k: int) -> str:
    return f"number{k}"


def converted(value: Expr, given: DType, to: DType) -> Expr:
    """A value of one type as that of another, with torch's result but for rounding of floats."""
    if to.kind == "bool":
        return value if given.kind == "bool" else Call(CONDITION, (value,))
    if to in WHOLE:
        same = given == to and not isinstance(value, Literal)
        return value if same else Call(WHOLE[to], (value,))
    if given.kind != "int" or isinstance(value, Literal):
        return value
    return Call(REAL, (value,))
