"""GEMMs that differ only in names and sizes -> the one whose emitted module all of them use.

The chunks of one value are such GEMMs: the same kernel on different rows of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from coda.kernels.gemm.batches import Batches, batches_of
from coda.kernels.gemm.mainloop import Gemm, gemms
from coda.kernels.gemm.weights import halves
from coda.lowering.program.epilogue import Epilogue, Load, rewritten
from coda.lowering.program.program import Program


def names_of(epilogue: Epilogue) -> list[str]:
    """The names of operands and written buffers, each once, in order of occurrence."""
    written = [x.buffer for x in (*epilogue.stores, *epilogue.sinks)]
    return list(dict.fromkeys([*(o.name for o in epilogue.operands), *written]))


def renamed(epilogue: Epilogue, names: Mapping[str, str]) -> Epilogue:
    """An epilogue with operands and buffers renamed (old -> new)."""
    mapped = epilogue.mapped(
        rewritten(lambda e: Load(names[e.operand], e.lane) if isinstance(e, Load) else None)
    )
    return Epilogue(
        mapped.distance,
        tuple(replace(o, name=names[o.name]) for o in mapped.operands),
        tuple(replace(s, operand=s.operand and names[s.operand]) for s in mapped.statistics),
        tuple(replace(s, buffer=names[s.buffer]) for s in mapped.stores),
        tuple(replace(s, buffer=names[s.buffer]) for s in mapped.sinks),
    )


def first_alike(program: Program, kernel: Gemm) -> tuple[Gemm, dict[str, str]]:
    """The first GEMM that equals this one up to renaming, and the renaming (its name -> ours)."""
    mine = kernel.body.epilogue
    for other in gemms(program):
        theirs = other.body.epilogue
        names = dict(zip(names_of(theirs), names_of(mine), strict=False))
        same = len(names_of(theirs)) == len(names_of(mine))
        same = same and _layout(program, other) == _layout(program, kernel)
        if same and not mine.sinks and not theirs.sinks and renamed(theirs, names) == mine:
            return other, names
    return kernel, {n: n for n in names_of(mine)}


def _layout(program: Program, kernel: Gemm) -> tuple[int, int, Batches | None]:
    """The key of the operands' layouts: (split, N) for paired rows, else (0, 0); the batch."""
    split = halves(program, kernel)
    batch = batches_of(program, kernel) if kernel.mainloop.batch else None
    return split, kernel.mainloop.problem(program.sizes)[1] if split else 0, batch
