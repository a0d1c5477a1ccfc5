"""The kind of kernel for GEMMs with a fused epilogue, of matrices or of batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract, Node
from coda.ir.types import f32
from coda.kernels.gemm.batches import why_not, why_not_in, why_not_shared
from coda.kernels.gemm.configs import choice, ranked
from coda.kernels.gemm.mainloop import Contractions, Gemm, shown_problem, tiles
from coda.kernels.gemm.row_folds import why_not_folded
from coda.kernels.gemm.sketched import sketched
from coda.kernels.gemm.split_k import scratch
from coda.kernels.gemm.stages import cta_rows, stages
from coda.kernels.gemm.time import gemm_time
from coda.kernels.gemm.weights import paired_rows, weight_matrix
from coda.kernels.protocol import LaunchRun, Run
from coda.kernels.tensors import matrix
from coda.lowering.program.body import Body
from coda.lowering.program.cost import label
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
from coda.lowering.program.text import show_config
from coda.lowering.program.time import Time


def _refuses(node: Node, sizes: Sizes) -> str:
    if not isinstance(node, Contract):
        return "it is no contraction"
    return why_not(node, sizes) if node.batched else ""


def _mainloop(builder: Builder, name: Callable[[Node], str]) -> Contractions:
    return Contractions(builder.contracts)


def _flops(kernel: Gemm, sizes: Sizes) -> Flops:
    rows, n = kernel.mainloop.points(sizes)
    k = kernel.mainloop.problem(sizes)[2]
    return Flops(tensor=2 * rows * n * k, dtype=kernel.mainloop.a.dtype)


def _time(program: Program, kernel: Gemm) -> Time:
    return gemm_time(program, kernel, kernel.config or ranked(program, kernel)[0])


def _explain(program: Program, kernel: Gemm) -> Account:
    weights = " | ".join(label(c.rhs, program) for c in kernel.mainloop.contracts)
    multiplied = f"{label(kernel.mainloop.a, program)} @ [{weights}].T"
    head = f"gemm {multiplied} {shown_problem(program, kernel)}"
    if kernel.config is None:  # it is chosen after placement
        return Account(head, multiplied)
    config, pipeline = show_config(kernel.config), str(stages(program, kernel, kernel.config))
    chosen = str(choice(program, kernel))
    shown = f"{head} {config}", f"{multiplied}, {config}"
    return Account(*shown, pipeline=pipeline, choice=chosen)


def _reference(run: Run, kernel: Gemm) -> None:
    if kernel.mainloop.batch:
        acc = matrix(_contracted(run, kernel))
        run.body(kernel.body, acc, (acc.shape[0], acc.shape[1]), tiles(kernel).tile_n)
        return
    a = matrix(run.value(kernel.mainloop.a)).to(run.compute)
    weights = {c.rhs: run.value(c.rhs) for c in kernel.mainloop.contracts}
    b = paired_rows(kernel, weight_matrix(kernel, weights)).to(run.compute)
    acc = a @ b.transpose(0, 1)
    run.body(kernel.body, acc, (acc.shape[0], acc.shape[1]), tiles(kernel).tile_n)


def _contracted(run: Run, kernel: Gemm) -> Tensor:
    """The accumulator [*batch, M, N] of a batched contraction."""
    (node,) = kernel.mainloop.contracts
    known = {o: run.value(o).to(run.compute) for o in node.operands}
    return evaluate([node], known, run.sizes, run.compute)[0]


def _reorders(node: Node, order: tuple[int, ...], sizes: Sizes) -> str:
    return why_not_in(node, order, sizes) if isinstance(node, Contract) else "it is no contraction"


def _shares(builder: Builder, body: Body, operands: Sequence[Node], sizes: Sizes) -> str:
    return why_not_shared(builder.contracts[0], body, operands, sizes)


def _partials(program: Program, kernel: Gemm, sizes: Sizes) -> Partials:
    m, n, _ = kernel.mainloop.problem(sizes)
    config = tiles(kernel)
    rows, columns = cta_rows(config, program.target), config.tile_n
    matrices = kernel.mainloop.matrices(sizes)
    return Partials(max(1, matrices * -(-m // rows)), -(-n // columns), columns)


def _folds(program: Program, kernel: Gemm) -> str:
    if kernel.mainloop.batch:
        return "its rows are those of a batch"
    return why_not_folded(kernel.body.epilogue)


def _emit(program: Program, kernel: Gemm) -> Sequence[Source]:
    from coda.kernels.gemm.emit import emit_gemm

    return (emit_gemm(program, kernel),)


def _launch(run: LaunchRun, kernel: Gemm) -> None:
    from coda.kernels.gemm.bind import GemmBinding

    GemmBinding(run, kernel).launch()


def _compile(run: LaunchRun, kernel: Gemm) -> None:
    from coda.kernels.gemm.bind import GemmCompilation

    GemmCompilation(run, kernel).launch()


GEMM = Kind(
    name="gemm",
    refuses=_refuses,
    mainloop=_mainloop,
    flops=_flops,
    time=_time,
    sketched=sketched,
    explain=_explain,
    reference=_reference,
    configs=ranked,
    partials=_partials,
    reorders=_reorders,
    shares=_shares,
    folds=_folds,
    scratch=scratch,
    code=Code(_emit, _launch, _compile),
    tiled=True,
    scalars=f32,
)
