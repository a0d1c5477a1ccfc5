"""`@` with torch's broadcasting, and einsum -> Contract nodes.

An einsum of two operands is one contraction. Each of its axes is a batch axis (in both operands and
in the result), contracted (in both, not in the result), or a row or column axis (in one operand and
in the result). The operands are permuted to [*batch, *rows, *contracted] and [*batch, *columns,
*contracted]:

    "b i h d, b j h d -> b h i j"    batch b h, contracted d, rows i, columns j
        lhs = permute q (0, 2, 1, 3)    [b, h, i, d]
        rhs = permute k (0, 2, 1, 3)    [b, h, j, d]
        contract lhs, rhs               [b, h, i, j]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from coda.errors import DtypeError, ShapeError, TraceError
from coda.frontend.views import permuted, transposed
from coda.ir.dims import ONE, Dim, broadcast, product, show_shape
from coda.ir.graph import Contract, Map, Node, Reduce, Reshape
from coda.ir.types import f32
from coda.ir.views import shaped

_EXAMPLE = 'coda.einsum("b i h d, b j h d -> b h i j", q, k)'
Names = tuple[str, ...]


def multiplied(x: Node, w: Node) -> Node:
    """x [..., M, K] @ w [..., K, N], as torch.matmul. Raises ShapeError and DtypeError."""
    batch = broadcast(x.shape[:-2], w.shape[:-2])
    if w.rank < 2 or x.rank < 1 or x.shape[-1] != w.shape[-2] or batch is None:
        batches = ", or batches [..., M, K] and [..., K, N]" if w.rank > 2 else ""
        raise ShapeError(
            "`@` takes [..., K] and [K, N]" + batches,
            found=f"{show_shape(x.shape)} and {show_shape(w.shape)}",
            help=_fitting(x, w),
        )
    check_types("@", x, w)
    if x.rank == 1 and w.rank > 2:
        y = _contract(Reshape(x, (ONE, *x.shape)), transposed(w, batches=True))
        return Reshape(y, (*y.shape[:-2], y.shape[-1]))
    return _contract(x, transposed(w, batches=True))


def check_types(name: str, x: Node, w: Node) -> None:
    """Raise DtypeError unless both operands of a contraction have the same float type."""
    if x.dtype != w.dtype:
        raise DtypeError(
            f"`{name}` takes operands of one element type",
            found=f"{x.dtype} and {w.dtype}",
            help=f"cast one of them, as in .cast(coda.{x.dtype.name})",
        )
    if x.dtype.kind != "float":
        raise DtypeError(f"`{name}` takes floats", found=str(x.dtype))


def _contract(x: Node, w: Node) -> Node:
    return Contract(x, w, x.dtype if x.dtype.size > 1 else f32)


def _fitting(x: Node, w: Node) -> str:
    """The help text for operands of `@` with shapes that do not match."""
    if w.rank == 1:
        return "coda.sum(x * w) is the product with a vector"
    if x.rank and w.rank >= 2 and x.shape[-1] == w.shape[-1] != w.shape[-2]:
        transposed = "T" if w.rank == 2 else "mT"
        return f"the axes agree if the right one is transposed: `@ w.{transposed}`"
    if x.rank and w.rank > 2 and x.shape[-1] == w.shape[-2]:
        return "leading axes align at the right; each pair must be equal, or one of them 1"
    if w.rank > 2:
        return "the last axis on the left is the last but one on the right"
    return "the last axis on the left is the first on the right"


# Einsum.


@dataclass(frozen=True)
class Equation:
    """A parsed einsum: the axis names of each operand and of the result."""

    operands: tuple[Names, ...]
    result: Names


def einsum_of(text: str, operands: Sequence[Node]) -> Node:
    """The node of an einsum of one or two operands.

    Args:
        text: "b i d, b j d -> b i j" (names separated by spaces), or torch's "bid,bjd->bij". The
            result may be omitted, as in torch; "..." stands for leading axes that broadcast.
        operands: of one float type.

    Raises:
        ShapeError: for a text that cannot be parsed or does not match the operands.
        DtypeError: for operands of different types, or of a type that is not a float.
    """
    if not isinstance(text, str):
        raise TraceError("an einsum begins with its text", found=repr(text), help=_EXAMPLE)
    if len(operands) not in (1, 2):
        raise ShapeError(
            "an einsum has one or two operands",
            found=f"{len(operands)}",
            help="contract two at a time: the order decides the cost",
        )
    equation = _parsed(text, operands)
    check_types("einsum", operands[0], operands[-1])
    sizes = _sizes(text, equation, operands)
    result = tuple(n for n in equation.result if sizes[n] != ONE)
    terms = [_wide(n, o) for n, o in zip(equation.operands, operands, strict=True)]
    for i, term in enumerate(terms):
        others = {n for j, t in enumerate(terms) if j != i for n in t.names}
        for name in [n for n in term.names if n not in result and n not in others]:
            terms[i] = terms[i].without(name)
    term = _product(terms[0], terms[1], result) if len(terms) == 2 else terms[0]
    return shaped(term.under(result), tuple(sizes[n] for n in equation.result))


def _parsed(text: str, operands: Sequence[Node]) -> Equation:
    """Parse a text for these operands. Raises ShapeError."""
    left, arrow, right = text.partition("->")
    terms = [*left.split(","), *([right] if arrow else [])]
    spelled = any(len(t.split()) > 1 for t in terms)
    names = [_names(text, t, spelled) for t in terms]
    inputs = names[: len(terms) - bool(arrow)]
    if len(inputs) != len(operands):
        raise ShapeError(
            "an einsum's text has a term for each operand",
            found=f'"{text}" and {len(operands)} operands',
            help=_EXAMPLE,
        )
    ranks = [o.rank for o in operands]
    pairs = list(zip(inputs, ranks, strict=True))
    lead = max((rank - len(n) + 1 for n, rank in pairs if "..." in n), default=0)
    inputs = [_with_leading(n, rank - len(n) + 1) for n, rank in pairs]
    for mine, node in zip(inputs, operands, strict=True):
        if len(mine) != node.rank:
            raise ShapeError(
                "an einsum's term names each axis of its operand once",
                found=f'"{" ".join(mine)}" for {show_shape(node.shape)}',
                help=_EXAMPLE,
            )
    if arrow:
        result = _with_leading(names[-1], lead)
    else:
        every = [n for mine in inputs for n in mine if not n.startswith("...")]
        once = sorted(n for n in every if every.count(n) == 1)
        result = _with_leading(("...", *once), lead)
    _check_names(text, inputs, result)
    return Equation(tuple(inputs), result)


def _names(text: str, term: str, spelled: bool) -> Names:
    """The axis names of a term: words if `spelled`, else single letters."""
    found = re.findall(r"\.\.\.|\w+" if spelled else r"\.\.\.|[^\W\d_]", term)
    rest = re.sub(r"\.\.\.|\w+|\s" if spelled else r"\.\.\.|[^\W\d_]|\s", "", term)
    if rest or found.count("...") > 1:
        raise ShapeError(
            f'the einsum "{text}" cannot be read',
            found=f'"{term.strip()}"',
            help="write names with spaces between them, or single letters; x.reshape joins and "
            f"splits axes: {_EXAMPLE}",
        )
    return tuple(found)


def _with_leading(names: Names, lead: int) -> Names:
    """Names with "..." replaced by `lead` of them, numbered from the right: "...1", "...0"."""
    if "..." not in names:
        return names
    at = names.index("...")
    return (*names[:at], *(f"...{i}" for i in reversed(range(lead))), *names[at + 1 :])


def _check_names(text: str, inputs: Sequence[Names], result: Names) -> None:
    """Raise ShapeError for a repeated axis in a term, or one that only the result has."""
    for term in (*inputs, result):
        twice = sorted({n for n in term if term.count(n) > 1})
        if twice:
            raise ShapeError(
                f"an einsum's term has the axis `{twice[0]}` twice",
                found=f'"{text}"',
                help="a diagonal is coda.where(i == j, x, 0.0), summed, with i and j of coda.iota",
            )
    unknown = [n for n in result if not any(n in term for term in inputs)]
    if unknown:
        raise ShapeError(
            f"an einsum's result has an axis `{unknown[0]}` that no operand has",
            found=f'"{text}"',
            help=_EXAMPLE,
        )


def _sizes(text: str, equation: Equation, operands: Sequence[Node]) -> dict[str, Dim]:
    """The size of each axis by name. Raises ShapeError if operands disagree."""
    sizes: dict[str, Dim] = {}
    for names, node in zip(equation.operands, operands, strict=True):
        for name, dim in zip(names, node.shape, strict=True):
            known = sizes.get(name, ONE)
            if known != dim and ONE not in (known, dim):
                raise ShapeError(
                    f"the axis `{name}` of an einsum has two sizes",
                    found=f'{known} and {dim} in "{text}"',
                    help="an axis has one size in all operands, or is 1",
                )
            sizes[name] = dim if known == ONE else known
    return sizes


@dataclass(frozen=True)
class _Named:
    """An operand with the names of its axes, none of which has size 1."""

    names: Names
    node: Node

    def under(self, names: Names) -> Node:
        """The operand permuted to this order of its axes."""
        if names == self.names:
            return self.node
        return permuted(self.node, [self.names.index(n) for n in names])

    def without(self, name: str) -> _Named:
        """The operand summed over one axis."""
        at = self.names.index(name)
        total = Reduce("sum", self.node, at - len(self.names))
        node = Reshape(total, (*total.shape[:at], *total.shape[at + 1 :]))
        return _Named(tuple(n for n in self.names if n != name), node)


def _wide(names: Names, node: Node) -> _Named:
    """An operand with its axes of size 1 dropped, since it does not depend on them."""
    kept = [i for i, d in enumerate(node.shape) if d != ONE]
    node = shaped(node, tuple(node.shape[i] for i in kept))
    return _Named(tuple(names[i] for i in kept), node)


def _product(a: _Named, b: _Named, result: Names) -> _Named:
    """Two operands multiplied, and summed over the axes that the result does not have.

    With contracted axes and row or column axes it is a contraction; without row and column axes a
    product and a sum; without contracted axes a product alone.
    """
    summed = tuple(n for n in a.names if n in b.names and n not in result)
    batch = tuple(n for n in result if n in a.names and n in b.names)
    alone = [n for n in result if (n in a.names) != (n in b.names)]
    if alone and alone[0] in b.names:  # its axes come first in the result
        a, b = b, a
    rows, columns = (tuple(n for n in alone if n in t.names) for t in (a, b))
    names = (*batch, *rows, *columns)
    left, right = a.under((*batch, *rows, *summed)), b.under((*batch, *columns, *summed))
    if summed and alone:
        return _Named(names, _contracted(left, right, len(batch), len(summed)))
    lead, own = left.shape[: len(batch)], left.shape[len(batch) :]
    if not summed:
        ones = (ONE,) * len(columns), (ONE,) * len(rows)
        left = shaped(left, (*left.shape, *ones[0]))
        right = shaped(right, (*lead, *ones[1], *right.shape[len(batch) :]))
        return _Named(names, Map("mul", (left, right)))
    total = Reduce("sum", shaped(Map("mul", (left, right)), (*lead, product(own))), -1)
    return _Named(batch, Reshape(total, lead))


def _contracted(left: Node, right: Node, batch: int, summed: int) -> Node:
    """[*batch, *rows, *summed] with [*batch, *columns, *summed] -> [*batch, *rows, *columns].

    Args:
        left, right: the operands.
        batch: the number of batch axes, which come first.
        summed: the number of contracted axes, which come last.
    """
    lead, total = left.shape[:batch], product(left.shape[left.rank - summed :])
    rows, columns = (n.shape[batch : n.rank - summed] for n in (left, right))
    mine = (product(rows),) if batch else rows  # unbatched: lhs of any rank
    x = shaped(left, (*lead, *mine, total))
    w = shaped(right, (*lead, product(columns), total))
    return shaped(_contract(x, w), (*lead, *rows, *columns))
