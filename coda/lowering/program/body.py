"""What a kernel computes at an element, and what the host prepares for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coda.ir.dims import Shape
from coda.ir.graph import Node
from coda.lowering.program.epilogue import Epilogue

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """How an operand that depends on some row axes is repeated over all of them.

    Attributes:
        lead: the row axes.
        columns: how many of the operand's last axes are columns.
    """

    lead: Shape
    columns: int


@dataclass(eq=False)
class Packed:
    """A row operand put together from vectors: column c is element `index[c]` of `source[c]`.

    A source of -1 is the constant in `numbers`.
    """

    name: str
    source: Ints
    index: Ints
    numbers: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Body:
    """A kernel's Epilogue and what the host prepares for it.

    Attributes:
        epilogue: what happens at a point.
        packed: row operands to be packed from `sources`.
        sources: the nodes whose vectors are packed, by number.
        nodes: the node that each other operand loads, by name.
        folded: reductions whose partials the kernel folds.
        spread: operands that are repeated over row axes on which they do not depend, by name.
    """

    epilogue: Epilogue
    packed: tuple[Packed, ...]
    sources: dict[int, Node]
    nodes: dict[str, Node]
    folded: tuple[Node, ...]
    spread: dict[str, Spread]


NO_BODY = Body(Epilogue(0, (), (), (), ()), (), {}, {}, (), {})


def paired_columns(width: int, split: int) -> Ints:
    """[width / 2, 2]: columns `split` apart, beside each other."""
    p = np.arange(width // 2)
    low = p // split * 2 * split + p % split
    return np.stack([low, low + split], 1)
