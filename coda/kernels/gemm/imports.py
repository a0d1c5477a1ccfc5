"""The import lines of a GEMM's generated module: which module has which op of its epilogue."""

from __future__ import annotations

from collections.abc import Collection

OURS = {
    "ops": {"GroupSum", "GroupMean", "HalfStore", "LogSumExp", "Moments", "PairStore"}
    | {"Select", "SplitStore"},
    "ops_sm100": {"Pause", "RowInTurn", "SumInTurn"},
}


def import_lines(classes: set[str], functions: Collection[str], *, paired: bool) -> list[str]:
    """The import lines.

    Args:
        classes: the ops' constructors, of quack and of coda.
        functions: those of `coda.kernels.device_math` that the epilogue calls, sorted.
        paired: whether the weight's rows are paired.
    """
    source = "coda.kernels.gemm.paired_rows" if paired else "quack.epilogue.frontend"
    imports = [f"from {source} import gemm_epilogue"]
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
