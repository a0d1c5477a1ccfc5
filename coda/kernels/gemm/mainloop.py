"""The mainloop of a GEMM: sibling contractions of one activation, concatenated along columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coda.ir.dims import product
from coda.ir.graph import Contract, Node
from coda.lowering.program.kernel import Kernel, Sizes
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config


@dataclass(frozen=True)
class Contractions:
    """A [M, K] @ [B; B'; …].T -> accumulator [M, N]: sibling contractions of one activation.

    Attributes:
        contracts: in the order of the accumulator's columns; all have the same `lhs`.
    """

    contracts: tuple[Contract, ...]

    @property
    def a(self) -> Node:
        """The activation [..., K], whose leading axes are the rows."""
        return self.contracts[0].lhs

    @property
    def operands(self) -> tuple[Node, ...]:
        """A, then each B."""
        return (self.a, *(c.rhs for c in self.contracts))

    @property
    def results(self) -> tuple[str, ...]:
        """(): the body stores the accumulator if it is needed."""
        return ()

    def problem(self, sizes: Sizes) -> tuple[int, int, int]:
        """(M, N, K)."""
        m = product(self.a.shape[:-1]).size(sizes)
        n = sum(c.shape[-1].size(sizes) for c in self.contracts)
        return m, n, self.a.shape[-1].size(sizes)

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """(M, N): the rows and columns of the accumulator."""
        return self.problem(sizes)[:2]


Gemm = Kernel[Contractions]


def gemms(program: Program) -> Iterator[Gemm]:
    """The GEMMs of a program, in order."""
    return (k for k in program.kernels if isinstance(k.mainloop, Contractions))


def tiles(kernel: Gemm) -> Config:
    """The config of a GEMM, which must be chosen already."""
    assert kernel.config is not None
    return kernel.config
