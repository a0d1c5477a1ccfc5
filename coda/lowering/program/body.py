"""`Body`: an Epilogue, the nodes that its operands load, and how the host prepares operands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coda.ir.dims import Shape
from coda.ir.graph import Node
from coda.lowering.program.epilogue import Epilogue

FORMULAS = 16  # ranges of columns of a row-wise kernel that have a formula, and a loop, each
TILED_FORMULAS = 8  # those of a GEMM, which computes all for each column

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """How an operand that lacks some row axes is expanded over all of them.

    Attributes:
        lead: the row axes of the kernel.
        columns: the number of the operand's trailing axes that are columns.
        in_place: whether the kernel reads it as it is, with a stride of 0 over what it lacks.
    """

    lead: Shape
    columns: int
    in_place: bool = False


@dataclass(eq=False)
class Packed:
    """A row vector gathered from vectors: element c is element `index[c]` of source `source[c]`.

    Two biases q [64] and k [32] of one GEMM: source 0 × 64, 1 × 32; index 0 … 63, 0 … 31.

    Attributes:
        name: the operand's name.
        source: [columns] int64, a key of `Body.sources`; -1 for the constant in `numbers`.
        index: [columns] int64, the element of that source.
        numbers: [columns] float64, the constants of columns whose source is -1.
    """

    name: str
    source: Ints
    index: Ints
    numbers: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Body:
    """A kernel's Epilogue and its operands.

    Attributes:
        epilogue: the scalar program of one element or column pair.
        packed: row vectors to be packed from `sources`.
        sources: number -> node whose vector is packed.
        nodes: name of any other operand -> node that it loads.
        folded: reductions whose partials the kernel folds.
        spread: name -> expansion of an operand that lacks some of the row axes.
    """

    epilogue: Epilogue
    packed: tuple[Packed, ...]
    sources: dict[int, Node]
    nodes: dict[str, Node]
    folded: tuple[Node, ...]
    spread: dict[str, Spread]

    @property
    def in_place(self) -> dict[str, Spread]:
        """The operands of `spread` that the kernel reads with strides of 0."""
        return {name: spread for name, spread in self.spread.items() if spread.in_place}


NO_BODY = Body(Epilogue(0, (), (), (), ()), (), {}, {}, (), {})


def paired_columns(width: int, split: int) -> Ints:
    """[width / 2, 2] int64: the two columns of each pair, which are `split` apart.

    paired_columns(8, 2) is [[0, 2], [1, 3], [4, 6], [5, 7]]: two heads of 4 columns.
    """
    p = np.arange(width // 2)
    low = p // split * 2 * split + p % split
    return np.stack([low, low + split], 1)
