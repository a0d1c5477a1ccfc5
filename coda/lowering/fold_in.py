"""Program -> Program in which the only reader of a row's statistic folds its partials itself.

A GEMM leaves partials of a row's statistic, one for each tile of columns. A small row-wise kernel
folds them, and computes a value of each row. If one kernel alone reads it, and its kind can fold,
the fold moves there, where its price is lower than that of both:

    gemm0 -> t_parts;  rows1: t = rsqrt(mean t_parts + eps);  gemm2: y = acc · t
    gemm0 -> t_parts;  gemm2: f0 = mean t_parts, y = acc · rsqrt(f0 + eps)

What is returned of the rows, such as what a backward reads, the reader stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from coda.ir.dims import product
from coda.ir.graph import Node
from coda.ir.types import f32
from coda.lowering.program.access import ColumnVector, OneElement, Partial
from coda.lowering.program.body import Body
from coda.lowering.program.cost import kernel_time
from coda.lowering.program.epilogue import (
    Expr,
    Load,
    Stat,
    StoreExpr,
    rewritten,
)
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.memory import held_in, reads
from coda.lowering.program.price import price_of
from coda.lowering.program.program import Program
from coda.lowering.whole_sums import sum_whole


def fold_in(program: Program) -> Program:
    """Move folds of partials into the kernels that read them, or that sum whole sequences."""
    program = sum_whole(program)
    for fold in program.kernels:
        found = _moved(program, fold) if _columns(program, fold) else ""
        program = program if isinstance(found, str) else found
    return program


def why_apart(program: Program, kernel: Kernel[Any]) -> str:
    """Why a kernel that only folds partials of rows is a launch of its own; "" for any other."""
    found = _moved(program, kernel) if _columns(program, kernel) else ""
    return found if isinstance(found, str) else ""


def _moved(program: Program, fold: Kernel[Any]) -> Program | str:
    """The Program without the kernel `fold`, whose reader folds; or the reason why it stays."""
    columns = _columns(program, fold)
    readers = [k for k in program.kernels if columns.keys() & set(reads(program, k))]
    if len(readers) != 1:
        names = ", ".join(k.name for k in readers)
        return f"{len(readers)} kernels read it ({names})" if names else "no kernel reads it"
    (reader,) = readers
    if columns.keys() & _parts(program):
        return "what it stores is a part of a larger buffer"
    replaced = _replaced(program, reader, columns)
    if replaced is None:
        return f"{reader.name} does not read it as a float32 number for each of its rows"
    returned = {b for _, node in program.outputs for b in held_in(program, node)}
    body = _joined(fold, reader, replaced, {b: columns[b] for b in columns if b in returned})
    if body is None:
        return f"an operand of {reader.name} has the name of another that it reads"
    stored = dict(zip((s.buffer for s in fold.body.epilogue.stores), fold.stored, strict=True))
    made = replace(
        reader,
        body=body,
        stored=(*reader.stored, *(stored[b] for b in columns if b in returned)),
        nodes=(*fold.nodes, *reader.nodes),
    )
    found = _without(program, fold, made, columns.keys() - returned)
    return _refused(program, (fold, reader), found, made) or found


def _refused(
    program: Program, apart: tuple[Kernel[Any], Kernel[Any]], found: Program, made: Kernel[Any]
) -> str:
    """Why a kernel that folds is not taken for the fold and its reader; "" if it is.

    Args:
        program: with the fold and its reader, `apart`.
        found: with the kernel `made`, which folds and reads.
    """
    fold, reader = apart
    why = made.kind.folds(found, made)
    if why:
        return f"{made.name} does not fold it: {why}"
    configs = made.kind.configs(found, made)
    if configs and reader.config not in configs:
        return f"{made.name} would need another tile to fold it"
    before, after = price_of(program, apart), price_of(found, [made])
    if after.undercuts(before):
        return ""
    own = kernel_time(program, fold).seconds
    more = after.seconds - before.seconds + own
    return (
        f"each tile of {made.name} would fold its rows, which takes {more * 1e6:.1f} µs where this "
        f"kernel takes {own * 1e6:.1f}"
    )


def _columns(program: Program, fold: Kernel[Any]) -> dict[str, Expr]:
    """Buffer -> value of each column that a kernel stores which only folds; {} for any other."""
    epilogue, narrow = fold.body.epilogue, fold.mainloop.points(program.sizes)[1] == 1
    own = (ColumnVector, OneElement, Partial)
    plain = all(isinstance(o.access, own) for o in epilogue.operands)
    folds = all(s.operand is not None and s.count for s in epilogue.statistics)
    if not (plain and folds and epilogue.statistics) or epilogue.pair or epilogue.sinks:
        return {}
    if fold.mainloop.operands or fold.body.packed or fold.body.spread:
        return {}
    columns = [s for s in epilogue.stores if (s.is_column or narrow) and s.rows is None]
    columns = [s for s in columns if len(s.lanes) == 1]
    if len(columns) < len(epilogue.stores):
        return {}
    return {s.buffer: s.lanes[0] for s in columns}


def _parts(program: Program) -> set[str]:
    """The buffers that are parts of joined ones."""
    return {part for some in program.joined.values() for part in some}


def _replaced(
    program: Program, reader: Kernel[Any], columns: Mapping[str, Expr]
) -> dict[str, Expr] | None:
    """Operand of the reader -> the column's value; None if it reads a column in another way."""
    found: dict[str, Expr] = {}
    operands = {o.name: o for o in reader.body.epilogue.operands}
    for name, node in reader.body.nodes.items():
        held = held_in(program, node) & columns.keys()
        if not held:
            continue
        (buffer,) = held
        same = node in program.places or _is_view(program, node)
        exact = program.buffers[buffer].dtype == f32 == operands[name].dtype
        if not (isinstance(operands[name].access, ColumnVector) and same and exact):
            return None
        if name in reader.body.spread:
            return None
        found[name] = columns[buffer]
    times = sum(b in columns for b in reads(program, reader))
    return found if len(found) == times else None


