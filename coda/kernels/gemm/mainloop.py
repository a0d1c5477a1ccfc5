"""The mainloop of a GEMM: sibling contractions of one activation, concatenated along columns.

A batched contraction is a GEMM for each matrix of its batch, in one launch. Its body sees the rows
of all of them one after another, so that nothing but the mainloop distinguishes batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coda.ir.dims import Shape, product
from coda.ir.graph import Contract, Node
from coda.lowering.program.kernel import Kernel, Sizes
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config


@dataclass(frozen=True)
class Contractions:
    """A [M, K] @ [B; B'; …].T -> accumulator [M, N]: sibling contractions of one activation.

    Or one batched contraction, A [L, M, K] with B [L, N, K] -> accumulator [L · M, N].

    Attributes:
        contracts: in the order of the accumulator's columns; all have the same `lhs`.
    """

    contracts: tuple[Contract, ...]

    @property
    def a(self) -> Node:
        """The activation [..., K], whose leading axes are the rows."""
        return self.contracts[0].lhs

    @property
    def batch(self) -> Shape:
        """The batch axes; () without a batch."""
        (first, *_) = self.contracts
        return first.shape[:-2] if first.batched else ()

    @property
    def operands(self) -> tuple[Node, ...]:
        """A, then each B."""
        return (self.a, *(c.rhs for c in self.contracts))

    @property
    def results(self) -> tuple[str, ...]:
        """(): the body stores the accumulator if it is needed."""
        return ()

    def problem(self, sizes: Sizes) -> tuple[int, int, int]:
        """(M, N, K) of each matrix of the batch."""
        m = product(self.contracts[0].shape[len(self.batch) : -1]).size(sizes)
        n = sum(c.shape[-1].size(sizes) for c in self.contracts)
        return m, n, self.a.shape[-1].size(sizes)

    def matrices(self, sizes: Sizes) -> int:
        """L: the number of matrices of the batch; 1 without one."""
        return product(self.batch).size(sizes)

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """(L · M, N): the rows and columns of the accumulator."""
        m, n, _ = self.problem(sizes)
        return self.matrices(sizes) * m, n


Gemm = Kernel[Contractions]


def gemms(program: Program) -> Iterator[Gemm]:
    """The GEMMs of a program, in order."""
    return (k for k in program.kernels if isinstance(k.mainloop, Contractions))


def shown_problem(program: Program, kernel: Gemm) -> str:
    """`M×N×K`, or `L · M×N×K` for a batch of L."""
    sizes, loop = program.sizes, kernel.mainloop
    problem = "×".join(map(str, loop.problem(sizes)))
    return f"{loop.matrices(sizes)} · {problem}" if loop.batch else problem


def tiles(kernel: Gemm) -> Config:
    """The config of a GEMM, which must be chosen already."""
    assert kernel.config is not None
    return kernel.config
