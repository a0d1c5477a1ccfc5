"""The import lines of a GEMM's generated module: which module has what it is made of."""

from __future__ import annotations

from collections.abc import Collection

from coda.kernels.gemm.batches import PLAIN, BatchStrides, batches_of, shared_tiles
from coda.kernels.gemm.mainloop import Gemm
from coda.kernels.gemm.operands import by_gemm
from coda.kernels.gemm.weights import halves
from coda.kernels.lines import safe
from coda.lowering.program.program import Program

OURS = {
    "ops": {"GroupSum", "GroupMean", "HalfStore", "LogSumExp", "Moments", "Number", "SoftmaxMean"}
    | {"PairStore", "Select", "SplitStore"},
    "ops_folds": {"FoldedRow", "RowFold", "RowStore"},
    "ops_rows": {"RowLogSumExp"},
    "ops_sm100": {"ColumnSumInTurn", "Pause", "RowInTurn", "SumInTurn"},
}


def base_of(program: Program, kernel: Gemm) -> tuple[str, str]:
    """The module that has `gemm_epilogue` for the layouts of A and B, and its arguments."""
    split = halves(program, kernel)
    if split:  # paired rows of the weight: groups of 2 · split rows
        groups = kernel.mainloop.problem(program.sizes)[1] // (2 * split)
        return "coda.kernels.gemm.paired_rows", f"split={split}, groups={groups},"
    batch = batches_of(program, kernel) if kernel.mainloop.batch else PLAIN
    if batch.plain:
        return "coda.kernels.gemm.relaid", ""
    stores = kernel.body.epilogue.stores
    own = by_gemm(kernel.body.epilogue)
    moved = [
        (s, p) for s, p in zip(stores, batch.stores, strict=True) if p is not BatchStrides.PLAIN
    ]
    names = {"D" if s is own else safe(s.buffer): p.name for s, p in moved}
    shared = zip(shared_tiles(kernel.body), batch.loads, strict=True)
    names |= {safe(name): p.name for name, p in shared if p is not BatchStrides.PLAIN}
    steps = f"inner={batch.inner}, a={batch.a.name!r}, b={batch.b.name!r},"
    steps += f" tiles={names!r}," if names else ""
    return "coda.kernels.gemm.batched", steps


def import_lines(classes: set[str], functions: Collection[str], *, base: str) -> list[str]:
    """The import lines.

    Args:
        classes: the ops' constructors, of quack and of coda.
        functions: those of `coda.kernels.device_math` that the epilogue calls, sorted.
        base: the module that has `gemm_epilogue` for the layouts of the operands.
    """
    imports = [f"from {base} import gemm_epilogue"]
    theirs = sorted(classes.difference(*OURS.values()))
    if "rotary_cos_sin_load" in theirs:
        theirs.remove("rotary_cos_sin_load")
        imports.append("from quack.epilogue.rotary import rotary_cos_sin_load")
    if theirs:
        imports.append(f"from quack.epilogue.ops import {', '.join(theirs)}")
    if functions:
        imports.append(f"from coda.kernels.device_math import {', '.join(functions)}")
    for module, ours in OURS.items():
        if classes & ours:
            names = ", ".join(sorted(classes & ours))
            imports.append(f"from coda.kernels.gemm.{module} import {names}")
    return imports