def _is_view(program: Program, node: Node) -> bool:
    """Whether a node is a reshape of a materialised one, with all its elements."""
    while node not in program.places and len(node.operands) == 1:
        (below,) = node.operands
        if product(below.shape) != product(node.shape) or below.dtype != node.dtype:
            return False
        node = below
    return node in program.places


def _joined(
    fold: Kernel[Any],
    reader: Kernel[Any],
    replaced: Mapping[str, Expr],
    kept: Mapping[str, Expr],
) -> Body | None:
    """The reader's body with the fold's; None if names of operands have two meanings.

    Args:
        fold, reader: the kernels.
        replaced: operand of the reader -> its value, an expression of the fold.
        kept: buffer -> value of each column that is stored still.
    """
    mine, theirs = reader.body, fold.body
    operands = [o for o in mine.epilogue.operands if o.name not in replaced]
    known = {o.name: o for o in operands}
    for operand in theirs.epilogue.operands:
        if operand.name not in known:
            operands.append(operand)
        elif known[operand.name] != operand or mine.nodes.get(operand.name) is not theirs.nodes.get(
            operand.name
        ):
            return None
    taken = {s.name for s in mine.epilogue.statistics}
    free = (name for i in count() if (name := f"f{i}") not in taken)
    names = {s.name: next(free) for s in theirs.epilogue.statistics}
    of_fold = rewritten(lambda e: replace(e, name=names[e.name]) if isinstance(e, Stat) else None)
    change = rewritten(
        lambda e: (
            of_fold(replaced[e.operand]) if isinstance(e, Load) and e.operand in replaced else None
        )
    )
    own, dtypes = mine.epilogue.mapped(change), {s.buffer: s.dtype for s in theirs.epilogue.stores}
    columns = [
        StoreExpr(buffer, dtypes[buffer], (of_fold(value),), ColumnVector())
        for buffer, value in kept.items()
    ]
    folds = [replace(s, name=names[s.name]) for s in theirs.epilogue.statistics]
    epilogue = replace(
        own,
        operands=tuple(operands),
        statistics=(*folds, *own.statistics),
        stores=(*own.stores, *columns),
    )
    nodes = {n: node for n, node in mine.nodes.items() if n not in replaced} | theirs.nodes
    return replace(mine, epilogue=epilogue, nodes=nodes, folded=(*theirs.folded, *mine.folded))


def _without(program: Program, fold: Kernel[Any], made: Kernel[Any], dropped: set[str]) -> Program:
    """The Program with `made` for the kernel of its name, without `fold` and its buffers."""
    kernels = [made if k.name == made.name else k for k in program.kernels if k is not fold]
    return replace(
        program,
        kernels=tuple(kernels),
        buffers={n: b for n, b in program.buffers.items() if n not in dropped},
        places={n: p for n, p in program.places.items() if p.buffer not in dropped},
    )
