"""The columns of a row-wise kernel -> pieces with one formula each, and their split over threads.

A kernel of 192 columns with a row vector that is 0.125 in the first 64 columns and 1 in the others:

    Piece(0, 64, {load: 0.125}), Piece(64, 128, {load: 1.0})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import assert_never

import numpy as np
import torch

from coda.ir.scalars import SCALARS
from coda.kernels.lines import NUMBER
from coda.kernels.rowwise.mainloop import Rowwise
from coda.lowering.program.access import (
    Alternating,
    ColumnVector,
    Grouped,
    Line,
    OneElement,
    Partial,
    Periodic,
    RowVector,
    Shifted,
    Span,
    Tile,
    row_of,
)
from coda.lowering.program.body import FORMULAS, Body
from coda.lowering.program.epilogue import Call, Epilogue, Expr, Literal, Load, Position, Stat
from coda.lowering.program.memory import held_in
from coda.lowering.program.program import Program

LANES = 32
FOLD_WARPS = 8  # warps of a CTA that merges partial sums of 32 rows
COLUMN = NUMBER + "column"  # the variable of a vector of column numbers
_MOST = 8
WITHIN = (1, 2, 4)  # distances of columns that may change places within a vector


@dataclass(frozen=True)
class Piece:
    """Consecutive columns (or column pairs) with one formula.

    Attributes:
        first: the first column or pair.
        count: how many there are.
        numbers: the loads that are constant in the piece, with their values.
    """

    first: int
    count: int
    numbers: Mapping[Load, float]

    def special(self, expr: Expr, memo: dict[Expr, Expr] | None = None) -> Expr:
        """Specialise an expression to this piece: fold constant loads, and choices by them."""
        memo = {} if memo is None else memo
        if expr not in memo:
            memo[expr] = self._special(expr, memo)
        return memo[expr]

    def _special(self, expr: Expr, memo: dict[Expr, Expr]) -> Expr:
        if isinstance(expr, Load) and expr in self.numbers:
            return Literal(self.numbers[expr])
        if not isinstance(expr, Call):
            return expr
        row = SCALARS[expr.fn]
        if row.chooses:
            test = self.special(expr.args[0], memo)
            if isinstance(test, Literal):
                return self.special(expr.args[1 if test.value else 2], memo)
        args = tuple(self.special(a, memo) for a in expr.args)
        numbers = [torch.tensor(a.value) for a in args if isinstance(a, Literal)]
        if row.result == "bool" and len(numbers) == len(args):
            return Literal(float(row.evaluate(*numbers)))
        return Call(expr.fn, args)


def is_ragged(body: Body, width: int) -> bool:
    """Whether the width is no multiple of a vector, but most columns could be read by vectors.

    Rows that begin at multiples of 16 bytes are then read and written by vectors.
    """
    epilogue = body.epilogue
    plain = not (epilogue.pair or epilogue.sinks or any(s.group for s in epilogue.statistics))
    whole = not (_spans(epilogue) or _patterns(epilogue) or swaps_of(epilogue))
    whole = whole and not any(name in body.spread for name in epilogue.tiles)
    return plain and whole and width > _MOST and width % _MOST != 0


def has_padded_rows(program: Program, kernel: Rowwise) -> bool:
    """Whether a ragged row-wise kernel reads only tiles of coda's kernels or donated arguments."""
    tiles = kernel.body.epilogue.tiles
    found = {n for t in tiles for n in held_in(program, kernel.body.nodes[t])}
    theirs = {i.name for i in program.graph.inputs} - program.policy.donated
    return is_ragged(kernel.body, kernel.mainloop.width) and not found & theirs


def pieces_of(body: Body, width: int, *, padded: bool = False) -> tuple[Piece, ...]:
    """The pieces of a row-wise kernel, in order; the tail of `padded` rows is one."""
    epilogue = body.epilogue
    lanes = epilogue.lanes
    points = width // lanes
    numbers: dict[Load, np.ndarray] = {}
    for packed in body.packed:
        for lane in range(lanes):
            if packed.numbers is not None and np.all(packed.source[lane::lanes] < 0):
                numbers[Load(packed.name, lane)] = packed.numbers[lane::lanes]
    tail = {points // _MOST * _MOST} if padded else set()
    edges = {c for span in _spans(epilogue) for c in (span.first, span.end)}
    cuts = {0, points} | tail | {c // lanes for c in edges}
    fine = cuts | {int(i) + 1 for n in numbers.values() for i in np.flatnonzero(np.diff(n))}
    if len(fine) > FORMULAS + 1:
        numbers, fine = {}, cuts
    return tuple(
        Piece(a, b - a, {load: float(n[a]) for load, n in numbers.items()})
        for a, b in pairwise(sorted(fine))
    )


def _spans(epilogue: Epilogue) -> list[Span]:
    """The spans of operands and results that have only some of the columns."""
    rows = [row_of(o.access) for o in epilogue.operands]
    found = [access.span for access in rows if isinstance(access, Tile)]
    found += [x.span for x in (*epilogue.stores, *epilogue.row_sums)]
    return [span for span in found if span is not None]


def _patterns(epilogue: Epilogue) -> list[int]:
    """The periods and group sizes of operands along the columns, in columns or column pairs."""
    found: list[int] = []
    for operand in epilogue.operands:
        match operand.access:
            case Periodic(period=period, each=each):
                found.append(period * each)
            case Grouped(size=size):
                found.append(size)
            case RowVector() | ColumnVector() | Tile() | Alternating() | Shifted() | OneElement():
                pass
            case Line() | Partial():
                pass
            case _ as never:
                assert_never(never)
    return found


def swaps_of(epilogue: Epilogue) -> list[int]:
    """The distances of columns that are read in each other's place."""
    rows = [row_of(o.access) for o in epilogue.operands]
    return [d for access in rows if isinstance(access, Tile | Periodic) for d in access.swaps]


def vector_length(epilogue: Epilogue, pieces: Sequence[Piece]) -> int:
    """Columns (or pairs) of a vector: the largest power of two up to 8 that divides all lengths."""
    lanes = epilogue.lanes
    lengths = [8]
    lengths += [n for p in pieces for n in (p.first, p.count)]
    lengths += [*_patterns(epilogue), *([epilogue.split] if epilogue.split else [])]
    lengths += [d for d in swaps_of(epilogue) if d not in WITHIN]
    lengths += [s.group // lanes for s in epilogue.statistics if s.group]
    common = gcd(*lengths)
    return common & -common


def stats_of(expr: Expr | None) -> set[str]:
    """The statistics that an expression reads."""
    return {s.name for s in leaves_of_kind(expr, Stat)}


def reads_columns(exprs: list[Expr]) -> bool:
    """Whether expressions read the number of the column."""
    return any(p.axis == "column" for e in exprs for p in leaves_of_kind(e, Position))


def loads_of(exprs: list[Expr]) -> set[str]:
    """The operands that expressions load."""
    return {x.operand for e in exprs for x in leaves_of_kind(e, Load)}


def leaves_of_kind(expr: Expr | None, kind: type) -> list:
    """The leaves of an expression that are of one kind, each once."""
    found: dict[Expr, None] = {}
    stack, seen = [expr], set()
    while stack:
        one = stack.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        if isinstance(one, kind):
            found[one] = None
        elif isinstance(one, Call):
            stack.extend(one.args)
    return list(found)


def fold_warps(rows: int) -> int:
    """Warps of a CTA that merges sums over rows: four times as many if there are few CTAs."""
    return FOLD_WARPS if rows > 32 * LANES else 4 * FOLD_WARPS
