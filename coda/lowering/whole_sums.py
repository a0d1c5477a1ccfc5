"""Program -> Program in which sums over each sequence are written by the kernel that computes them.

A row-wise kernel writes partials of such sums, one for each block of rows, and a kernel after it
folds them. If sequences and columns are enough for all multiprocessors, a CTA has some columns of a
whole sequence instead, and nothing is left to fold:

    rows1: sink t_parts = sum of each S rows;  rows2: f0 = sum t_parts, store t = f0
    rows1: sink t = sum of each S rows, whole
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coda.ir.types import f32
from coda.lowering.program.access import Partial
from coda.lowering.program.epilogue import Stat, SumRows
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program


def sum_whole(program: Program) -> Program:
    """Let kernels sum whole sequences where that leaves no fold, and enough CTAs."""
    for fold in program.kernels:
        sums = _only_folded(program, fold)
        for maker in [k for k in program.kernels if sums.keys() & set(k.writes())]:
            sinks = maker.body.epilogue.sinks
            alone = {s.buffer for s in sinks if isinstance(s, SumRows) and s.within is not None}
            if alone == sums.keys() and not maker.kind.sums_whole(program, maker):
                program = _without(program, fold, maker, sums)
    return program


def _only_folded(program: Program, fold: Kernel[Any]) -> dict[str, str]:
    """Buffer of partials -> buffer of their sums, of a kernel that only folds and stores them."""
    epilogue = fold.body.epilogue
    if fold.mainloop.operands or epilogue.sinks or epilogue.pair:
        return {}
    if not all(isinstance(o.access, Partial) for o in epilogue.operands):
        return {}
    sums = {Stat(s.name): s.operand for s in epilogue.statistics}
    joined = {p for parts in program.joined.values() for p in parts}
    found: dict[str, str] = {}
    for store in epilogue.stores:
        partial = sums.get(store.lanes[0]) if isinstance(store.lanes[0], Stat) else None
        plain = len(store.lanes) == 1 and store.dtype == f32 and store.rows is None
        if not partial or partial in found or not plain or store.buffer in joined:
            return {}
        found[partial] = store.buffer
    return found if len(found) == len(sums) else {}


def _without(
    program: Program, fold: Kernel[Any], maker: Kernel[Any], sums: Mapping[str, str]
) -> Program:
    """The Program in which `maker` writes the sums themselves, without `fold` and the partials."""
    epilogue = maker.body.epilogue
    sinks = tuple(
        replace(s, buffer=sums[s.buffer], whole=True) if isinstance(s, SumRows) else s
        for s in epilogue.sinks
    )
    body = replace(maker.body, epilogue=replace(epilogue, sinks=sinks))
    nodes = tuple(dict.fromkeys((*maker.nodes, *fold.nodes)))
    made = replace(maker, body=body, nodes=nodes)
    return replace(
        program,
        kernels=tuple(made if k is maker else k for k in program.kernels if k is not fold),
        buffers={n: b for n, b in program.buffers.items() if n not in sums},
    )
