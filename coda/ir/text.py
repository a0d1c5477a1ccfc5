"""Graph <-> `.coda` text: a graph prints as text, which parses to the same graph.

    block twice(%x: [M, D] bf16) {
      %1 = add %x, %x                               : [M, D] bf16
      return out = %1
    }

Values are numbered in topological order.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput
from lark.lexer import TerminalDef

from coda.errors import CodaError, TextError, Where
from coda.ir.attend import Attend, AttendGradient, Order, Scores
from coda.ir.dims import Dim, Shape, show_shape
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Gather,
    Graph,
    Input,
    Iota,
    Map,
    Node,
    Permute,
    Pick,
    Put,
    Reduce,
    Reshape,
    Scan,
    Size,
    Slice,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.node import origin
from coda.ir.scalars import SCALARS
from coda.ir.types import DTYPES, DType

# Printing.


def show(graph: Graph) -> str:
    """The text of a graph; `parse` is its inverse."""
    names: dict[Node, str] = {i: f"%{i.name}" for i in graph.inputs}
    taken = set(names.values())
    numbers = (f"%{n}" for n in count(len(names)))
    lines: list[str] = []
    for node in walk(graph.roots):
        if node in names:
            continue
        names[node] = next(n for n in numbers if n not in taken)
        kind = f"{show_shape(node.shape)} {node.dtype}"
        lines.append(f"  {names[node]} = {show_operation(node, names):<40} : {kind}")
    parameters = ", ".join(
        f"%{i.name}: {show_shape(i.shape)} {i.dtype}" + " constant" * (i.name in graph.constants)
        for i in graph.inputs
    )
    outputs = ", ".join(f"{name} = {names[node]}" for name, node in graph.outputs)
    head = f"block {graph.name}({parameters}) {{"
    return "\n".join([head, *lines, f"  return {outputs}", "}"]) + "\n"


def show_operation(node: Node, names: dict[Node, str]) -> str:
    """The right side of a statement; `names` has the name of each operand."""
    args = ", ".join(names[o] for o in node.operands)
    match node:
        case Const(value=v, element=t):
            return f"const {_number(v)} {t}"
        case Size(dim=d, element=t):
            return f"size {d} {t}"
        case Map(fn=fn):
            return f"{fn} {args}"
        case Reduce(fn=fn, axis=axis):
            return f"{fn} {args} axis {axis}"
        case Scan(fn=fn, axis=axis, reverse=reverse):
            return f"scan {fn} {args} axis {axis}" + (" reverse" if reverse else "")
        case Contract(result=t):
            return f"contract {args} {t}"
        case Cast(to=t):
            return f"cast {args} {t}"
        case Reshape(to=shape) | Expand(to=shape):
            return f"{type(node).__name__.lower()} {args} {show_shape(shape)}"
        case Permute(order=order):
            return f"permute {args} {_order(order)}"
        case Slice(axis=axis, start=start, size=size, step=step):
            return f"slice {args} axis {axis} from {start} size {size} step {step}"
        case Concat(axis=axis):
            return f"concat {args} axis {axis}"
        case Iota(count=n, element=t):
            return f"iota {n} {t}"
        case Put(rows=rows):
            return f"put {args} rows {', '.join(map(str, rows))}"
        case _:
            return _attention(node, args) or f"{type(node).__name__.lower()} {args}"


def _order(order: Order) -> str:
    return f"({', '.join(map(str, order))})"


def _attention(node: Node, args: str) -> str:
    """The right side of an attention or its derivative; "" for any other node."""
    if isinstance(node, Attend):
        empty, inner = _number(node.empty), _inner(node.scores)
        return f"attend {args} {node.part} {_order(node.order)} {empty} {inner}"
    if isinstance(node, AttendGradient):
        axes = " ".join(map(_order, (node.order, *node.orders)))
        inner = f"{_inner(node.scores)} {_inner(node.slope)}"
        return f"attend_gradient {args} {node.part} {axes} {inner}"
    return ""


def _inner(scores: Scores) -> str:
    """The function of an attention, as a block in the text of another."""
    inputs = tuple(i for i in scores.inputs if isinstance(i, Input))
    text = show(Graph("scores", inputs, (("s", scores.root),)))
    return text.rstrip().replace("\n", "\n    ")


def _number(value: float) -> str:
    text = repr(float(value))
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


# Parsing.


class _Parser(Protocol):
    """What is used of Lark, with its types."""

    @property
    def terminals(self) -> Iterable[TerminalDef]: ...

    def parse(self, text: str) -> Tree[Token]: ...


@cache
def _parser() -> _Parser:
    grammar = (Path(__file__).parent / "text.lark").read_text()
    return Lark(grammar, parser="lalr", maybe_placeholders=True)


def parse(text: str, file: str = "<coda text>") -> Graph:
    """The graph of a text. Raises TextError with the line, what was found and what was expected."""
    if not Path(file).exists():
        lines = text.splitlines(keepends=True)
        linecache.cache[file] = (len(text), None, lines, file)
    try:
        tree = _parser().parse(text)
    except UnexpectedInput as e:
        raise _unexpected(e, text, file) from None
    return _Reader(file).graph(tree)


_SAID = {
    "$END": "the end",
    "VALUE": "a value such as %x",
    "NAME": "a name",
    "INT": "a whole number",
    "FLOAT": "a number such as 1.0",
}


def _unexpected(e: UnexpectedInput, text: str, file: str) -> TextError:
    """The error for a token that the grammar does not allow there, with those it allows."""
    names = set(getattr(e, "expected", None) or getattr(e, "allowed", None) or ())
    spelled = {t.name: t.pattern.value for t in _parser().terminals}
    expected = sorted(_SAID.get(n) or f"`{spelled.get(n, n)}`" for n in names)
    token = getattr(e, "token", None)
    lines = text.splitlines() or [""]
    if token is not None and token.type == "$END":
        found, width = "the end", 1
        where = Where(file, len(lines), len(lines[-1]))
    else:
        found = str(token) if token is not None else text[e.pos_in_stream or 0]
        width, column = len(found), max(e.column - 1, 0)
        where = Where(file, max(e.line, 1), column, column + width)
    return TextError(
        "this is not the text of a block",
        found=found if found == "the end" else f"`{found}`",
        help="expected " + " or ".join(expected),
        where=where,
    )


class _Reader:
    """Builds a graph from the parse tree of a text; `file` is for source lines in errors."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.values: dict[str, Node] = {}

    def place(self, token: Token) -> Where:
        line, column = token.line or 1, (token.column or 1) - 1
        return Where(self.file, line, column, column + len(token))

    def graph(self, tree: Any) -> Graph:
        name, *rest = tree.children
        inputs: list[Input] = []
        outputs: list[tuple[str, Node]] = []
        constants: set[str] = set()
        for item in rest:
            if item is None:
                continue
            if item.data == "parameter":
                token, kind, constant = item.children
                shape, dtype = self.type(kind)
                if constant is not None:
                    constants.add(str(token)[1:])
                with origin(self.place(token)):
                    inputs.append(Input(str(token)[1:], shape, dtype))
                self.define(token, inputs[-1])
            elif item.data == "statement":
                self.statement(item)
            else:
                label, token = item.children
                if str(label) in dict(outputs):
                    raise TextError(
                        f"two outputs are called `{label}`",
                        help="each output has a name of its own",
                        where=self.place(label),
                    )
                outputs.append((str(label), self.value(token)))
        return Graph(str(name), tuple(inputs), tuple(outputs), frozenset(constants))

    def define(self, token: Token, node: Node) -> None:
        if str(token) in self.values:
            raise TextError(
                f"{token} is defined twice",
                help="each value has a name of its own",
                where=self.place(token),
            )
        self.values[str(token)] = node

    def value(self, token: Token) -> Node:
        found = self.values.get(str(token))
        if found is None:
            raise TextError(
                f"{token} is not defined",
                help="defined before: " + ", ".join(list(self.values)[-8:]),
                where=self.place(token),
            )
        return found

    def statement(self, tree: Any) -> None:
        token, operation, kind = tree.children
        where = self.place(token)
        try:
            with origin(where):
                node = self.operation(operation, where)
        except TextError:
            raise
        except CodaError as e:
            raise TextError(e.message, found=e.found, help=e.help, where=where) from None
        if kind is not None and self.type(kind) != (node.shape, node.dtype):
            shape, dtype = self.type(kind)
            raise TextError(
                f"{token} does not have the type that is written",
                found=f"{show_shape(shape)} {dtype}",
                help=f"it is {show_shape(node.shape)} {node.dtype}",
                where=where,
            )
        self.define(token, node)

    def operation(self, tree: Any, where: Where) -> Node:
        name = str(tree.data)
        build: Callable[..., Node] = getattr(self, "make_" + name)
        return build(*tree.children)

    def make_const(self, number: Any, dtype: Token) -> Node:
        return Const(self.number(number), self.dtype(dtype))

    def make_size(self, dim: Any, dtype: Token) -> Node:
        return Size(self.dim(dim), self.dtype(dtype))

    def make_contract(self, lhs: Token, rhs: Token, dtype: Token) -> Node:
        return Contract(self.value(lhs), self.value(rhs), self.dtype(dtype))

    def make_cast(self, arg: Token, dtype: Token) -> Node:
        return Cast(self.value(arg), self.dtype(dtype))

    def make_reshape(self, arg: Token, shape: Any) -> Node:
        return Reshape(self.value(arg), self.shape(shape))

    def make_permute(self, arg: Token, *order: Any) -> Node:
        return Permute(self.value(arg), tuple(int(self.number(i)) for i in order if i is not None))

    def make_slice(self, arg: Token, axis: Any, start: Any, size: Any, step: Any) -> Node:
        numbers = self.axis(axis), self.dim(start), self.dim(size), int(self.number(step))
        return Slice(self.value(arg), *numbers)

    def make_concat(self, *parts: Any) -> Node:
        *args, axis = parts
        return Concat(tuple(self.value(a) for a in args), self.axis(axis))

    def make_expand(self, arg: Token, shape: Any) -> Node:
        return Expand(self.value(arg), self.shape(shape))

    def make_iota(self, count: Any, dtype: Token) -> Node:
        return Iota(self.dim(count), self.dtype(dtype))

    def make_put(self, arg: Token, *rest: Any) -> Node:
        indices = tuple(self.value(t) for t in rest if isinstance(t, Token))
        return Put(self.value(arg), indices, tuple(self.dim(d) for d in rest[len(indices) :]))

    def make_attend(self, *rest: Any) -> Node:
        q, k, v, *captured = (self.value(t) for t in rest[:-4])
        part, order, empty, scores = rest[-4:]
        fields = self.inner(scores), self.order(order), self.number(empty), str(part)
        return Attend(q, k, v, tuple(captured), *fields)

    def make_attend_gradient(self, *rest: Any) -> Node:
        q, k, v, y, lse, d, *more = (self.value(t) for t in rest[:-7])
        scores, slope = self.inner(rest[-2]), self.inner(rest[-1])
        order, dq, dk, dv = map(self.order, rest[-6:-2])
        fields = scores, slope, order, (dq, dk, dv), str(rest[-7])
        return AttendGradient(q, k, v, y, lse, d, tuple(more), *fields)

    def inner(self, tree: Any) -> Scores:
        """A function of an attention."""
        graph = _Reader(self.file).graph(tree)
        return Scores(graph.inputs, graph.roots[0])

    def order(self, tree: Any) -> Order:
        return tuple(int(self.number(i)) for i in tree.children)

    def make_reduce(self, fn: Token, arg: Token, value: Token | None, axis: Any) -> Node:
        if str(fn) not in MONOIDS:
            raise TextError(
                f"there is no reduction `{fn}`", help=", ".join(MONOIDS), where=self.place(fn)
            )
        given = None if value is None else self.value(value)
        return Reduce(str(fn), self.value(arg), self.axis(axis), given)

    def make_scan(self, fn: Token, arg: Token, axis: Any, reverse: Token | None) -> Node:
        return Scan(str(fn), self.value(arg), self.axis(axis), reverse is not None)

    def make_call(self, fn: Token, *args: Token) -> Node:
        values = tuple(self.value(a) for a in args)
        if str(fn) == "gather":
            return Gather(values[0], values[1:])
        if str(fn) == "pick":
            if len(values) != 2:
                raise TextError(
                    f"`{fn}` takes 2 operands", found=str(len(values)), where=self.place(fn)
                )
            return Pick(*values)
        if str(fn) not in SCALARS:
            raise TextError(
                f"there is no operation `{fn}`",
                help=f"{fn} … axis -1" if str(fn) in MONOIDS else ", ".join(SCALARS),
                where=self.place(fn),
            )
        return Map(str(fn), values)

    # Types and numbers.

    def type(self, tree: Any) -> tuple[Shape, DType]:
        shape, dtype = tree.children
        return self.shape(shape), self.dtype(dtype)

    def dtype(self, token: Token) -> DType:
        if str(token) not in DTYPES:
            raise TextError(
                f"there is no element type `{token}`",
                help=", ".join(DTYPES),
                where=self.place(token),
            )
        return DTYPES[str(token)]

    def shape(self, tree: Any) -> Shape:
        return tuple(self.dim(d) for d in tree.children if d is not None)

    def number(self, tree: Any) -> float:
        value = float(tree.children[-1])
        return -value if tree.data == "negative" else value

    def fraction(self, top: Dim, bottom: Dim) -> Dim:
        by = bottom.constant
        if not by:
            return top // bottom
        return Dim(tuple((m, Fraction(c) / by) for m, c in top.terms)) * 1

    def axis(self, tree: Any) -> int:
        if tree.data != "negative":
            raise TextError(
                "axes are counted from the right",
                found=f"axis {tree.children[0]}",
                help="axis -1 is the last",
                where=self.place(tree.children[0]),
            )
        return int(self.number(tree))

    def size(self, token: Token) -> int:
        if len(token) > 20:
            raise TextError(
                "a size is too large",
                found=f"{len(token)} digits",
                help="fewer than 2^63 elements",
                where=self.place(token),
            )
        return int(token)

    def dim(self, tree: Any) -> Dim:
        if tree.data == "number_dim":
            return Dim.of(self.size(tree.children[0]))
        if tree.data == "symbol":
            return Dim.of(str(tree.children[0]))
        parts = [self.dim(c) for c in tree.children if isinstance(c, Tree)]
        match str(tree.data):
            case "negated":
                return -parts[0]
            case "add":
                return parts[0] + parts[1]
            case "sub":
                return parts[0] - parts[1]
            case "mul":
                return parts[0] * parts[1]
            case _:
                return self.fraction(parts[0], parts[1])
