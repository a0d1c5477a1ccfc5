"""The kind of row-wise kernels: statistics of whole rows, and elementwise results of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coda.ir.dims import ONE
from coda.ir.graph import Node
from coda.kernels.protocol import LaunchRun, Run
from coda.kernels.rowwise.mainloop import Rows, Rowwise
from coda.kernels.rowwise.pieces import has_padded_rows, pieces_of
from coda.kernels.rowwise.plan import chunks_of, row_parts, summed_within, vector_lengths
from coda.kernels.rowwise.time import rowwise_time
from coda.lowering.program.access import ColumnVector
from coda.lowering.program.body import Body
from coda.lowering.program.kernel import (
    Account,
    Builder,
    Code,
    Flops,
    Kind,
    Partials,
    Sizes,
    Source,
)
from coda.lowering.program.program import Program
from coda.lowering.program.text import at

MOST_WHOLE = 4  # sums of whole sequences that the shared memory of a CTA has room for
WHOLE_CTAS = 4  # CTAs of a multiprocessor that sum them, at least: 16 KB of loads in flight


def _refuses(node: Node, sizes: Sizes) -> str:
    return "it is placed where its elements are computed row-wise, or not at all"


def _mainloop(builder: Builder, name: Callable[[Node], str]) -> Rows:
    return Rows(builder.rows, builder.width)


def _flops(kernel: Rowwise, sizes: Sizes) -> Flops:
    return Flops()


def _explain(program: Program, kernel: Rowwise) -> Account:
    head = f"rows {kernel.mainloop.rows} × {kernel.mainloop.width}"
    return Account(head, head, _reason(program, kernel))


def _reason(program: Program, kernel: Rowwise) -> str:
    """The reason why a row-wise kernel is not fused into another kernel."""
    epilogue, folded = kernel.body.epilogue, kernel.body.folded
    tiled = [k for k in program.kernels if k.kind.tiled]
    makers = [k.name for k in tiled if set(k.sunk) & set(folded)]
    narrow = kernel.mainloop.width == 1
    if folded and (narrow or all(isinstance(s.access, ColumnVector) for s in epilogue.stores)):
        return f"it folds what the tiles of {', '.join(makers)} left, one number for each row"
    if folded:
        folds = ", ".join(map(at, folded))
        return (
            f"{folds} of the output of {', '.join(makers)} is known only when the whole row is, "
            "and what it writes needs it before any contraction that could take it later"
        )
    before = program.kernels[: program.kernels.index(kernel)]
    if not any(k.kind.tiled for k in before):
        return "it reads what no GEMM of the block makes"
    if any(s.expr is not None for s in epilogue.statistics):
        return "its statistics need whole rows of what it reads"
    return "what it reads is not in the columns of one GEMM"


def _reference(run: Run, kernel: Rowwise) -> None:
    run.body(kernel.body, None, kernel.mainloop.points(run.sizes))


def _reorders(node: Node, order: tuple[int, ...], sizes: Sizes) -> str:
    return "" if node.shape[-1] == ONE else "it stores matrices in the order of its rows"


def _shares(builder: Builder, body: Body, operands: Sequence[Node], sizes: Sizes) -> str:
    return ""


def _partials(program: Program, kernel: Rowwise, sizes: Sizes) -> Partials:
    rows, width = kernel.mainloop.points(sizes)
    return Partials(row_parts(kernel.body, width, rows, sizes))


def _sums_whole(program: Program, kernel: Rowwise) -> str:
    epilogue, (rows, width) = kernel.body.epilogue, kernel.mainloop.points(program.sizes)
    sums, within = epilogue.row_sums, summed_within(epilogue)
    pieces = pieces_of(kernel.body, width)
    more = epilogue.stores or epilogue.statistics or epilogue.pair or len(pieces) != 1
    if more or within is None or not MOST_WHOLE >= len(sums) == len(epilogue.sinks):
        return "it does more than to sum the rows of sequences"
    (vector,) = vector_lengths(epilogue, pieces, padded=False)
    ctas = rows // max(1, within.size(program.sizes)) * chunks_of(pieces[0], vector)
    few = ctas < WHOLE_CTAS * program.target.multiprocessors
    return "the columns of its sequences are too few for all multiprocessors" if few else ""


def _emit(program: Program, kernel: Rowwise) -> Sequence[Source]:
    from coda.kernels.rowwise.emit import emit_rowwise

    every = {False, has_padded_rows(program, kernel)}
    return [emit_rowwise(program, kernel, padded=padded) for padded in sorted(every)]


def _launch(run: LaunchRun, kernel: Rowwise) -> None:
    from coda.kernels.rowwise.bind import RowwiseBinding

    RowwiseBinding(run, kernel).launch()


def _compile(run: LaunchRun, kernel: Rowwise) -> None:
    from coda.kernels.rowwise.bind import RowwiseCompilation

    RowwiseCompilation(run, kernel).launch()


ROWWISE = Kind(
    name="rows",
    refuses=_refuses,
    mainloop=_mainloop,
    flops=_flops,
    time=rowwise_time,
    explain=_explain,
    reference=_reference,
    partials=_partials,
    reorders=_reorders,
    shares=_shares,
    sums_whole=_sums_whole,
    code=Code(_emit, _launch, _compile),
    whole_rows=True,
)
